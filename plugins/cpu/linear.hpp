// v4::Linear: x [M, K] float32, weight [N, K], its multipliers and theirs where there are any, bias [N] if there is one
// -> [M, N] float32, rounded where the portable node's is.
#pragma once

#include "stored.hpp"

class Linear {
 public:
  static constexpr const char* kName = "Linear";
  static constexpr ort::Type kOutputs[] = {ort::kFloat};

  explicit Linear(const ort::Info* info)
      : form_{ort::attribute(info, "out"), ort::attribute(info, "width"), ort::attribute(info, "rows"),
              ort::attribute(info, "columns")},
        has_bias_(ort::attribute(info, "bias")), rounding_(rounding_of(ort::text(info, "activations"))) {}

  void compute(ort::Context* context) {
    const size_t given = ort::inputs(context) - has_bias_;
    const ort::Value* x = ort::input(context, 0);
    const int64_t tokens = ort::Shape(x).dims[0];
    const Stored w(form_, ort::input(context, 1), given > 2 ? ort::input(context, 2) : nullptr,
                   given > 3 ? ort::input(context, 3) : nullptr);
    const ort::Value* bias = has_bias_ ? ort::input(context, given) : nullptr;
    float* y = ort::output<float>(context, 0, {tokens, form_.rows});
    if (!tokens) return;
    thread_local std::vector<const float*> vectors;
    vectors.resize(tokens);
    for (int64_t m = 0; m < tokens; m++) vectors[m] = reinterpret_cast<const float*>(ort::bytes(x)) + m * form_.width;
    const float* const* from = vectors.data();
    const int64_t rows = share(form_.rows, form_.width, tokens);
    ort::parallel(context, (form_.rows + rows - 1) / rows, [&](size_t task) {
      const int64_t first = task * rows;
      const int64_t last = std::min(first + rows, form_.rows);
      multiply(w, first, last, from, tokens, y, form_.rows);
      if (bias || rounding_ != Rounding::kNone)
        for (int64_t m = 0; m < tokens; m++) finish(y + m * form_.rows, first, last, bias);
    });
  }

 private:
  void finish(float* y, int64_t first, int64_t last, const ort::Value* bias) const {
    for (int64_t n = first; n < last; n += kLanes) {
      const int some = static_cast<int>(std::min<int64_t>(kLanes, last - n));
      Floats value = load_first(y + n, some);
      if (bias) value += numbers(bias, n, some);
      store_first(y + n, rounded(value, rounding_), some);
    }
  }

  // Some of a vector of any plain format.
  static Floats numbers(const ort::Value* vector, int64_t first, int count) {
    return with_plain(format_of(ort::Shape(vector).type), [&](auto format) {
      using F = decltype(format);
      uint8_t padded[kLanes * 4] = {};
      std::memcpy(padded, ort::bytes(vector) + F::bytes(first), F::bytes(count));
      return F::widen(padded);
    });
  }

  Form form_;
  bool has_bias_;
  Rounding rounding_;
};
