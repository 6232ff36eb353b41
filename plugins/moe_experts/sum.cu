// expert_sum: what a token's experts made of it, added up in the order of its choice.
//
// Bytes: 4 K D read and T's D written a token, 229 KB for DeepSeek-V3: two thousandths of the weights of a token's experts.
#include "../kernels/v4.cuh"

extern "C" __global__ void __launch_bounds__(THREADS)
expert_sum(const float* __restrict__ out, int K, TYPE_T* __restrict__ y) {
  const int column = blockIdx.y * THREADS + threadIdx.x;
  if (column >= DIM_D) return;
  const long long m = blockIdx.x;
  float sum = 0;
#pragma unroll 8
  for (int k = 0; k < K; ++k) sum += out[(m * K + k) * DIM_D + column];
  y[m * DIM_D + column] = rounded<TYPE_T>(sum);
}
