// What a graph does with numbers one by one, or row by row, and rounds: one node for what are three and more without.
#pragma once

#include <cmath>

#include "stored.hpp"

namespace pointwise {

constexpr int64_t kShare = 1 << 14;  // numbers worth a task

inline int64_t count_of(const ort::Shape& shape) {
  int64_t count = 1;
  for (int64_t dim : shape.dims) count *= dim;
  return count;
}

// to[i] = number(i, how many) for a vector of numbers from i on
template <class Number>
void each(const ort::Context* context, int64_t count, float* to, const Number& number) {
  ort::parallel(context, (count + kShare - 1) / kShare, [&](size_t part) {
    const int64_t end = std::min<int64_t>((part + 1) * kShare, count);
    for (int64_t i = part * kShare; i < end; i += kLanes) {
      const int some = static_cast<int>(std::min<int64_t>(kLanes, end - i));
      store_first(to + i, number(i, some), some);
    }
  });
}

// task(row) for every row of so many numbers
template <class Task>
void each_row(const ort::Context* context, int64_t rows, int64_t width, const Task& task) {
  ort::parallel_in_groups(context, rows, std::max<int64_t>(1, kShare / std::max<int64_t>(width, 1)), task);
}

inline float squares(const float* x, int64_t count) {
  Floats total{};
  for (int64_t i = 0; i < count; i += kLanes) {
    const Floats value = load_first(x + i, static_cast<int>(std::min<int64_t>(kLanes, count - i)));
    total += value * value;
  }
  return sum(total);
}

}  // namespace pointwise

// silu(gate) * up, both cut off at a limit if that is above zero.
inline Floats swiglu(Floats gate, Floats up, float limit) {
  if (limit > 0) {
    gate = least(gate, all(limit));
    up = most(least(up, all(limit)), all(-limit));
  }
  return gate / (1.0f + exp(-gate)) * up;
}

// What an operator has to say: its name, how many inputs of one shape it has, and a vector of results from one of each.
struct Rounds {
  static constexpr const char* kName = "Round";
  static constexpr int kInputs = 1;
  explicit Rounds(const ort::Info*) {}
  Floats result(const Floats (&x)[1]) const { return x[0]; }
};

struct Adds {
  static constexpr const char* kName = "Sum";
  static constexpr int kInputs = 2;
  explicit Adds(const ort::Info*) {}
  Floats result(const Floats (&x)[2]) const { return x[0] + x[1]; }
};

struct Gates {
  static constexpr const char* kName = "SwiGlu";
  static constexpr int kInputs = 2;
  float limit;
  explicit Gates(const ort::Info* info) : limit(ort::real(info, "limit")) {}
  Floats result(const Floats (&x)[2]) const { return swiglu(x[0], x[1], limit); }
};

// v4::Round, v4::Sum, v4::SwiGlu: inputs float32 of one shape -> what the operator says, rounded.
template <class Op>
class Pointwise {
 public:
  static constexpr const char* kName = Op::kName;
  static constexpr ort::Type kOutputs[] = {ort::kFloat};

  explicit Pointwise(const ort::Info* info) : op_(info), rounding_(rounding_of(ort::text(info, "activations"))) {}

  void compute(ort::Context* context) {
    const ort::Shape shape(ort::input(context, 0));
    const float* from[Op::kInputs];
    for (int i = 0; i < Op::kInputs; i++) {
      if (ort::Shape(ort::input(context, i)).dims != shape.dims) throw std::invalid_argument(std::string(kName) + ": inputs of two shapes");
      from[i] = ort::data<float>(context, i);
    }
    float* y = ort::output<float>(context, 0, shape.dims);
    pointwise::each(context, pointwise::count_of(shape), y, [&](int64_t at, int some) {
      Floats x[Op::kInputs];
      for (int i = 0; i < Op::kInputs; i++) x[i] = load_first(from[i] + at, some);
      return rounded(op_.result(x), rounding_);
    });
  }

 private:
  Op op_;
  Rounding rounding_;
};

// v4::RmsNorm: x float32 [.., D], weight [D] as stored if there is one -> x / sqrt(mean(x^2) + epsilon) * weight, rounded.
class RmsNorm {
 public:
  static constexpr const char* kName = "RmsNorm";
  static constexpr ort::Type kOutputs[] = {ort::kFloat};

  explicit RmsNorm(const ort::Info* info)
      : epsilon_(ort::real(info, "epsilon")), rounding_(rounding_of(ort::text(info, "activations"))) {}

  void compute(ort::Context* context) {
    const ort::Shape shape(ort::input(context, 0));
    const int64_t width = shape.dims.back(), rows = width ? pointwise::count_of(shape) / width : 0;
    thread_local std::vector<float> own;
    const bool given = ort::inputs(context) > 1;
    if (!given) own.assign(width, 1.0f);
    const float* weight = given ? numbers(ort::input(context, 1), own) : own.data();
    const float* x = ort::data<float>(context, 0);
    float* y = ort::output<float>(context, 0, shape.dims);
    pointwise::each_row(context, rows, width, [&](int64_t row) { norm(x + row * width, weight, width, y + row * width); });
  }

 private:
  void norm(const float* x, const float* weight, int64_t width, float* y) const {
    const float factor = 1 / std::sqrt(pointwise::squares(x, width) / width + epsilon_);
    for (int64_t d = 0; d < width; d += kLanes) {
      const int some = static_cast<int>(std::min<int64_t>(kLanes, width - d));
      store_first(y + d, rounded(load_first(x + d, some) * factor * load_first(weight + d, some), rounding_), some);
    }
  }

  float epsilon_;
  Rounding rounding_;
};
