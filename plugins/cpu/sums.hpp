// Weighted sums of rows, many at once, over rows that are widened in registers.
#pragma once

#include "products.hpp"

constexpr int kTile = 64;         // rows at a time: they stay in a cache from one use to the next
constexpr int64_t kAheadRows = 12;  // of what is read

namespace sums {

// z[h] += sum over rows of p[h][row] * row, H heads and V vectors of columns at a time
template <class F, int H, int V>
void add_values(const uint8_t* const* rows, int64_t count, int64_t column, const float* p, float* z, int64_t stride) {
  Floats sums[H][V];
  for (int h = 0; h < H; h++)
    for (int v = 0; v < V; v++) sums[h][v] = load(z + h * stride + v * kLanes);
  for (int64_t t = 0; t < count; t++) {
    if (H == 1)  // there is not enough to do for the next rows to arrive meanwhile
      for (int64_t i = 0; i < F::bytes(V * kLanes); i += 64) __builtin_prefetch(rows[std::min(t + kAheadRows, count - 1)] + F::bytes(column) + i);
    Floats row[V];
    for (int v = 0; v < V; v++) row[v] = F::widen(rows[t] + F::bytes(column + v * kLanes));
    for (int h = 0; h < H; h++)
      for (int v = 0; v < V; v++) sums[h][v] += p[h * kTile + t] * row[v];
  }
  for (int h = 0; h < H; h++)
    for (int v = 0; v < V; v++) store(z + h * stride + v * kLanes, sums[h][v]);
}

template <class F, int V>
void add_vectors(const uint8_t* const* rows, int64_t count, int64_t column, const float* p, float* z, int64_t stride,
                 int64_t heads) {
  int64_t h = 0;
  for (; h + 6 <= heads; h += 6) add_values<F, 6, V>(rows, count, column, p + h * kTile, z + h * stride, stride);
  for (; h + 2 <= heads; h += 2) add_values<F, 2, V>(rows, count, column, p + h * kTile, z + h * stride, stride);
  for (; h < heads; h++) add_values<F, 1, V>(rows, count, column, p + h * kTile, z + h * stride, stride);
}

}  // namespace sums

// Adds to z[h][begin .. end - 1] the sum over at most a tile of rows of p[h * kTile + row] * row; z's rows are `stride` apart,
// and its columns go on to the next whole vector.
template <class F>
void add_columns(const uint8_t* const* rows, int64_t count, int64_t begin, int64_t end, const float* p, float* z,
                 int64_t stride, int64_t heads) {
  int64_t v = begin;
  for (; heads == 1 && v + 8 * kLanes <= end; v += 8 * kLanes) sums::add_values<F, 1, 8>(rows, count, v, p, z + v, stride);
  for (; v + 4 * kLanes <= end; v += 4 * kLanes) sums::add_vectors<F, 4>(rows, count, v, p, z + v, stride, heads);
  for (; v + kLanes <= end; v += kLanes) sums::add_vectors<F, 1>(rows, count, v, p, z + v, stride, heads);
  if (v == end) return;
  // The last columns, fewer than a vector has lanes, behind which there may be nothing to read.
  uint8_t last[kTile][kLanes * 4] = {};
  const uint8_t* padded[kTile];
  for (int64_t t = 0; t < count; t++) {
    std::memcpy(last[t], rows[t] + F::bytes(v), F::bytes(end - v));
    padded[t] = last[t];
  }
  sums::add_vectors<F, 1>(padded, count, 0, p, z + v, stride, heads);
}
