// Hyper-connections: what a sublayer reads of a token's streams, and how its output is joined to them.
// See ../hyper_connection/op.py, ../hyper_coefficients/op.py and ../hyper_mix/op.py.
#pragma once

#include <cmath>

#include "pointwise.hpp"

namespace hyper {

constexpr int64_t kTokens = 4 * kVectors;  // whose streams are multiplied together

// The shares of the collapse and of the output, and Sinkhorn's matrix, of a token's logits.
class Coefficients {
 public:
  explicit Coefficients(const ort::Info* info)
      : streams_(ort::attribute(info, "num_streams")), iterations_(ort::attribute(info, "iterations")), eps_(ort::real(info, "eps")),
        norm_eps_(ort::real(info, "norm_eps")) {}

  int64_t streams() const { return streams_; }
  int64_t count() const { return (2 + streams_) * streams_; }

  // logits [M, count()] of streams [M, X * D]: products with fn's rows, not yet divided by the streams' root mean square
  void project(ort::Context* context, int64_t tokens, int64_t width, float* logits) const {
    const float *x = ort::data<float>(context, 0), *fn = ort::data<float>(context, 1);
    thread_local std::vector<const uint8_t*> rows;
    rows.resize(count());
    for (int64_t n = 0; n < count(); n++) rows[n] = reinterpret_cast<const uint8_t*>(fn + n * width);
    thread_local std::vector<const float*> vectors;
    vectors.resize(tokens);
    for (int64_t m = 0; m < tokens; m++) vectors[m] = x + m * width;
    const float* const* each = vectors.data();  // tasks on other threads have vectors of their own
    Matrix matrix;
    matrix.rows = rows.data();
    matrix.width = width;
    const int64_t parts = (count() + kRows - 1) / kRows, groups = (tokens + kTokens - 1) / kTokens;
    ort::parallel(context, parts * groups, [&](size_t task) {
      const int64_t n = task % parts * kRows, m = task / parts * kTokens;
      products<Float32>(matrix, n, std::min(n + kRows, count()), each + m, std::min(kTokens, tokens - m),
                        logits + m * count(), count());
    });
  }

  // From one token's logits and streams; `logits` are overwritten.
  void of(float* logits, const float* x, int64_t width, const float* base, const float* scale, float* pre, float* post,
          float* comb) const {
    const float factor = 1 / std::sqrt(pointwise::squares(x, width) / width + norm_eps_);
    for (int64_t n = 0; n < count(); n++) logits[n] = logits[n] * factor * scale[std::min<int64_t>(n / streams_, 2)] + base[n];
    for (int64_t j = 0; j < streams_; j++) {
      pre[j] = 1 / (1 + std::exp(-logits[j])) + eps_;
      post[j] = 2 / (1 + std::exp(-logits[streams_ + j]));
      softmax(logits + (2 + j) * streams_, comb + j * streams_);
    }
    columns(comb);
    for (int64_t i = 1; i < iterations_; i++) {
      for (int64_t j = 0; j < streams_; j++) row(comb + j * streams_);
      columns(comb);
    }
  }

 private:
  void softmax(const float* from, float* to) const {
    const float highest = *std::max_element(from, from + streams_);
    float total = 0;
    for (int64_t k = 0; k < streams_; k++) total += to[k] = std::exp(from[k] - highest);
    for (int64_t k = 0; k < streams_; k++) to[k] = to[k] / total + eps_;
  }

  void row(float* numbers) const {
    float total = eps_;
    for (int64_t k = 0; k < streams_; k++) total += numbers[k];
    for (int64_t k = 0; k < streams_; k++) numbers[k] /= total;
  }

  void columns(float* comb) const {
    for (int64_t k = 0; k < streams_; k++) {
      float total = eps_;
      for (int64_t j = 0; j < streams_; j++) total += comb[j * streams_ + k];
      for (int64_t j = 0; j < streams_; j++) comb[j * streams_ + k] /= total;
    }
  }

