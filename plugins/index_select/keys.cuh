// Scores with their columns as 60-bit keys, and what a block of threads does with them: count by digit, sum, sort.
#pragma once
#include "../kernels/v4.cuh"

#define BITS 12
#define DIGITS 5
#define BINS (1 << BITS)
#define COLUMN_BITS (BITS * DIGITS - 32)
#define LAST_COLUMN ((1 << COLUMN_BITS) - 1)
#define EACH 4

typedef unsigned long long Key;

// NaN is above all, and -0 is 0: as PyTorch sorts.
__device__ __forceinline__ Key key_of(float score, int column) {
  unsigned bits = float_to_bits(score + 0.0f);
  bits ^= bits >> 31 ? 0xffffffffu : 0x80000000u;
  if (score != score) bits = 0xffffffffu;
  return (Key)bits << COLUMN_BITS | (LAST_COLUMN - column);
}

// Calls use(key) for every column, with all lanes of a warp together; key 0 stands for no column.
template <class F> __device__ __forceinline__ void each_key(const float* row, int N, F use) {
  for (int start = threadIdx.x; start < N + (int)threadIdx.x; start += EACH * THREADS) {
    float score[EACH];
#pragma unroll
    for (int j = 0; j < EACH; ++j) score[j] = start + j * THREADS < N ? row[start + j * THREADS] : 0.0f;
#pragma unroll
    for (int j = 0; j < EACH; ++j) use(start + j * THREADS < N ? key_of(score[j], start + j * THREADS) : 0);
  }
}

// Adds lanes that count to their digits' bins. Scores are often the same all over a warp: those like lane 0's add up first.
__device__ __forceinline__ void tally(int* bins, bool counts, int digit) {
  const int common = shuffle(digit, 0);
  const unsigned same = __ballot_sync(0xffffffffu, counts && digit == common);
  if (same && threadIdx.x % 32 == 0) atomicAdd(bins + common, __popc(same));
  if (counts && digit != common) atomicAdd(bins + digit, 1);
}

// The sum of what threads before this one have.
__device__ __forceinline__ int sum_before(int x, int* scratch) {
  const int lane = threadIdx.x % 32;
  int sum = x;
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const int below = shuffle(sum, (lane - d) & 31);
    if (lane >= d) sum += below;
  }
  if (lane == 31) scratch[threadIdx.x / 32] = sum;
  __syncthreads();
  sum -= x;
#pragma unroll
  for (int warp = 0; warp < THREADS / 32; ++warp) sum += warp < threadIdx.x / 32 ? scratch[warp] : 0;
  return sum;
}

// Sorts by falling key.
__device__ __forceinline__ void sort(Key* keys, int count) {
  for (int size = 2; size <= count; size *= 2)
    for (int step = size / 2; step; step /= 2) {
      for (int i = threadIdx.x; i < count / 2; i += THREADS) {
        const int at = 2 * i - (i & (step - 1));
        const Key one = keys[at], two = keys[at + step];
        if ((one < two) == !(at & size)) keys[at] = two, keys[at + step] = one;
      }
      __syncthreads();
    }
}
