// index_select, second node: the columns of each row's K best scores. A block a row.
//
//   numbers = the K first columns by falling score, of equal scores the lower first; -1 where the score is the lowest float
//
// Score and column make one key, and no two are equal. A radix select over its digits finds the lowest key of the K best,
// those above are collected in any order, and a bitonic sort puts them in theirs.
//
// Bytes: 4 N a row, once from memory and two or three times more from L2: N = 65536 are 256 KB. One block has one
// multiprocessor's share of L2, about 100 GB/s, which makes 3 us a pass; a full GPU of rows is bound by memory.
#include "keys.cuh"

extern "C" __global__ void __launch_bounds__(THREADS)
index_top_k(const float* __restrict__ scores, int N, long long* __restrict__ numbers) {
  SHARED_BYTES(bytes);
  __shared__ int scratch[THREADS / 32], digit, rest, exact, kept;
  int* bins = reinterpret_cast<int*>(bytes);
  Key* keys = reinterpret_cast<Key*>(bytes);
  const float* row = scores + (long long)blockIdx.x * N;
  const int K = least(TOP, N);
  if (K == 0) return;
  Key lowest = 0;  // of the K best, as far as its digits are known
  for (int shift = BITS * (DIGITS - 1), wanted = K; shift >= 0; shift -= BITS) {
    for (int i = threadIdx.x; i < BINS; i += THREADS) bins[i] = 0;
    __syncthreads();
    each_key(row, N, [&](Key key) {
      tally(bins, key && key >> shift >> BITS == lowest >> shift >> BITS, (int)(key >> shift) & (BINS - 1));
    });
    __syncthreads();
    const int* own = bins + BINS - 1 - threadIdx.x * (BINS / THREADS);
    int sum = 0;
#pragma unroll
    for (int i = 0; i < BINS / THREADS; ++i) sum += own[-i];
    int above = sum_before(sum, scratch);
#pragma unroll
    for (int i = 0; i < BINS / THREADS; ++i) {
      if (above < wanted && wanted <= above + own[-i])
        digit = own - i - bins, rest = wanted - above, exact = own[-i] == wanted - above;
      above += own[-i];
    }
    __syncthreads();
    lowest |= (Key)digit << shift, wanted = rest;
    if (exact) break;  // all that begin with these digits are among the best
  }
  int slots = 1;
  while (slots < K) slots *= 2;
  for (int i = threadIdx.x; i < slots; i += THREADS) keys[i] = 0;
  if (threadIdx.x == 0) kept = 0;
  __syncthreads();
  each_key(row, N, [&](Key key) { if (key >= lowest) keys[atomicAdd(&kept, 1)] = key; });
  __syncthreads();
  sort(keys, slots);
  for (int i = threadIdx.x; i < K; i += THREADS) {
    const Key key = keys[i];
    const int column = LAST_COLUMN - (int)(key & LAST_COLUMN);
    numbers[(long long)blockIdx.x * K + i] = key == key_of(LOWEST_FLOAT, column) ? -1 : column;
  }
}
