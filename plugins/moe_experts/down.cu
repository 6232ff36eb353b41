// expert_down: an expert's output for the tokens that chose it, by the router's weight.
//
//   out = weight * (down h)
//
// As expert_up, with one matrix.
// Bytes: the D F numbers of every expert that was hit: 14.7 MB an expert of DeepSeek-V3 in FP8.
#include "matrix.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
ENTRY(const Number* __restrict__ h, const float* __restrict__ weights, const int* __restrict__ order,
            const int* __restrict__ tiles, STACK(down),
#if FORMAT != PLAIN
            STACK(down_scale),
#endif
            float* __restrict__ out) {
#if FORMAT == PLAIN
  const Stack scales = GIVEN(down);  // never read
#else
  const Stack scales = GIVEN(down_scale);
#endif
  __shared__ float parts[WARPS][16 * TOKENS];
  const int expert = tiles[3 * blockIdx.y], begin = tiles[3 * blockIdx.y + 1], count = tiles[3 * blockIdx.y + 2];
  if (count == 0) return;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, first = blockIdx.x * 16;
  const Stored<DIM_D, DIM_F> matrix(GIVEN(down), scales, expert);
  const Number* rows[TILES];
#pragma unroll
  for (int tile = 0; tile < TILES; ++tile) {
    const int token = tile * 8 + lane / 4;
    rows[tile] = h + (long long)(token < count ? order[begin + token] : 0) * DIM_F;
  }
  Sums sums = {};
  for (int k = warp * BLOCK; k < DIM_F; k += WARPS * BLOCK) {
    Span tokens[TILES];
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile)
      if (tile * 8 < count) load(tokens[tile], rows[tile], k + lane % 4 * SPAN, DIM_F, tile * 8 + lane / 4 < count);
    multiply(sums, matrix, first, k, tokens, count);
  }
  lay_down(parts[warp], sums);
  __syncthreads();
  for (int i = threadIdx.x; i < 16 * TOKENS; i += THREADS) {
    const int row = i % 16, token = i / 16;
    if (token >= count || first + row >= DIM_D) continue;
    const long long pair = order[begin + token];
    out[pair * DIM_D + first + row] = weights[pair] * picked_up(parts, row * TOKENS + token);
  }
}
