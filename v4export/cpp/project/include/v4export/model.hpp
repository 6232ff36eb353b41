// A packaged model: token ids in, token ids out, by onnxruntime, which is loaded when a model is, or by TensorRT.
//
// Letters: S new tokens, V vocabulary. One sequence at a time; several models may run at once, and one may be used by
// several threads only in turn.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "v4export/error.hpp"

namespace v4export {

struct Options {
  std::string library;      // path of libonnxruntime; else V4EXPORT_ONNXRUNTIME of the environment, else by its name
  std::string description;  // folder of model.txt; else where CMake's V4EXPORT_DESCRIPTION says, the package's own
  int threads = 0;          // of onnxruntime; 0 lets it choose
  bool tensorrt = false;    // run the bundle's engine, where this was compiled with TensorRT
  std::string plugins;      // path of libv4_plugins.so, for engines that need it
};

struct Generating {
  std::int64_t max_new_tokens = 128;
  bool ignore_eos = false;                     // go on past the ids that end a text
  std::function<void(std::int64_t)> on_token;  // called with each new id as it is picked
};

struct Generation {
  std::vector<std::int64_t> tokens;  // all new ones, with the one that ended it
  bool stopped = false;              // by an id that ends a text; else by length
  double prefill_s = 0;              // from the call to the first new token
  double decode_s = 0;               // from the first new token to the last
};

class Model {
 public:
  // Opens a bundle. Sets a variable of the environment meanwhile, as no other thread should.
  // Throws Error: the files are not those that were packaged, lead out of the folder, or onnxruntime cannot be loaded
  // or cannot run the graph.
  explicit Model(const std::string& bundle, const Options& options = {});
  ~Model();
  Model(Model&&) noexcept;
  Model& operator=(Model&&) noexcept;

  std::int64_t vocab_size() const;
  std::int64_t max_seq_len() const;    // most tokens of a sequence
  std::int64_t length() const;         // tokens that the sequence has now
  std::size_t state_bytes() const;     // that its state takes now
  const std::string& runtime() const;  // what computes, and its version

  // Appends tokens to the sequence, in chunks of 512 as `v4export run` does, or of as many as the engine takes.
  //   ids [S], at least one, each 0 .. V-1.
  // Returns logits [V] after the last; valid until the next call.
  // Throws Error: an id is none of the model's or stands for an image, or the sequence would be longer than
  // max_seq_len; then the sequence is as it was. After an error of the runtime, call reset.
  const std::vector<float>& prefill(const std::vector<std::int64_t>& ids);

  // The same for one token.
  const std::vector<float>& step(std::int64_t id);

  // Begins a new sequence.
  void reset();

  // Begins a new sequence with ids and goes on with the likeliest token; of equals the lowest id. Ends at an id that
  // ends a text, after max_new_tokens, or when the sequence is as long as it may be: as `v4export run` does.
  // Throws Error, as prefill does; also where the logits are no numbers to choose by.
  Generation generate(const std::vector<std::int64_t>& ids, const Generating& how = {});

 private:
  struct Parts;
  std::unique_ptr<Parts> parts_;
};

// The likeliest token of logits [V], the lowest id of equals.
// Throws Error: a logit is NaN or infinite, but for minus infinity of some.
std::int64_t likeliest(const std::vector<float>& logits);

}  // namespace v4export
