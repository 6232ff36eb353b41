// From partial sums of a token, the shares of its streams and Sinkhorn's matrix, by a block.
#pragma once
#include "../kernels/v4.cuh"

#define ROWS ((2 + DIM_X) * DIM_X)
#define WARPS (THREADS / 32)
#define CELLS ((DIM_X * DIM_X + 31) / 32)  // of the matrix that a lane has: lane + 32 n; lanes too many repeat the last
#define CELL(n) least((int)(threadIdx.x % 32) + 32 * (n), DIM_X * DIM_X - 1)

// Entry j of the row, or of the column, that a cell is in.
template <bool ROW> __device__ __forceinline__ float entry(const float (&c)[CELLS], int cell, int j) {
  const int at = ROW ? cell / DIM_X * DIM_X + j : j * DIM_X + cell % DIM_X;
  float found = 0;
#pragma unroll
  for (int n = 0; n < CELLS; ++n) {
    const float held = shuffle(c[n], at % 32);
    if (at / 32 == n) found = held;
  }
  return found;
}

// Every cell divided by its row's, or column's, sum and an eps.
template <bool ROW> __device__ __forceinline__ void divide(float (&c)[CELLS], float eps) {
  float sums[CELLS] = {};
#pragma unroll
  for (int n = 0; n < CELLS; ++n)
#pragma unroll
    for (int j = 0; j < DIM_X; ++j) sums[n] += entry<ROW>(c, CELL(n), j);
#pragma unroll
  for (int n = 0; n < CELLS; ++n) c[n] /= sums[n] + eps;
}

// Shared `shares` become pre, post and the matrix; `partials` are the token's, P rows of ROWS + 1.
__device__ __forceinline__ void stream_shares(const float* partials, const float* base, const float* scale, int P,
                                              float* shares) {
  __shared__ float sums[WARPS][ROWS + 1];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int i = lane; i <= ROWS; i += 32) {
    float sum = 0;
#pragma unroll 8
    for (int p = warp; p < P; p += WARPS) sum += partials[p * (ROWS + 1) + i];
    sums[warp][i] = sum;
  }
  __syncthreads();
  if (warp == 0) {
    for (int i = lane; i <= ROWS; i += 32)
#pragma unroll
      for (int w = 1; w < WARPS; ++w) sums[0][i] += sums[w][i];
    __syncwarp();
    const float norm = 1.0f / sqrtf(sums[0][ROWS] + NORM_EPS);
    if (lane < 2 * DIM_X) {
      const float share = sigmoid(sums[0][lane] * norm * scale[lane / DIM_X] + base[lane]);
      shares[lane] = lane < DIM_X ? share + EPS : 2 * share;
    }
    float c[CELLS], top[CELLS];
#pragma unroll
    for (int n = 0; n < CELLS; ++n) {
      const int i = 2 * DIM_X + CELL(n);
      c[n] = sums[0][i] * norm * scale[2] + base[i], top[n] = LOWEST_FLOAT;
    }
#pragma unroll
    for (int n = 0; n < CELLS; ++n)
#pragma unroll
      for (int j = 0; j < DIM_X; ++j) top[n] = fmaxf(top[n], entry<true>(c, CELL(n), j));
#pragma unroll
    for (int n = 0; n < CELLS; ++n) c[n] = expf(c[n] - top[n]);
    divide<true>(c, 0);
#pragma unroll
    for (int n = 0; n < CELLS; ++n) c[n] += EPS;
    divide<false>(c, EPS);
    for (int i = 1; i < ITERATIONS; ++i) divide<true>(c, EPS), divide<false>(c, EPS);
#pragma unroll
    for (int n = 0; n < CELLS; ++n) shares[2 * DIM_X + CELL(n)] = c[n];
  }
  __syncthreads();
}
