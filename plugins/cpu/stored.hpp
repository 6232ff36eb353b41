// Weights as they lie in a checkpoint's file.
#pragma once

#include <stdexcept>
#include <string>
#include <vector>

#include "amx.hpp"
#include "buffers.hpp"
#include "onnxruntime.hpp"

enum class Format { kFloat32, kBfloat16, kFloat16, kE4M3, kE2M1 };

inline Format format_of(ort::Type type) {
  switch (type) {
    case ort::kFloat: return Format::kFloat32;
    case ort::kBfloat16: return Format::kBfloat16;
    case ort::kFloat16: return Format::kFloat16;
    case ort::kFloat8E4M3FN: return Format::kE4M3;
    default: return Format::kE2M1;  // whose bytes are declared as such
  }
}

// Of numbers that have no multipliers.
template <class Action>
auto with_plain(Format format, const Action& action) {
  switch (format) {
    case Format::kFloat32: return action(Float32{});
    case Format::kBfloat16: return action(Bfloat16{});
    case Format::kFloat16: return action(Float16{});
    default: throw std::invalid_argument("numbers of eight or four bits need multipliers");
  }
}

template <class Action>
auto with_format(Format format, const Action& action) {
  switch (format) {
    case Format::kE4M3: return action(E4M3{});
    case Format::kE2M1: return action(E2M1{});
    default: return with_plain(format, action);
  }
}

// Sizes that matrices of a node have in common.
struct Form {
  int64_t rows, width;                // N, K
  int64_t block_rows, block_columns;  // that share a multiplier; of all columns, where 0

  explicit Form(const ort::Info* info)
      : rows(ort::attribute(info, "out")), width(ort::attribute(info, "width")), block_rows(ort::attribute(info, "rows")),
        block_columns(ort::attribute(info, "columns")) {}

  Form transposed() const {
    Form other = *this;
    std::swap(other.rows, other.width);
    return other;
  }
};

// A matrix [N, K].
struct Stored {
  Form form;
  Format format;
  const uint8_t* data;
  const uint8_t* scale = nullptr;  // [N / block_rows, K / block_columns], rounded up
  ort::Type scale_type = ort::kUndefined;
  float outer = 1;                 // multiplier of the multipliers

  Stored(const Form& form, const ort::Value* weight, const ort::Value* scale = nullptr, const ort::Value* outer = nullptr)
      : form(form), format(format_of(ort::Shape(weight).type)), data(ort::bytes(weight)) {
    if (!scale) return;
    this->scale = ort::bytes(scale);
    scale_type = ort::Shape(scale).type;
    if (outer) this->outer = read<float>(ort::bytes(outer));
  }

  // Of a node's inputs: x, the weight, and what there are of its multipliers and theirs, the last being number given - 1.
  Stored(const Form& form, const ort::Context* context, size_t given)
      : Stored(form, ort::input(context, 1), given > 2 ? ort::input(context, 2) : nullptr,
               given > 3 ? ort::input(context, 3) : nullptr) {}

  int64_t block() const { return form.block_columns ? form.block_columns : form.width; }

  // Blocks of a row.
  int64_t blocks() const { return (form.width + block() - 1) / block(); }

  // Multipliers of blocks, row by row, from number `at` on.
  void multipliers(int64_t at, float* to, int64_t count) const {
    switch (scale_type) {
      case ort::kFloat: return each(to, count, [&](int64_t i) { return read<float>(scale + 4 * (at + i)); });
      case ort::kBfloat16:
        return each(to, count, [&](int64_t i) { return as<float>(uint32_t{read<uint16_t>(scale + 2 * (at + i))} << 16); });
      case ort::kUint8:  // E8M0: an exponent; of zero, half the least normal number
        return each(to, count, [&](int64_t i) { return as<float>(std::max(uint32_t{scale[at + i]} << 23, uint32_t{1} << 22)); });
      default:  // E4M3
        return each(to, count, [&](int64_t i) {
          const uint32_t bits = scale[at + i];
          return as<float>((bits & 0x7f) << 20 | (bits & 0x80) << 24) * 0x1p120f;
        });
    }
  }

