// Scores of a warp's KEYS keys for QUERIES queries of one sequence: scale * sum over heads of w relu(q . key).
//
// Keys are columns of B, eight a tile, and stay in registers while the queries' heads pass as rows of A. Columns of the
// scores are numbers of keys: those before `held` stand in the cache, those from it on are new.
#pragma once
#include "../kernels/mma.cuh"

#define KEYS (8 * TILES)
#define CHUNKS ((DIM_I + 31) / 32)
#define SHARE (16 / TILES)  // of lanes; a key's share ends with the same sum in each
#define WHOLE (DIM_I % 8 == 0)

// The sums of the warp's keys, each lane having that of key lane / SHARE * 4 + lane % 4.
__device__ __forceinline__ float key_scores(const Chunk<TYPE_T> (&keys)[TILES][CHUNKS], const TYPE_T* q, const float* w) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  float sum[2 * TILES] = {};
#pragma unroll 1
  for (int h = g; h < DIM_H + g; h += 16) {
    const bool one = DIM_H % 16 == 0 || h < DIM_H, two = DIM_H % 16 == 0 || h + 8 < DIM_H;
    float c[TILES][4] = {};
#pragma unroll
    for (int i = 0; i < CHUNKS; ++i) {
      const Chunk<TYPE_T> low = chunk_at<WHOLE>(q + h * DIM_I, 32 * i + 8 * t, one ? DIM_I : 0);
      const Chunk<TYPE_T> high = chunk_at<WHOLE>(q + (h + 8) * DIM_I, 32 * i + 8 * t, two ? DIM_I : 0);
#pragma unroll
      for (int tile = 0; tile < TILES; ++tile) mma(c[tile], low, high, keys[tile][i]);
    }
    const float w_low = one ? w[h] : 0.0f, w_high = two ? w[h + 8] : 0.0f;
#pragma unroll
    for (int i = 0; i < 2 * TILES; ++i)
      sum[i] += w_low * fmaxf(c[i / 2][i % 2], 0.0f) + w_high * fmaxf(c[i / 2][2 + i % 2], 0.0f);
  }
  // Lanes of equal t add what they have, and halve it between them while there is more than one sum.
#pragma unroll
  for (int mask = 16, half = TILES; mask >= 4; mask /= 2, half /= 2) {
    if (half == 0) sum[0] += shuffle_xor(sum[0], mask);
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const bool upper = lane & mask;
      const float given = shuffle_xor(upper ? sum[i] : sum[half + i], mask);
      sum[i] = (upper ? sum[half + i] : sum[i]) + given;
    }
  }
  return sum[0];
}

// A block's part of the scores [M, N]. With BLOCK_SIZE, only keys n whose bit n / BLOCK_SIZE is set in the query's W words of marks
// are scored; all others get the lowest float.
template <int BLOCK_SIZE>
__device__ __forceinline__ void score_keys(const TYPE_T* q, const float* weights, const TYPE_T* fresh, const TYPE_T* cache,
                                           const unsigned* marks, const long long* position, int S, int U, int C, int W,
                                           float* scores) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, b = blockIdx.y, N = C + U;
  const int first = (blockIdx.x * (THREADS / 32) + threadIdx.x / 32) * KEYS;
  if (first >= N) return;
  const int past = (int)position[b], held = past / RATIO, key = first + lane / SHARE * 4 + t;
  const bool there = key < held ? key < C : key - held < U;
  auto sees = [&](int s) {
    if (!there || key >= (past + s + 1) / RATIO) return false;
    if (BLOCK_SIZE == 0) return true;
    const int block = key / most(BLOCK_SIZE, 1);
    return (marks[((long long)b * S + s) * W + block / 32] >> block % 32 & 1u) != 0;
  };
  const int start = blockIdx.z * QUERIES, end = least(S, start + QUERIES);
  unsigned wanted = 0;  // by lanes; what no query sees is not read
  for (int s = start; s < end; ++s) wanted |= __ballot_sync(0xffffffffu, sees(s));
  Chunk<TYPE_T> keys[TILES][CHUNKS];
#pragma unroll
  for (int tile = 0; tile < TILES; ++tile) {
    const int index = 2 * tile + g % 2, n = first + 4 * index + g / 2;
    const bool read = wanted >> (SHARE * index + g / 2) & 1u;
    const TYPE_T* row = n < held ? cache + ((long long)b * C + n) * DIM_I : fresh + ((long long)b * U + n - held) * DIM_I;
#pragma unroll
    for (int i = 0; i < CHUNKS; ++i) keys[tile][i] = chunk_at<WHOLE>(row, 32 * i + 8 * t, read ? DIM_I : 0);
  }
  for (int s = start; s < end; ++s) {
    const long long m = (long long)b * S + s;
    const bool seen = sees(s);
    float score = 0;
    if (__ballot_sync(0xffffffffu, seen)) score = key_scores(keys, q + m * DIM_H * DIM_I, weights + m * DIM_H);
    if (key < N) scores[m * N + key] = seen ? score * SCALE : LOWEST_FLOAT;
  }
}
