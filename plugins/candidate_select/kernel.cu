// candidate_select, third node: the best score of every block of BLOCK keys, from scores in order of the keys' numbers.
// LANES lanes a block of keys, side by side in memory.
//
//   best_b = max of score_n, n in block b;  +inf for the block of the newest key that the query may see
//
// Bytes: 4 N read and 4 N / BLOCK written a query: for DeepSeek-V4.1 at N = 65536 that is 295 KB, and 46 us of an H100's
// memory for 512 tokens.
#include "../kernels/v4.cuh"

extern "C" __global__ void __launch_bounds__(THREADS)
block_score(const float* __restrict__ scores, const long long* __restrict__ position, int S, int N, float* __restrict__ best) {
  const int m = blockIdx.x, lane = threadIdx.x % LANES, blocks = cdiv(N, BLOCK);
  const int first = blockIdx.y * EACH * (THREADS / LANES) + threadIdx.x / LANES;
  const int newest = (int)((position[m / S] + m % S + 1) / RATIO) - 1;
  float top[EACH];
#pragma unroll
  for (int j = 0; j < EACH; ++j) {
    const int block = first + j * (THREADS / LANES), end = least(BLOCK, N - block * BLOCK);
    top[j] = LOWEST_FLOAT;
    for (int i = lane; i < end; i += LANES) top[j] = fmaxf(top[j], scores[(long long)m * N + block * BLOCK + i]);
  }
#pragma unroll
  for (int j = 0; j < EACH; ++j) {
#pragma unroll
    for (int mask = LANES / 2; mask; mask >>= 1) top[j] = fmaxf(top[j], shuffle_xor(top[j], mask));
    const int block = first + j * (THREADS / LANES);
    if (lane == 0 && block < blocks)
      best[(long long)m * blocks + block] = newest >= 0 && newest / BLOCK == block ? -NEGATIVE_INFINITY : top[j];
  }
}
