// The products of hyper_connection, in partial sums: fn with a token's X streams, flattened to u, and the mean of u^2.
//
//   partials[m, p] = [fn u | mean(u^2)], of the channels that part p of P has: every P-th run of 32 VEC
//
// Bytes: X D sizeof(T) a token and fn, 4 (2 + X) X X D: 57 KB and 2.75 MB for DeepSeek-V4-Pro, so that one token takes
// as long as fn does, 1 us of an H100's memory, and P parts share it out. Each block reads its part of fn once for
// TOKENS tokens, from the L2 cache; of many tokens it is these reads that bound it, 0.35 MB a token, to 60 ns each.
#include "../kernels/v4.cuh"

#define ROWS ((2 + DIM_X) * DIM_X)
#define WIDTH (DIM_X * DIM_D)
#define WARPS (THREADS / 32)
#define EACH ((ROWS + WARPS - 1) / WARPS)  // rows of fn that a warp has
#define RESIDENT (EACH > 6 ? 3 : 4)        // blocks of a multiprocessor, as many as registers allow without spills

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
hyper_project(const TYPE_T* __restrict__ streams, const float* __restrict__ fn, int M, float* __restrict__ partials) {
  const int first = blockIdx.x * TOKENS, tokens = least(TOKENS, M - first);
  const int part = blockIdx.y, parts = gridDim.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int rows = least(EACH, ROWS - warp * EACH);
  streams += (long long)first * WIDTH;
  fn += (long long)warp * EACH * WIDTH;
  float sums[TOKENS][EACH] = {}, squares[TOKENS] = {};
  for (int c = (part * 32 + lane) * VEC; c < WIDTH; c += parts * 32 * VEC) {
    float weights[EACH][VEC] = {}, u[TOKENS][VEC] = {};
#pragma unroll
    for (int r = 0; r < EACH; ++r)
      if (ROWS % WARPS == 0 || r < rows) load_floats<VEC>(fn + (long long)r * WIDTH + c, weights[r]);
#pragma unroll
    for (int t = 0; t < TOKENS; ++t)
      if (t < tokens) load_floats<VEC>(streams + (long long)t * WIDTH + c, u[t]);
#pragma unroll
    for (int t = 0; t < TOKENS; ++t)
#pragma unroll
      for (int i = 0; i < VEC; ++i) {
        squares[t] += u[t][i] * u[t][i];
#pragma unroll
        for (int r = 0; r < EACH; ++r) sums[t][r] += weights[r][i] * u[t][i];
      }
  }
#pragma unroll
  for (int t = 0; t < TOKENS; ++t) {
    if (t >= tokens) continue;
    float* out = partials + ((long long)(first + t) * parts + part) * (ROWS + 1);
#pragma unroll
    for (int r = 0; r < EACH; ++r) {
      const float sum = warp_sum(sums[t][r]);
      if (lane == 0 && r < rows) out[warp * EACH + r] = sum;
    }
    const float square = warp_sum(squares[t]);
    if (threadIdx.x == 0) out[ROWS] = square / WIDTH;
  }
}
