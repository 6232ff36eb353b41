// v4::Linear: x [M, K] float32, weight [N, K], its multipliers and theirs where there are any, bias [N] if there is one
// -> [M, N] float32, rounded where the portable node's is.
#pragma once

#include "stored.hpp"
#include "sums.hpp"

class Linear {
 public:
  static constexpr const char* kName = "Linear";
  static constexpr ort::Type kOutputs[] = {ort::kFloat};

  explicit Linear(const ort::Info* info)
      : form_(info), has_bias_(ort::attribute(info, "bias")), rounding_(rounding_of(ort::text(info, "activations"))) {}

  void compute(ort::Context* context) {
    const size_t given = ort::inputs(context) - has_bias_;
    const ort::Value* x = ort::input(context, 0);
    const int64_t tokens = ort::Shape(x).dims[0];
    const Stored w(form_, context, given);
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

// v4::HeadLinear: x [M, H, K] float32 and a weight of which rows first .. first + count - 1 of every `each` are a head's.
// y [M, H, count] = row . x, K being the rows' width; or, transposed, y [M, H, width] = sum of x_r row_r, K being `count`.
class HeadLinear {
 public:
  static constexpr const char* kName = "HeadLinear";
  static constexpr ort::Type kOutputs[] = {ort::kFloat};

  explicit HeadLinear(const ort::Info* info)
      : form_(info), each_(ort::attribute(info, "each")), first_(ort::attribute(info, "first")),
        count_(ort::attribute(info, "count")),
        transposed_(ort::attribute(info, "transposed")), rounding_(rounding_of(ort::text(info, "activations"))) {}

  void compute(ort::Context* context) {
    const ort::Value* x = ort::input(context, 0);
    const int64_t tokens = ort::Shape(x).dims[0], heads = form_.rows / each_;
    const Stored w(form_, context, ort::inputs(context));
    const int64_t in = transposed_ ? count_ : form_.width, out = transposed_ ? form_.width : count_;
    float* y = ort::output<float>(context, 0, {tokens, heads, out});
    if (!tokens) return;
    const float* from = reinterpret_cast<const float*>(ort::bytes(x));
    ort::parallel(context, heads, [&](size_t head) {
      const int64_t stride = (out + kLanes - 1) / kLanes * kLanes;
      thread_local std::vector<float> z;
      z.assign(tokens * stride, 0);
      const int64_t first = head * each_ + first_;
      if (transposed_) {
        add(w, first, from + head * in, heads * in, tokens, z.data(), stride);
      } else {
        thread_local std::vector<const float*> vectors;
        vectors.resize(tokens);
        for (int64_t m = 0; m < tokens; m++) vectors[m] = from + (m * heads + head) * in;
        multiply(w, first, first + count_, vectors.data(), tokens, z.data() - first, stride);
      }
      for (int64_t m = 0; m < tokens; m++)
        for (int64_t n = 0; n < out; n += kLanes)
          store_first(y + (m * heads + head) * out + n, rounded(load(z.data() + m * stride + n), rounding_),
                      static_cast<int>(std::min<int64_t>(kLanes, out - n)));
    });
  }

 private:
  // z[m] += sum over the head's rows of x[m][r] * row_r, by columns that share multipliers.
  void add(const Stored& w, int64_t first, const float* x, int64_t apart, int64_t tokens, float* z, int64_t stride) const {
    with_format(w.format, [&](auto format) {
      using F = decltype(format);
      const int64_t block = F::kScaled ? w.block() : w.form.width, blocks = (w.form.width + block - 1) / block;
      std::vector<float> p(tokens * kTile), multipliers(blocks * kTile, 1);
      const uint8_t* rows[kTile];
      for (int64_t begin = 0; begin < count_; begin += kTile) {
        const int64_t some = std::min<int64_t>(kTile, count_ - begin);
        for (int64_t r = 0; r < some; r++) {
          const int64_t n = first + begin + r;
          rows[r] = w.data + n * F::bytes(w.form.width);
          if (F::kScaled) w.multipliers(n / w.form.block_rows, multipliers.data() + r * blocks, blocks);
        }
        for (int64_t b = 0; b < blocks; b++) {
          for (int64_t m = 0; m < tokens; m++)
            for (int64_t r = 0; r < some; r++)
              p[m * kTile + r] = x[m * apart + begin + r] * multipliers[r * blocks + b] * F::kUnit;
          add_columns<F>(rows, some, b * block, std::min((b + 1) * block, w.form.width), p.data(), z, stride, tokens);
        }
      }
    });
  }

  Form form_;
  int64_t each_, first_, count_;
  bool transposed_;
  Rounding rounding_;
};
