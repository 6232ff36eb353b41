// Tensors as the runner passes them: bytes somewhere, and what they are.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace v4export {

// Types of numbers by their names in model.txt. `onnx` is the number that ONNX and onnxruntime give them.
struct Type {
  const char* name;
  int onnx;
  std::size_t bytes;
};
constexpr Type FLOAT32{"float32", 1, 4}, INT64{"int64", 7, 8};
constexpr Type TYPES[] = {FLOAT32, INT64, {"float16", 10, 2}, {"bfloat16", 16, 2}, {"float8_e4m3fn", 17, 1}};

// Contiguous, in the host's memory, and somebody else's. `data` is never null, even of a tensor without elements.
struct Tensor {
  std::string name;
  Type type;
  std::vector<std::int64_t> shape;
  void* data;

  std::size_t bytes() const {
    std::size_t count = type.bytes;
    for (std::int64_t size : shape) count *= static_cast<std::size_t>(size);
    return count;
  }
};

// What runs a graph.
class Graph {
 public:
  virtual ~Graph() = default;

  // Reads all inputs and writes the outputs that are given, where they lie. Throws Error.
  virtual void run(const std::vector<Tensor>& inputs, const std::vector<Tensor>& outputs) = 0;

  // What it is, with its version.
  virtual const std::string& runtime() const = 0;

  // The most tokens of a step; that of onnxruntime as `v4export run` has it.
  virtual std::int64_t most_tokens() const { return 512; }

  // Logits that every step has to ask for.
  virtual std::int64_t least_logits() const { return 0; }
};

}  // namespace v4export
