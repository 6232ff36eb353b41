// engram_conv: a causal convolution of every channel with itself. A thread has VEC channels of SPAN tokens.
//
//   out_t = silu(sum over j < K of weight[K-1-j] * x_{t - j * dilation})
//
// Bytes: 2 P sizeof(T) a token, the taps once, and K - 1 rows of the ring a sequence: 82 KB a token for P = 20480 in
// bfloat16, 24 ns of an H100's memory. That rows are read for K tokens is left to the caches.
#include "../kernels/v4.cuh"

#define SLOTS ((DIM_K - 1) * DILATION)

// One block, or the compiler spills for the sake of more of them.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
engram_conv(const TYPE_T* __restrict__ rows, const RING_TYPE* __restrict__ ring, const WEIGHT_TYPE* __restrict__ weight,
            const long long* __restrict__ position, int S, TYPE_T* __restrict__ out) {
  const int spans = cdiv(S, SPAN), b = blockIdx.x / spans, begin = blockIdx.x % spans * SPAN;
  const int c = (blockIdx.y * THREADS + threadIdx.x) * VEC;
  if (c >= DIM_P) return;
  rows += (long long)b * S * DIM_P + c;
  ring += (long long)b * SLOTS * DIM_P + c;
  out += (long long)b * S * DIM_P + c;
  const int start = (int)position[b];
  float taps[VEC * DIM_K];
#pragma unroll
  for (int k = 0; k < DIM_K; ++k) load_floats<VEC>(weight + (long long)c * DIM_K + k * VEC, taps + k * VEC);
  for (int s = begin; s < least(begin + SPAN, S); ++s) {
    float fresh[DIM_K][VEC] = {}, kept[DIM_K][VEC] = {}, sum[VEC] = {};  // of a row, one or neither is there
#pragma unroll
    for (int j = 0; j < DIM_K; ++j) {
      const int back = s - j * DILATION, token = start + back;
      if (back >= 0) load_floats<VEC>(rows + (long long)back * DIM_P, fresh[j]);
      if (back < 0 && token >= 0) load_floats<VEC>(ring + (long long)(token % SLOTS) * DIM_P, kept[j]);
    }
#pragma unroll
    for (int j = 0; j < DIM_K; ++j)
#pragma unroll
      for (int i = 0; i < VEC; ++i) sum[i] += taps[i * DIM_K + DIM_K - 1 - j] * (fresh[j][i] + kept[j][i]);
#pragma unroll
    for (int i = 0; i < VEC; ++i) sum[i] *= sigmoid(sum[i]);
    store_floats<VEC>(out + (long long)s * DIM_P, sum);
  }
}
