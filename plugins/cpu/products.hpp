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

constexpr int kRows = 4, kVectors = 6;    // of a tile: 24 sums, and 4 rows' numbers, stay in registers

namespace tiles {

template <class Format, bool kScaled, int R, int C>
inline void step(Floats (&sums)[R][C], const uint8_t* const* rows, const float* const* vectors, int64_t k, const float* scale) {
  Floats x[C];
  for (int c = 0; c < C; c++) x[c] = load(vectors[c] + k);
  for (int r = 0; r < R; r++) {
    Floats w = Format::widen(rows[r] + Format::bytes(k));
    if (kScaled) w *= scale[r];
    for (int c = 0; c < C; c++) sums[r][c] += w * x[c];
  }
}

// The last columns, fewer than a vector has lanes.
template <class Format, bool kScaled, int R, int C>
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
  step<Format, kScaled, R, C>(sums, padded, numbers, 0, scale);
}

// out[c * stride + r] = unit * sum_k row_r[k] vector_c[k]
template <class Format, bool kScaled, int R, int C>
void tile(const Matrix& m, int64_t row, const float* const* vectors, float* out, int64_t stride) {
  Floats sums[R][C] = {};
  const uint8_t* const* rows = m.rows + row;
  const int64_t block = kScaled ? m.block : m.width;
  for (int64_t begin = 0, number = 0; begin < m.width; begin += block, number++) {
    const int64_t end = std::min(begin + block, m.width);
    float scale[R] = {};
    if (kScaled)
      for (int r = 0; r < R; r++) scale[r] = m.multipliers[row + r][number];
    int64_t k = begin;
    for (; k + kLanes <= end; k += kLanes) step<Format, kScaled, R, C>(sums, rows, vectors, k, scale);
    if (k < end) tail<Format, kScaled, R, C>(sums, rows, vectors, k, end, scale);
  }
  for (int c = 0; c < C; c++)
    for (int r = 0; r < R; r++) out[c * stride + r] = Format::kUnit * sum(sums[r][c]);
}

template <class Format, bool kScaled, int R>
void row_of_tiles(const Matrix& m, int64_t row, const float* const* vectors, int64_t count, float* out, int64_t stride) {
  int64_t c = 0;
  for (; c + kVectors <= count; c += kVectors)
    tile<Format, kScaled, R, kVectors>(m, row, vectors + c, out + c * stride, stride);
  switch (count - c) {
    case 5: tile<Format, kScaled, R, 5>(m, row, vectors + c, out + c * stride, stride); break;
    case 4: tile<Format, kScaled, R, 4>(m, row, vectors + c, out + c * stride, stride); break;
    case 3: tile<Format, kScaled, R, 3>(m, row, vectors + c, out + c * stride, stride); break;
    case 2: tile<Format, kScaled, R, 2>(m, row, vectors + c, out + c * stride, stride); break;
    case 1: tile<Format, kScaled, R, 1>(m, row, vectors + c, out + c * stride, stride); break;
    default: break;
  }
}

}  // namespace tiles

// out[c * stride + n] for rows first <= n < last and `count` vectors. Vectors are taken as many at a time as half a second-level
// cache holds, so that they are read from there for every row.
template <class Format, bool kScaled>
void products(const Matrix& m, int64_t first, int64_t last, const float* const* vectors, int64_t count, float* out,
              int64_t stride) {
  const int64_t fit = std::max<int64_t>(kVectors, (int64_t{1} << 17) / m.width / kVectors * kVectors);
  for (int64_t c = 0; c < count; c += fit) {
    const int64_t some = std::min(fit, count - c);
    int64_t n = first;
    for (; n + kRows <= last; n += kRows)
      tiles::row_of_tiles<Format, kScaled, kRows>(m, n, vectors + c, some, out + c * stride + n, stride);
    for (; n < last; n++) tiles::row_of_tiles<Format, kScaled, 1>(m, n, vectors + c, some, out + c * stride + n, stride);
  }
}
