#include "state.hpp"

#include <algorithm>
#include <cstring>

#include "v4export/error.hpp"

namespace v4export {
namespace {

constexpr std::int64_t FIRST_CAPACITY = 256;

std::size_t bytes_of(const StateTensor& tensor, std::int64_t rows) {
  return static_cast<std::size_t>(rows) * tensor.row_bytes();
}

}  // namespace

State::State(const std::vector<StateTensor>& tensors, std::int64_t limit) : limit_(limit) {
  for (const StateTensor& tensor : tensors) {
    buffers_.push_back({&tensor, std::vector<std::uint8_t>(bytes_of(tensor, tensor.ring)), {}});
  }
  grow(std::min(FIRST_CAPACITY, limit));
}

std::size_t State::bytes() const {
  std::size_t sum = 0;
  for (const Buffer& buffer : buffers_) sum += buffer.rows.size() + buffer.scratch.size();
  return sum;
}

void State::grow(std::int64_t tokens) {
  capacity_ = tokens;
  for (Buffer& buffer : buffers_) {
    const StateTensor& tensor = *buffer.tensor;
    if (tensor.ring) continue;
    // The rows that a step returns may be one more than it completes.
    buffer.rows.resize(bytes_of(tensor, tensor.every > 1 ? tensor.complete(tokens) + 1 : tokens));
  }
}

void State::reserve(std::int64_t steps) {
  const std::int64_t needed = length_ + steps;
  if (needed > limit_) {
    throw Error(Exit::INPUT, "the sequence is longer than this model was exported for",
                std::to_string(needed) + " tokens, at most " + std::to_string(limit_),
                "export with a larger --max-seq-len");
  }
  steps_ = steps;
  if (needed > capacity_) grow(std::max(needed, std::min(2 * capacity_, limit_)));
}

void State::held(std::vector<Tensor>& inputs) {
  for (Buffer& buffer : buffers_) {
    const StateTensor& tensor = *buffer.tensor;
    const std::int64_t rows = tensor.ring ? tensor.ring : std::max<std::int64_t>(1, tensor.complete(length_));
    inputs.push_back({tensor.reads, tensor.type, {1, rows, tensor.width}, buffer.rows.data()});
  }
}

void State::room(std::vector<Tensor>& outputs) {
  for (Buffer& buffer : buffers_) {
    const StateTensor& tensor = *buffer.tensor;
    const std::int64_t rows = tensor.returned(steps_);
    std::uint8_t* place;
    if (in_place(tensor)) {
      const std::int64_t first = tensor.complete(length_);
      place = buffer.rows.data() + bytes_of(tensor, tensor.ring ? first % tensor.ring : first);
    } else {
      buffer.scratch.resize(bytes_of(tensor, rows));
      place = buffer.scratch.data();
    }
    outputs.push_back({tensor.writes, tensor.type, {1, rows, tensor.width}, place});
  }
}

void State::commit() {
  const std::int64_t after = length_ + steps_;
  for (Buffer& buffer : buffers_) {
    const StateTensor& tensor = *buffer.tensor;
    if (in_place(tensor)) continue;
    const std::int64_t first = tensor.complete(length_), end = tensor.complete(after);
    for (std::int64_t n = std::max(first, end - tensor.ring); n < end; ++n) {
      std::memcpy(buffer.rows.data() + bytes_of(tensor, n % tensor.ring),
                  buffer.scratch.data() + bytes_of(tensor, n - first), tensor.row_bytes());
    }
  }
  length_ = after;
}

}  // namespace v4export