  int64_t streams_, iterations_;
  float eps_, norm_eps_;
};

// to[d] = sum_j shares[j * stride] * from[j * width + d], and `more` of it if there is any, rounded
inline void weighted(const float* shares, int64_t stride, const float* from, int64_t count, int64_t width, Rounding rounding, float* to,
                     const float* more = nullptr, float share = 0) {
  for (int64_t d = 0; d < width; d += kLanes) {
    const int some = static_cast<int>(std::min<int64_t>(kLanes, width - d));
    Floats total = more ? share * load_first(more + d, some) : Floats{};
    for (int64_t j = 0; j < count; j++) total += shares[j * stride] * load_first(from + j * width + d, some);
    store_first(to + d, rounded(total, rounding), some);
  }
}

}  // namespace hyper

// Inputs of both: streams float32 [M, X, D], fn [(2+X)*X, X*D], base [(2+X)*X] and scale [3], float32.
// v4::HyperConnection -> z [M, D], rounded; post [M, X], comb [M, X, X].
// v4::HyperCoefficients -> pre [M, X], post [M, X], comb [M, X, X].
template <bool kCollapses>
class HyperConnection {
 public:
  static constexpr const char* kName = kCollapses ? "HyperConnection" : "HyperCoefficients";
  static constexpr ort::Type kOutputs[] = {ort::kFloat, ort::kFloat, ort::kFloat};

  explicit HyperConnection(const ort::Info* info) : coefficients_(info), rounding_(rounding_of(ort::text(info, "activations"))) {}

  void compute(ort::Context* context) {
    const ort::Shape shape(ort::input(context, 0));
    const int64_t tokens = shape.dims[0], X = shape.dims[1], D = shape.dims[2], width = X * D, count = coefficients_.count();
    if (X != coefficients_.streams() || ort::Shape(ort::input(context, 1)).dims != ort::Dims{count, width})
      throw std::invalid_argument("as many streams, and as wide, as fn is for");
    const float *x = ort::data<float>(context, 0), *base = ort::data<float>(context, 2), *scale = ort::data<float>(context, 3);
    float* first = ort::output<float>(context, 0, {tokens, kCollapses ? D : X});
    float* post = ort::output<float>(context, 1, {tokens, X});
    float* comb = ort::output<float>(context, 2, {tokens, X, X});
    thread_local std::vector<float> projected;
    projected.resize(tokens * count);
    float* logits = projected.data();
    coefficients_.project(context, tokens, width, logits);
    pointwise::each_row(context, tokens, width, [&](int64_t m) {
      thread_local std::vector<float> shares;
      shares.resize(X);
      float* pre = kCollapses ? shares.data() : first + m * X;
      coefficients_.of(logits + m * count, x + m * width, width, base, scale, pre, post + m * X, comb + m * X * X);
      if (kCollapses) hyper::weighted(pre, 1, x + m * width, X, D, rounding_, first + m * D);
    });
  }

 private:
  hyper::Coefficients coefficients_;
  Rounding rounding_;
};

// v4::HyperMix: streams [M, X, D], y [M, D], post [M, X], comb [M, X, X], all float32 -> [M, X, D], rounded.
class HyperMix {
 public:
  static constexpr const char* kName = "HyperMix";
  static constexpr ort::Type kOutputs[] = {ort::kFloat};

  explicit HyperMix(const ort::Info* info) : rounding_(rounding_of(ort::text(info, "activations"))) {}

  void compute(ort::Context* context) {
    const ort::Shape shape(ort::input(context, 0));
    const int64_t tokens = shape.dims[0], X = shape.dims[1], D = shape.dims[2];
    const float *x = ort::data<float>(context, 0), *y = ort::data<float>(context, 1), *post = ort::data<float>(context, 2),
                *comb = ort::data<float>(context, 3);
    float* mixed = ort::output<float>(context, 0, shape.dims);
    pointwise::each_row(context, tokens * X, X * D, [&](int64_t i) {
      const int64_t m = i / X, k = i % X;
      hyper::weighted(comb + m * X * X + k, X, x + m * X * D, X, D, rounding_, mixed + i * D, y + m * D, post[i]);
    });
  }

 private:
  Rounding rounding_;
};
