// What one sequence has cached, kept outside the graph and never copied per token.
//
// The graph reads the rows it needs where they lie and writes new ones straight to their places; but those for a ring
// into a scratch, unless there is only one, whose place is that of a row that nobody needs any more. What rows hold is
// nobody's business here: they are bytes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "description.hpp"
#include "tensor.hpp"

namespace v4export {

class State {
 public:
  // Holds no token. `tensors` has to outlive it.
  //   limit: most tokens.
  State(const std::vector<StateTensor>& tensors, std::int64_t limit);

  std::int64_t length() const { return length_; }
  std::size_t bytes() const;

  // Makes room for a step of so many tokens, 1 or more; capacity doubles, so that growing costs a constant per token.
  // Throws Error: the sequence would pass the limit.
  void reserve(std::int64_t steps);

  // What the graph reads, [1, rows, width] of each tensor: never without a row, since operators refuse to gather from
  // nothing, and one that holds no token's is ignored.
  void held(std::vector<Tensor>& inputs);

  // Where the graph writes the rows that the reserved step returns, [1, new rows, width] of each tensor.
  void room(std::vector<Tensor>& outputs);

  // Takes the rows that the reserved step's tokens complete as held.
  void commit();

 private:
  struct Buffer {
    const StateTensor* tensor;
    std::vector<std::uint8_t> rows;
    std::vector<std::uint8_t> scratch;
  };

  bool in_place(const StateTensor& tensor) const { return !tensor.ring || (steps_ == 1 && !tensor.reads_oldest); }
  void grow(std::int64_t tokens);

  std::vector<Buffer> buffers_;
  std::int64_t limit_, length_ = 0, steps_ = 0, capacity_ = 0;
};

}  // namespace v4export
