// The rest of hyper_connection, from partial sums on: shares, Sinkhorn's matrix, and the streams' collapse.
//
//   [m | s] = sum over p of partials;  pre, post, comb = of m / sqrt(s + norm_eps);  z = sum_j pre_j stream_j
//
// Bytes: (X + 1) D sizeof(T) a token and its partial sums: 72 KB for DeepSeek-V4-Pro, 22 ns of an H100's memory. One
// token is bound by latency, that of Sinkhorn's 2 ITERATIONS dependent sums and quotients; its streams are loaded
// meanwhile. Blocks that share a token compute its shares each for itself.
#include "coefficients.cuh"

// One block, or the compiler spills for the sake of more of them.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
hyper_collapse(const TYPE_T* __restrict__ streams, const float* __restrict__ partials, const float* __restrict__ base,
               const float* __restrict__ scale, int P, TYPE_T* __restrict__ z, float* __restrict__ post,
               float* __restrict__ comb) {
  __shared__ float shares[ROWS];
  const long long token = blockIdx.x;
  const int c = (blockIdx.y * THREADS + threadIdx.x) * VEC;
  float x[DIM_X][VEC] = {}, sum[VEC] = {};
  if (c < DIM_D)
#pragma unroll
    for (int j = 0; j < DIM_X; ++j) load_floats<VEC>(streams + (token * DIM_X + j) * DIM_D + c, x[j]);
  stream_shares(partials + token * P * (ROWS + 1), base, scale, P, shares);
#pragma unroll
  for (int j = 0; j < DIM_X; ++j)
#pragma unroll
    for (int i = 0; i < VEC; ++i) sum[i] += shares[j] * x[j][i];
  if (c < DIM_D) store_floats<VEC>(z + token * DIM_D + c, sum);
  if (blockIdx.y == 0 && threadIdx.x < 32) {
    for (int i = threadIdx.x; i < DIM_X; i += 32) post[token * DIM_X + i] = shares[DIM_X + i];
    for (int i = threadIdx.x; i < DIM_X * DIM_X; i += 32) comb[token * DIM_X * DIM_X + i] = shares[2 * DIM_X + i];
  }
}
