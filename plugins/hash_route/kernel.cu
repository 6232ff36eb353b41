// hash_route: the K experts that a table names for a token's id, and their weights. A warp a token, a lane an expert.
//
//   indices = table[id];  w_k = scale * scoring(logits)[i_k] / (norm ? sum of the K + 1e-20 : 1)
//
// Bytes: 4 E + 8 K + 8 read and 12 K written a token, 1.2 KB for DeepSeek-V4: a launch of up to 256 tokens is bound by
// its latency, that of a token id, then its row of the table. All E logits are scored meanwhile, which costs no time.
#include "../moe_route/scores.cuh"

#define CHOSEN ((DIM_K + 31) / 32)

// Of numbers that may be anything, one that there is.
__device__ __forceinline__ int within(long long i, int count) { return (int)(i < 0 ? 0 : i < count ? i : count - 1); }

extern "C" __global__ void __launch_bounds__(THREADS)
hash_route(const float* __restrict__ logits, const long long* __restrict__ table, const long long* __restrict__ ids,
           int M, int V, float* __restrict__ weights, long long* __restrict__ indices) {
  const int token = blockIdx.x * (THREADS / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (token >= M) return;
  float scores[EACH], chosen[CHOSEN], sum = 0;
  expert_scores(logits + (long long)token * DIM_E, scores);
  const long long* row = table + (long long)within(ids[token], V) * DIM_K;
#pragma unroll
  for (int n = 0; n < CHOSEN; ++n) {
    const int k = 32 * n + lane, expert = within(row[least(k, DIM_K - 1)], DIM_E);
    chosen[n] = 0;
#pragma unroll
    for (int j = 0; j < EACH; ++j) {
      const float score = shuffle(scores[j], expert % 32);
      if (k < DIM_K && expert / 32 == j) chosen[n] = score;
    }
    sum += chosen[n];
    if (k < DIM_K) indices[(long long)token * DIM_K + k] = expert;
  }
  sum = warp_sum(sum);
#pragma unroll
  for (int n = 0; n < CHOSEN; ++n)
    if (32 * n + lane < DIM_K)
      weights[(long long)token * DIM_K + 32 * n + lane] = chosen[n] * (NORM ? SCALE / (sum + 1e-20f) : SCALE);
}
