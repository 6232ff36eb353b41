// moe_route: the K best of E experts for each token, and their weights. A warp a token, all in registers.
//
//   scores = scoring(logits);  choice = scores + bias;  only the best groups of experts stay in the choice
//   w_k = scale * scores[i_k] / (norm ? sum of the K + 1e-20 : 1)
//
// Bytes: 4 E read and 12 K written a token, the bias once: 1.1 KB for DeepSeek-V3, so a launch of up to 256 tokens is
// bound by its latency, that of K dependent maxima over the warp.
#include "scores.cuh"

#define GROUP (DIM_E / GROUPS)
#define KEPT ((DIM_K + 31) / 32)

__device__ __forceinline__ bool better(float a, int i, float b, int j) { return a > b || (a == b && i < j); }

// The best expert of the warp's, the lowest of equal ones.
__device__ __forceinline__ int best_expert(const float (&choice)[EACH]) {
  const int lane = threadIdx.x % 32;
  float top = choice[0];
  int at = lane;
#pragma unroll
  for (int j = 1; j < EACH; ++j)
    if (choice[j] > top) top = choice[j], at = 32 * j + lane;
#pragma unroll
  for (int mask = 16; mask; mask >>= 1) {
    const float other = shuffle_xor(top, mask);
    const int where = shuffle_xor(at, mask);
    if (better(other, where, top, at)) top = other, at = where;
  }
  return least(at, DIM_E - 1);
}

// What a group is worth: its best expert, or its two best.
__device__ __forceinline__ float group_worth(const float (&choice)[EACH], int group) {
  float first = LOWEST_FLOAT, second = LOWEST_FLOAT;
#pragma unroll
  for (int j = 0; j < EACH; ++j)
    if ((32 * j + (int)(threadIdx.x % 32)) / GROUP == group) {
      second = fmaxf(second, fminf(first, choice[j]));
      first = fmaxf(first, choice[j]);
    }
#pragma unroll
  for (int mask = 16; mask; mask >>= 1) {
    const float one = shuffle_xor(first, mask), two = shuffle_xor(second, mask);
    second = fmaxf(fminf(first, one), fmaxf(second, two));
    first = fmaxf(first, one);
  }
  return BEST_TWO && GROUP > 1 ? first + second : first;
}

extern "C" __global__ void __launch_bounds__(THREADS)
moe_route(const float* __restrict__ logits, const float* __restrict__ bias, int M, float* __restrict__ weights,
          long long* __restrict__ indices) {
  const int token = blockIdx.x * (THREADS / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (token >= M) return;
  float scores[EACH], choice[EACH];
  expert_scores(logits + (long long)token * DIM_E, scores);
#pragma unroll
  for (int j = 0; j < EACH; ++j) choice[j] = 32 * j + lane < DIM_E ? scores[j] + bias[32 * j + lane] : LOWEST_FLOAT;
  if (OPEN < GROUPS) {
    float worth[GROUPS];
    bool open[GROUPS] = {};
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) worth[g] = group_worth(choice, g);
    for (int n = 0; n < OPEN; ++n) {
      int best = -1;
      float top = 0;
#pragma unroll
      for (int g = 0; g < GROUPS; ++g)
        if (!open[g] && (best < 0 || worth[g] > top)) best = g, top = worth[g];
#pragma unroll
      for (int g = 0; g < GROUPS; ++g) open[g] = open[g] || g == best;
    }
#pragma unroll
    for (int j = 0; j < EACH; ++j) {
      bool kept = false;
#pragma unroll
      for (int g = 0; g < GROUPS; ++g) kept = kept || (open[g] && (32 * j + lane) / GROUP == g);
      if (!kept) choice[j] = LOWEST_FLOAT;
    }
  }
  float sum = 0, taken[KEPT];
  for (int k = 0; k < DIM_K; ++k) {
    const int expert = best_expert(choice);
    float score = 0;
#pragma unroll
    for (int j = 0; j < EACH; ++j)
      if (32 * j + lane == expert) score = scores[j], choice[j] = NEGATIVE_INFINITY;
    score = shuffle(score, expert % 32);
    sum += score;
#pragma unroll
    for (int j = 0; j < KEPT; ++j)
      if (32 * j + lane == k) taken[j] = score;
    if (lane == 0) indices[(long long)token * DIM_K + k] = expert;
  }
#pragma unroll
  for (int j = 0; j < KEPT; ++j)
    if (32 * j + lane < DIM_K)
      weights[(long long)token * DIM_K + 32 * j + lane] = taken[j] * (NORM ? SCALE / (sum + 1e-20f) : SCALE);
}