 private:
  // A loop of its own for each type, which takes many at a time.
  template <class Number>
  void each(float* to, int64_t count, const Number& number) const {
    for (int64_t i = 0; i < count; i++) to[i] = number(i) * outer;
  }
};

// action(format, rows first <= n < last as a Matrix)
template <class Action>
void with_rows(const Stored& w, int64_t first, int64_t last, const Action& action) {
  thread_local std::vector<const uint8_t*> rows;
  thread_local std::vector<const float*> multipliers;
  thread_local std::vector<float> grid;
  Matrix m;
  m.width = w.form.width;
  rows.resize(last - first);
  with_format(w.format, [&](auto format) {
    using F = decltype(format);
    for (int64_t n = first; n < last; n++) rows[n - first] = w.data + n * F::bytes(m.width);
    m.rows = rows.data();
    if constexpr (F::kScaled) {
      if (!w.scale) throw std::invalid_argument("a matrix of eight or four bits has no multipliers");
      m.block = w.block();
      const int64_t blocks = w.blocks(), from = first / w.form.block_rows;
      const int64_t lines = (last - 1) / w.form.block_rows + 1 - from;
      grid.resize(lines * blocks);
      multipliers.resize(last - first);
      w.multipliers(from * blocks, grid.data(), lines * blocks);
      for (int64_t line = 0, n = first; line < lines; line++)
        for (; n < std::min((from + line + 1) * w.form.block_rows, last); n++) multipliers[n - first] = grid.data() + line * blocks;
      m.multipliers = multipliers.data();
    }
    action(format, m);
  });
}

// What matrices are multiplied by: vectors, and the same as pairs where AMX takes those.
struct Vectors {
  const float* const* each;
  int64_t count;
  const amx::Pairs* pairs = nullptr;
};

// out[c * stride + n] = row_n . vector_c for rows first <= n < last
inline void multiply(const Stored& w, int64_t first, int64_t last, const Vectors& vectors, float* out, int64_t stride) {
  with_rows(w, first, last, [&](auto format, const Matrix& m) {
    using F = decltype(format);
    if (vectors.pairs) return amx::products<F>(m, 0, last - first, *vectors.pairs, out + first, stride);
    products<F>(m, 0, last - first, vectors.each, vectors.count, out + first, stride);
  });
}

// How many rows a task takes: as many as are worth starting one, which is a few microseconds' work, so that threads end together.
inline int64_t share(int64_t rows, int64_t width, const Vectors& vectors) {
  const int64_t worth = (int64_t{1} << 16) / std::max<int64_t>(1, width * vectors.count);
  const int64_t least = vectors.pairs ? amx::kTogether : vectors.count == 1 ? kRows : amx::kBlock;
  return std::clamp<int64_t>(amx::whole(worth, kRows), least, amx::whole(rows, least));
}

// Numbers of a vector of any plain format: where they are, or widened into `to`.
inline const float* numbers(const ort::Value* vector, std::vector<float>& to) {
  const ort::Shape shape(vector);
  if (shape.type == ort::kFloat) return reinterpret_cast<const float*>(ort::bytes(vector));
  const int64_t count = shape.dims.size() ? shape.dims.back() : 1;
  to.resize(count);
  with_plain(format_of(shape.type), [&](auto format) {
    using F = decltype(format);
    for (int64_t i = 0; i < count; i += kLanes) {
      const int64_t some = std::min<int64_t>(kLanes, count - i);
      uint8_t padded[kLanes * 4] = {};
      std::memcpy(padded, ort::bytes(vector) + F::bytes(i), F::bytes(some));
      store_first(to.data() + i, F::widen(padded), static_cast<int>(some));
    }
  });
  return to.data();
}

inline Rounding rounding_of(const std::string& name) {
  return name == "bfloat16" ? Rounding::kBfloat16 : name == "float16" ? Rounding::kFloat16 : Rounding::kNone;
}
