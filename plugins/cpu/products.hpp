// Dot products of many rows with many vectors. Rows are read once, in the format they lie in, and widened in registers on
// the way; both sides run along what is summed, so that nothing is packed first.
#pragma once

#include <algorithm>
#include <type_traits>
#include <utility>
#include <vector>

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

// Columns whose prefetching goes ahead of them; of many sums, which are put aside meanwhile, more.
template <int C>
constexpr int64_t kStretch = C == 1 ? 32 : 128;

namespace tiles {

// Few vectors leave registers for sums of a block, so that these are multiplied and not each number.
template <class Format, int C>
constexpr bool kLate = Format::kScaled && C <= 2;

// Rows of a tile, each with multipliers of its blocks where the format has any.
template <int R>
struct Rows {
  const uint8_t* rows[R];
  const float* multipliers[R];
};

// Of the numbers from byte `at` of each row on, in block `number`, and from place k of each vector.
template <class Format, int R, int C>
inline void step(Floats (&sums)[R][C], const Rows<R>& tile, int64_t at, const float* const* vectors, int64_t k, int64_t number) {
  constexpr int kStep = Format::kStep;
  Floats x[C][kStep];
  for (int c = 0; c < C; c++)
    for (int v = 0; v < kStep; v++) x[c][v] = load(vectors[c] + k + v * kLanes);
  for (int r = 0; r < R; r++) {
    Floats w[kStep];
    widen<Format>(tile.rows[r] + at, w);
    for (int v = 0; v < kStep; v++) {
      if (Format::kScaled && !kLate<Format, C>) w[v] *= tile.multipliers[r][number];
      for (int c = 0; c < C; c++) sums[r][c] += w[v] * x[c][v];
    }
  }
}

// The last columns, fewer than a step takes.
template <class Format, int R, int C>
inline void tail(Floats (&sums)[R][C], const Rows<R>& tile, const float* const* vectors, int64_t k, int64_t count, int64_t number) {
  uint8_t last[R][kLanes * 4] = {};
  float x[C][kLanes * Format::kStep] = {};
  const float* numbers[C];
  Rows<R> padded = tile;
  for (int r = 0; r < R; r++) {
    std::memcpy(last[r], tile.rows[r] + Format::bytes(k), Format::bytes(count));
    padded.rows[r] = last[r];
  }
  for (int c = 0; c < C; c++) {
    // Those that are apart have zeros behind them.
    std::memcpy(x[c], vectors[c] + k, Format::kApart ? sizeof x[c] : count * sizeof(float));
    numbers[c] = x[c];
  }
  step<Format, R, C>(sums, padded, 0, numbers, 0, number);
}

// out[c * stride + r] = unit * sum_k row_r[k] vector_c[k] for C of `count` vectors, from number `begin` on
template <class Format, int R, int C>
void tile(const Matrix& m, int64_t row, const float* const* vectors, int64_t begin, int64_t count, float* out, int64_t stride) {
  constexpr int kWidth = kLanes * Format::kStep;
  constexpr int64_t kBytes = Format::bytes(kWidth);
  Floats sums[R][C] = {};
  vectors += begin;
  out += begin * stride;
  Rows<R> tile{};
  for (int r = 0; r < R; r++) {
    tile.rows[r] = m.rows[row + r];
    if (Format::kScaled) tile.multipliers[r] = m.multipliers[row + r];
  }
  // What is read next but a few tiles, where rows lie one behind the other: short rows end before the machine has seen where
  // they go.
  const int64_t next = R > 1 ? (tile.rows[R - 1] - tile.rows[0]) / (R - 1) * R : 0;
  const int64_t ahead = next > 0 ? std::max<int64_t>(kAhead / next, 1) * next : 0;
  const int64_t block = Format::kScaled ? m.block : kStretch<C>;
  int64_t k = 0, at = 0, number = 0;
  // Each tile of these rows fetches its share.
  const int64_t share = Format::bytes(m.width) * begin / count;
  int64_t fetched = share / 64 * 64;
  const auto prefetch = [&](int64_t bytes) {
    for (const int64_t end = share + (at + bytes) * C / count; ahead && fetched < end; fetched += 64)
      for (int r = 0; r < R; r++) __builtin_prefetch(tile.rows[r] + ahead + fetched);
  };
  const auto multiply = [&](const Floats (&parts)[R][C]) {
    for (int r = 0; r < R; r++)
      for (int c = 0; c < C; c++) sums[r][c] += parts[r][c] * tile.multipliers[r][number];
  };
  if (block % kWidth == 0)
    for (; k + block <= m.width; number++) {
      Floats parts[R][C] = {};
      auto& to = kLate<Format, C> ? parts : sums;
      prefetch(block / kWidth * kBytes);
      for (const int64_t end = k + block; k < end; k += kWidth, at += kBytes) step<Format, R, C>(to, tile, at, vectors, k, number);
      if (kLate<Format, C>) multiply(parts);
    }
  for (; k < m.width; number++) {
    Floats parts[R][C] = {};
    auto& to = kLate<Format, C> ? parts : sums;
    const int64_t end = std::min(k + block, m.width);
    at = Format::bytes(k);
    prefetch(Format::bytes(end - k));
    for (; k + kWidth <= end; k += kWidth, at += kBytes) step<Format, R, C>(to, tile, at, vectors, k, number);
    if (k < end) tail<Format, R, C>(to, tile, vectors, k, end - k, number);
    k = end;
    if (kLate<Format, C>) multiply(parts);
  }
  for (int c = 0; c < C; c++)
    if constexpr (R == 4) {
      const Four four = Format::kUnit * sums_of(sums[0][c], sums[1][c], sums[2][c], sums[3][c]);
      std::memcpy(out + c * stride, &four, sizeof four);
    } else {
      for (int r = 0; r < R; r++) out[c * stride + r] = Format::kUnit * sum(sums[r][c]);
    }
}

// All vectors from number `begin` on: the largest tiles first, then what is left over.
template <class Format, int R, int C, int... Less>
void row_of_tiles(const Matrix& m, int64_t row, const float* const* vectors, int64_t begin, int64_t count, float* out,
                  int64_t stride) {
  for (; begin + C <= count; begin += C) tile<Format, R, C>(m, row, vectors, begin, count, out, stride);
  if constexpr (sizeof...(Less) > 0)
    if (begin < count) row_of_tiles<Format, R, Less...>(m, row, vectors, begin, count, out, stride);
}

// The even lanes of two vectors, and the odd ones.
inline void part(Floats (&two)[2]) {
#if defined(__AVX512F__)
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512 a = (__m512)two[0], b = (__m512)two[1];
  two[0] = (Floats)_mm512_permutex2var_ps(a, even, b);
  two[1] = (Floats)_mm512_permutex2var_ps(a, _mm512_add_epi32(even, _mm512_set1_epi32(1)), b);
#else
  float mixed[2 * kLanes];
  std::memcpy(mixed, two, sizeof mixed);
  for (int lane = 0; lane < 2 * kLanes; lane++) two[lane % 2][lane / 2] = mixed[lane];
#endif
}

// Vectors with even and odd places of every two of the machine's apart, and zeros behind them. They are a thread's until the next.
inline const float* const* apart(const float* const* vectors, int64_t count, int64_t width) {
  thread_local std::vector<float> numbers;
  thread_local std::vector<const float*> found;
  const int64_t whole = (width + 2 * kLanes - 1) / (2 * kLanes) * 2 * kLanes;
  numbers.resize(count * whole);
  found.resize(count);
  for (int64_t c = 0; c < count; c++) {
    float* own = numbers.data() + c * whole;
    found[c] = own;
    for (int64_t k = 0; k < width; k += 2 * kLanes) {
      Floats two[2];
      for (int half = 0; half < 2; half++)
        two[half] = load_first(vectors[c] + k + half * kLanes, static_cast<int>(std::clamp<int64_t>(width - k - half * kLanes, 0, kLanes)));
      part(two);
      std::memcpy(own + k, two, sizeof two);
    }
  }
  return found.data();
}

}  // namespace tiles

// out[c * stride + n] for rows first <= n < last and `count` vectors. Vectors are taken as many at a time as half a second-level
// cache holds, so that they are read from there for every row.
template <class Format>
void products(const Matrix& m, int64_t first, int64_t last, const float* const* vectors, int64_t count, float* out,
              int64_t stride) {
  if constexpr (std::is_same_v<Format, E2M1>)
    if (m.block % (2 * kLanes) == 0)
      return products<E2M1Pairs>(m, first, last, tiles::apart(vectors, count, m.width), count, out, stride);
  const int64_t fit = std::max<int64_t>(kVectors, (int64_t{1} << 17) / m.width / kVectors * kVectors);
  for (int64_t c = 0; c < count; c += fit) {
    const int64_t some = std::min(fit, count - c);
    int64_t n = first;
    for (; n + kRows <= last; n += kRows)
      tiles::row_of_tiles<Format, kRows, kVectors, 4, 2, 1>(m, n, vectors + c, 0, some, out + c * stride + n, stride);
    for (; n < last; n++) tiles::row_of_tiles<Format, 1, kVectors, 1>(m, n, vectors + c, 0, some, out + c * stride + n, stride);
  }
}
