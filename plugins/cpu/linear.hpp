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
    Buffers& own = buffers<Buffers>();
    const float* bias = has_bias_ ? numbers(ort::input(context, given), own.bias) : nullptr;
    float* y = ort::output<float>(context, 0, {tokens, form_.rows});
    if (!tokens) return;
    own.each.resize(tokens);
    for (int64_t m = 0; m < tokens; m++) own.each[m] = reinterpret_cast<const float*>(ort::bytes(x)) + m * form_.width;
    Vectors vectors{own.each.data(), tokens};
    if (const int parts = amx::parts(rounding_, tokens)) {
      own.pairs.resize(tokens, form_.width, parts);
      ort::parallel(context, own.pairs.panels(), [&](size_t panel) { amx::pack(own.pairs, vectors.each, form_.width, panel); });
      vectors.pairs = &own.pairs;
    }
    const int64_t rows = share(form_.rows, form_.width, vectors);
    ort::parallel(context, (form_.rows + rows - 1) / rows, [&](size_t task) {
      const int64_t first = task * rows;
      const int64_t last = std::min(first + rows, form_.rows);
      multiply(w, first, last, vectors, y, form_.rows);
      if (has_bias_ || rounding_ != Rounding::kNone)
        for (int64_t m = 0; m < tokens; m++) finish(y + m * form_.rows, first, last, bias);
    });
  }

 private:
  struct Buffers {
    std::vector<const float*> each;
    std::vector<float> bias;
    amx::Pairs pairs;
  };

  void finish(float* y, int64_t first, int64_t last, const float* bias) const {
    for (int64_t n = first; n < last; n += kLanes) {
      const int some = static_cast<int>(std::min<int64_t>(kLanes, last - n));
      Floats value = load_first(y + n, some);
      if (bias) value += load_first(bias + n, some);
      store_first(y + n, rounded(value, rounding_), some);
    }
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
    const bool tiles = amx::parts(rounding_, tokens) == 1;
    ort::parallel(context, heads, [&](size_t head) {
      const int64_t stride = amx::whole(out, amx::kSide);
      thread_local std::vector<float> z;
      z.assign(amx::whole(tokens, amx::kSide) * stride, 0);
      const int64_t first = head * each_ + first_;
      thread_local std::vector<const float*> vectors;
      vectors.resize(tokens);
      for (int64_t m = 0; m < tokens; m++) vectors[m] = from + (m * heads + head) * in;
      if (transposed_) {
        (tiles ? add_tiles : add)(w, first, count_, vectors, z.data(), stride);
      } else {
        thread_local amx::Pairs pairs;
        if (tiles) amx::pack(pairs, vectors, in);
        multiply(w, first, first + count_, {vectors.data(), tokens, tiles ? &pairs : nullptr}, z.data() - first, stride);
      }
      for (int64_t m = 0; m < tokens; m++)
        for (int64_t n = 0; n < out; n += kLanes)
          store_first(y + (m * heads + head) * out + n, rounded(load(z.data() + m * stride + n), rounding_),
                      static_cast<int>(std::min<int64_t>(kLanes, out - n)));
    });
  }

 private:
  // z[m] += sum over `count` rows of x[m][r] * row_r, by columns that share multipliers.
  static void add(const Stored& w, int64_t first, int64_t count, const std::vector<const float*>& x, float* z, int64_t stride) {
    const int64_t tokens = x.size();
    with_format(w.format, [&](auto format) {
      using F = decltype(format);
      const int64_t block = F::kScaled ? w.block() : w.form.width, blocks = F::kScaled ? w.blocks() : 1;
      thread_local std::vector<float> p, multipliers;
      p.resize(tokens * kTile);
      multipliers.assign(blocks * kTile, 1);
      const uint8_t* rows[kTile];
      for (int64_t begin = 0; begin < count; begin += kTile) {
        const int64_t some = std::min<int64_t>(kTile, count - begin);
        for (int64_t r = 0; r < some; r++) {
          const int64_t n = first + begin + r;
          rows[r] = w.data + n * F::bytes(w.form.width);
          if (F::kScaled) w.multipliers(n / w.form.block_rows * blocks, multipliers.data() + r * blocks, blocks);
        }
        for (int64_t b = 0; b < blocks; b++) {
          for (int64_t m = 0; m < tokens; m++)
            for (int64_t r = 0; r < some; r++) p[m * kTile + r] = x[m][begin + r] * multipliers[r * blocks + b] * F::kUnit;
          add_columns<F>(rows, some, b * block, std::min((b + 1) * block, w.form.width), p.data(), z, stride, tokens);
        }
      }
    });
  }

  // The same by tiles.
  static void add_tiles(const Stored& w, int64_t first, int64_t count, const std::vector<const float*>& x, float* z,
                        int64_t stride) {
    thread_local amx::Lines rows, lines;
    thread_local amx::Pairs pairs;
    lines.resize(amx::whole(x.size(), amx::kSide), count);
    for (size_t m = 0; m < x.size(); m++) amx::narrow(x[m], count, lines[m], lines.depth);
    rows.resize(count, w.form.width);
    with_rows(w, first, first + count, [&](auto format, const Matrix& m) {
      for (int64_t r = 0; r < count; r++) amx::widen<decltype(format)>(m, r, rows[r], rows.depth);
    });
    amx::across(pairs, rows, count, w.form.width);
    const amx::Tiles tiles;
    amx::add(lines, x.size(), pairs, z, stride);
  }

  Form form_;
  int64_t each_, first_, count_;
  bool transposed_;
  Rounding rounding_;
};
