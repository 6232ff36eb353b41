// index_reselect, first node: a bit for each block of keys that a query looks in. A block of threads a query.
//
// Bytes: 8 for a number of a block and W words of marks: for DeepSeek-V4.1's 2048 blocks of 8 keys, 16 KB and, at
// N = 65536, 1 KB. A few tokens are bound by the launch.
#include "../kernels/v4.cuh"

extern "C" __global__ void __launch_bounds__(THREADS)
block_marks(const long long* __restrict__ blocks, const void*, const void*, int J, int W, unsigned* marks) {
  const long long m = blockIdx.x;
  for (int i = threadIdx.x; i < W; i += THREADS) marks[m * W + i] = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < J; i += THREADS) {
    const long long block = blocks[m * J + i];
    if (block >= 0 && block < 32LL * W) atomicOr(marks + m * W + block / 32, 1u << block % 32);
  }
}
