// Weights as they lie in a checkpoint's file.
#pragma once

#include <stdexcept>
#include <string>
#include <vector>

#include "onnxruntime.hpp"
#include "products.hpp"

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

  // Multipliers of a row of blocks, one for each of them.
  void multipliers(int64_t row_of_blocks, float* to, int64_t count) const {
    const int64_t at = row_of_blocks * count;
    for (int64_t i = 0; i < count; i++) to[i] = multiplier(at + i) * outer;
  }

  float multiplier(int64_t at) const {
    switch (scale_type) {
      case ort::kFloat: return read<float>(scale + 4 * at);
      case ort::kBfloat16: return as<float>(uint32_t{read<uint16_t>(scale + 2 * at)} << 16);
      case ort::kUint8: return scale[at] ? as<float>(uint32_t{scale[at]} << 23) : 0x1p-127f;  // E8M0: an exponent
      default: {                                                                              // E4M3
        const int exponent = scale[at] >> 3 & 15, mantissa = scale[at] & 7;
        const float magnitude = exponent ? as<float>((exponent + 120u) << 23 | unsigned(mantissa) << 20) : mantissa * 0x1p-9f;
        return scale[at] & 0x80 ? -magnitude : magnitude;
      }
    }
  }
};

// out[c * stride + n] = row_n . vector_c for rows first <= n < last
inline void multiply(const Stored& w, int64_t first, int64_t last, const float* const* vectors, int64_t count, float* out,
                     int64_t stride) {
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
    if constexpr (!F::kScaled) return products<F>(m, 0, last - first, vectors, count, out + first, stride);
    if (!w.scale) throw std::invalid_argument("a matrix of eight or four bits has no multipliers");
    m.block = w.block();
    const int64_t blocks = (m.width + m.block - 1) / m.block, from = first / w.form.block_rows;
    const int64_t lines = (last - 1) / w.form.block_rows + 1 - from;
    grid.resize(lines * blocks);
    multipliers.resize(last - first);
    for (int64_t line = 0; line < lines; line++) w.multipliers(from + line, grid.data() + line * blocks, blocks);
    for (int64_t n = first; n < last; n++) multipliers[n - first] = grid.data() + (n / w.form.block_rows - from) * blocks;
    m.multipliers = multipliers.data();
    products<F>(m, 0, last - first, vectors, count, out + first, stride);
  });
}

// How many rows a task takes: as many as make a task worth starting, in whole tiles.
inline int64_t share(int64_t rows, int64_t width, int64_t vectors) {
  const int64_t worth = (int64_t{1} << 17) / std::max<int64_t>(1, width * std::min<int64_t>(vectors, 16) / 4);
  return std::clamp<int64_t>(worth / kRows * kRows, kRows, (rows + kRows - 1) / kRows * kRows);
}

inline Rounding rounding_of(const std::string& name) {
  return name == "bfloat16" ? Rounding::kBfloat16 : name == "float16" ? Rounding::kFloat16 : Rounding::kNone;
}
