// Rotary embedding of some of rows' columns.
#pragma once

#include "pointwise.hpp"

// v4::Rotate: x float32 [M, H, W], cos and sin float32 [1, M, R / 2] -> x, its R columns from `begin` on turned and rounded: in pairs
// of neighbours where `interleaved`, else of one from each half.
class Rotate {
 public:
  static constexpr const char* kName = "Rotate";
  static constexpr ort::Type kOutputs[] = {ort::kFloat};

  explicit Rotate(const ort::Info* info)
      : begin_(ort::attribute(info, "begin")), interleaved_(ort::attribute(info, "interleaved")),
        rounding_(rounding_of(ort::text(info, "activations"))) {}

  void compute(ort::Context* context) {
    const ort::Shape shape(ort::input(context, 0)), of_cos(ort::input(context, 1));
    const int64_t tokens = shape.dims[0], heads = shape.dims[1], width = shape.dims[2], pairs = of_cos.dims.back();
    if (of_cos.dims != ort::Dims{1, tokens, pairs} || ort::Shape(ort::input(context, 2)).dims != of_cos.dims ||
        begin_ + 2 * pairs > width)
      throw std::invalid_argument("Rotate: angles of other sizes than the rows'");
    const float *x = ort::data<float>(context, 0), *cos = ort::data<float>(context, 1), *sin = ort::data<float>(context, 2);
    float* y = ort::output<float>(context, 0, shape.dims);
    pointwise::each_row(context, tokens, heads * width, [&](int64_t m) {
      for (int64_t h = 0; h < heads; h++) {
        const int64_t at = (m * heads + h) * width;
        std::copy_n(x + at, begin_, y + at);
        turn(x + at + begin_, cos + m * pairs, sin + m * pairs, pairs, y + at + begin_);
        std::copy(x + at + begin_ + 2 * pairs, x + at + width, y + at + begin_ + 2 * pairs);
      }
    });
  }

 private:
  void turn(const float* x, const float* cos, const float* sin, int64_t pairs, float* y) const {
    const int64_t step = interleaved_ ? 2 : 1, other = interleaved_ ? 1 : pairs;
    for (int64_t j = 0; j < pairs; j++) {
      const float a = x[j * step], b = x[j * step + other];
      y[j * step] = a * cos[j] - b * sin[j];
      y[j * step + other] = a * sin[j] + b * cos[j];
    }
    if (rounding_ == Rounding::kNone) return;
    for (int64_t i = 0; i < 2 * pairs; i += kLanes) {
      const int some = static_cast<int>(std::min<int64_t>(kLanes, 2 * pairs - i));
      store_first(y + i, rounded(load_first(y + i, some), rounding_), some);
    }
  }

  int64_t begin_;
  bool interleaved_;
  Rounding rounding_;
};
