// Dot products of many rows with many vectors. Rows are read once, in the format they lie in, and widened in registers on
// the way; both sides run along what is summed, so that nothing is packed first.
#pragma once

#include <algorithm>
#include <utility>

#include "vectors.hpp"

// Rows [N, K] in a format, with multipliers of their blocks where the format has any.
struct Matrix {
  const uint8_t* const* rows = nullptr;   // of N
  const float* const* multipliers = nullptr;  // of N; each row's, one a block of `block` columns
  int64_t block = 0;                      // columns that share a multiplier
  int64_t width = 0;                      // K
};

constexpr int kRows = 4, kVectors = 6;  // of a tile: 24 sums, and 4 rows' numbers, stay in registers
constexpr int64_t kAhead = 1 << 14;      // bytes

namespace tiles {

template <class Format, int R, int C>
inline void step(Floats (&sums)[R][C], const uint8_t* const* rows, const float* const* vectors, int64_t k, const float* scale) {
  Floats x[C];
  for (int c = 0; c < C; c++) x[c] = load(vectors[c] + k);
  for (int r = 0; r < R; r++) {
    Floats w = Format::widen(rows[r] + Format::bytes(k));
    if (Format::kScaled) w *= scale[r];
    for (int c = 0; c < C; c++) sums[r][c] += w * x[c];
  }
}

// The last columns, fewer than a vector has lanes.
template <class Format, int R, int C>
inline void tail(Floats (&sums)[R][C], const uint8_t* const* rows, const float* const* vectors, int64_t k, int64_t end,
                 const float* scale) {
  const int count = static_cast<int>(end - k);
  uint8_t last[R][kLanes * 4] = {};
  float x[C][kLanes] = {};
  const uint8_t* padded[R];
  const float* numbers[C];
  for (int r = 0; r < R; r++) {
    std::memcpy(last[r], rows[r] + Format::bytes(k), Format::bytes(count));
    padded[r] = last[r];
  }
  for (int c = 0; c < C; c++) {
    std::memcpy(x[c], vectors[c] + k, count * sizeof(float));
    numbers[c] = x[c];
  }
  step<Format, R, C>(sums, padded, numbers, 0, scale);
}

// out[c * stride + r] = unit * sum_k row_r[k] vector_c[k]
template <class Format, int R, int C>
void tile(const Matrix& m, int64_t row, const float* const* vectors, float* out, int64_t stride) {
  Floats sums[R][C] = {};
  const uint8_t* const* rows = m.rows + row;
  // What is read next but a few tiles, where rows lie one behind the other: short rows end before the machine has seen where
  // they go.
  const int64_t next = R > 1 ? (rows[R - 1] - rows[0]) / (R - 1) * R : 0;
  const int64_t ahead = next > 0 ? std::max<int64_t>(kAhead / next, 1) * next : 0;
  const int64_t block = Format::kScaled ? m.block : m.width;
  for (int64_t begin = 0, number = 0; begin < m.width; begin += block, number++) {
    const int64_t end = std::min(begin + block, m.width);
    float scale[R] = {};
    if (Format::kScaled)
      for (int r = 0; r < R; r++) scale[r] = m.multipliers[row + r][number];
    int64_t k = begin;
    for (; k + kLanes <= end; k += kLanes) {
      if (C == 1)
        for (int r = 0; r < R; r++) __builtin_prefetch(rows[r] + Format::bytes(k) + ahead);
      step<Format, R, C>(sums, rows, vectors, k, scale);
    }
    if (k < end) tail<Format, R, C>(sums, rows, vectors, k, end, scale);
  }
  for (int c = 0; c < C; c++)
    for (int r = 0; r < R; r++) out[c * stride + r] = Format::kUnit * sum(sums[r][c]);
}

// The largest tiles first, then what is left over.
template <class Format, int R, int C, int... Less>
void row_of_tiles(const Matrix& m, int64_t row, const float* const* vectors, int64_t count, float* out, int64_t stride) {
  int64_t c = 0;
  for (; c + C <= count; c += C) tile<Format, R, C>(m, row, vectors + c, out + c * stride, stride);
  if constexpr (sizeof...(Less) > 0)
    if (c < count) row_of_tiles<Format, R, Less...>(m, row, vectors + c, count - c, out + c * stride, stride);
}

}  // namespace tiles

// out[c * stride + n] for rows first <= n < last and `count` vectors. Vectors are taken as many at a time as half a second-level
// cache holds, so that they are read from there for every row.
template <class Format>
void products(const Matrix& m, int64_t first, int64_t last, const float* const* vectors, int64_t count, float* out,
              int64_t stride) {
  const int64_t fit = std::max<int64_t>(kVectors, (int64_t{1} << 17) / m.width / kVectors * kVectors);
  for (int64_t c = 0; c < count; c += fit) {
    const int64_t some = std::min(fit, count - c);
    int64_t n = first;
    for (; n + kRows <= last; n += kRows)
      tiles::row_of_tiles<Format, kRows, kVectors, 4, 2, 1>(m, n, vectors + c, some, out + c * stride + n, stride);
    for (; n < last; n++) tiles::row_of_tiles<Format, 1, kVectors, 1>(m, n, vectors + c, some, out + c * stride + n, stride);
  }
}
