// attention_combine: the shares of a softmax over rows put together, for each query and head.
//
//   top = max over shares;  z = sum of exp(top_i - top) partial_i / (sum of exp(top_i - top) sum_i + exp(sink - top))
//
// Bytes: 4 P L read for a query and head, P shares. A block a query and head, a thread a channel; P is small where there
// are many queries, so this costs little beside reading the rows.
#include "v4.cuh"

extern "C" __global__ void __launch_bounds__(THREADS)
ENTRY(const float* __restrict__ partial, const float* __restrict__ extent,
#if SINKS
      const float* __restrict__ sinks,
#endif
      int P, TYPE_T* __restrict__ z) {
  const int head = blockIdx.y;
  const long long m = blockIdx.x;
#if SINKS
  const float sink = sinks[head];
#else
  const float sink = NEGATIVE_INFINITY;
#endif
  float top = sink;
  for (int i = 0; i < P; ++i) top = fmaxf(top, extent[((m * P + i) * DIM_H + head) * 2]);
  float sum = SINKS ? expf(sink - top) : 0.0f;
  for (int i = 0; i < P; ++i) {
    const float* one = extent + ((m * P + i) * DIM_H + head) * 2;
    if (one[1] > 0) sum += one[1] * expf(one[0] - top);
  }
  for (int column = threadIdx.x; column < DIM_L; column += THREADS) {
    float value = 0;
#pragma unroll 4
    for (int i = 0; i < P; ++i) {
      const long long at = (m * P + i) * DIM_H + head;
      if (extent[at * 2 + 1] > 0) value += partial[at * DIM_L + column] * expf(extent[at * 2] - top);
    }
    z[(m * DIM_H + head) * DIM_L + column] = rounded<TYPE_T>(sum > 0 ? value / sum : 0.0f);
  }
}
