// What Engram layers look up for new tokens, as inputs of the graph.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "description.hpp"
#include "tensor.hpp"

namespace v4export {

class Lookups {
 public:
  // Opens the tables. `engram` has to outlive it.
  //   activations: the type of rows that the graph takes.
  // Throws Error, or engram::Error: the map or a table is not what it has to be.
  Lookups(const Engram& engram, Type activations);

  // Before the first token: what look-ups need to know of earlier ones.
  std::vector<std::int64_t> empty_history() const { return hasher_->empty_history(1); }

  // Finds the rows of new tokens: [1, S, hashes * width] of each layer, or the numbers [1, S, hashes] of those whose
  // table is in the graph. What is pushed is valid until the next call.
  //   history: of what is before them; replaced by the new one.
  void rows(const std::vector<std::int64_t>& tokens, std::vector<std::int64_t>& history, std::vector<Tensor>& inputs);

 private:
  struct Layer {
    const Lookup* lookup;
    std::unique_ptr<engram::Table> table;
    std::vector<std::int64_t> numbers;
    std::vector<std::uint8_t> found;
  };

  std::unique_ptr<engram::Hasher> hasher_;
  Type activations_;
  std::vector<Layer> layers_;
};

}  // namespace v4export
