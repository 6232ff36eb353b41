// How a router's logits become scores, E of them in the hands of a warp: expert 32 j + lane is scores[j].
#pragma once
#include "../kernels/v4.cuh"

#define SOFTMAX 0
#define SIGMOID 1
#define SQRT_SOFTPLUS 2
#define EACH ((DIM_E + 31) / 32)

// log(1 + exp(x)) without the loss of 1 + exp(x) where that is 1
__device__ __forceinline__ float softplus(float x) { return fmaxf(x, 0.0f) + log1pf(expf(-fabsf(x))); }

// Experts that there are none of score the lowest float.
__device__ __forceinline__ void expert_scores(const float* logits, float (&scores)[EACH]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int j = 0; j < EACH; ++j) scores[j] = 32 * j + lane < DIM_E ? logits[32 * j + lane] : LOWEST_FLOAT;
  if (SCORING == SOFTMAX) {
    float top = LOWEST_FLOAT, sum = 0;
#pragma unroll
    for (int j = 0; j < EACH; ++j) top = fmaxf(top, scores[j]);
    top = warp_max(top);
#pragma unroll
    for (int j = 0; j < EACH; ++j) sum += scores[j] = expf(scores[j] - top);
    sum = warp_sum(sum);
#pragma unroll
    for (int j = 0; j < EACH; ++j) scores[j] /= sum;
  } else {
#pragma unroll
    for (int j = 0; j < EACH; ++j) scores[j] = SCORING == SIGMOID ? sigmoid(scores[j]) : sqrtf(softplus(scores[j]));
  }
}
