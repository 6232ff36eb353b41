// compress_tokens: entries pooled from the rows of their tokens. A block has 32 channels of an entry, a warp every
// WARPS-th of its SLOTS tokens; what the warps pooled is then joined.
//
//   entry = sum over t of softmax_t(gate_t + bias_t) * key_t, channel by channel
//
// Bytes: 8 SLOTS W an entry, its keys and gates: 512 KB for DeepSeek-V4's entries of 128 tokens and W = 512, 0.16 us of
// an H100's memory; one entry is bound by latency, which cutting up its tokens makes that of two rounds of loads. Of
// many entries each number is read once: 8 HALVES W bytes a token, 2.5 ns for HALVES = 2.
#include "../kernels/v4.cuh"

#define WIDTH (DIM_P / (2 * HALVES))
#define SLOTS (HALVES * RATIO)
#define WARPS (THREADS / 32)

extern "C" __global__ void __launch_bounds__(THREADS)
compress_tokens(const float* __restrict__ rows, const float* __restrict__ ring, const float* __restrict__ bias,
                const long long* __restrict__ position, int S, float* __restrict__ entries) {
  __shared__ float tops[WARPS][32], sums[WARPS][32], pools[WARPS][32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int count = cdiv(S, RATIO), b = blockIdx.x / count, entry = blockIdx.x % count;
  const int channel = blockIdx.y * 32 + lane, c = least(channel, WIDTH - 1);
  const int start = (int)position[b], first = (start / RATIO + entry - (HALVES - 1)) * RATIO;
  rows += (long long)b * S * DIM_P;
  ring += (long long)b * SLOTS * DIM_P;
  float top = LOWEST_FLOAT, sum = 0, pool = 0;
  for (int begin = warp; begin < SLOTS; begin += CHUNK * WARPS) {
    float gates[CHUNK], keys[CHUNK];
#pragma unroll
    for (int i = 0; i < CHUNK; ++i) {
      const int slot = begin + i * WARPS, token = first + slot, half = slot / RATIO * WIDTH + c;
      gates[i] = LOWEST_FLOAT, keys[i] = 0;
      if (slot < SLOTS && token >= 0 && token < start + S) {
        const float* row = token < start ? ring + token % SLOTS * DIM_P : rows + (long long)(token - start) * DIM_P;
        gates[i] = row[HALVES * WIDTH + half] + bias[slot % RATIO * HALVES * WIDTH + half];
        keys[i] = row[half];
      }
    }
    const float before = top;
#pragma unroll
    for (int i = 0; i < CHUNK; ++i) top = fmaxf(top, gates[i]);
    sum *= expf(before - top), pool *= expf(before - top);
#pragma unroll
    for (int i = 0; i < CHUNK; ++i) {
      const float weight = expf(gates[i] - top);
      sum += weight, pool += weight * keys[i];
    }
  }
  tops[warp][lane] = top, sums[warp][lane] = sum, pools[warp][lane] = pool;
  __syncthreads();
  if (warp > 0 || channel >= WIDTH) return;
#pragma unroll
  for (int w = 0; w < WARPS; ++w) top = fmaxf(top, tops[w][lane]);
  sum = 0, pool = 0;
#pragma unroll
  for (int w = 0; w < WARPS; ++w) {
    const float weight = expf(tops[w][lane] - top);
    sum += weight * sums[w][lane], pool += weight * pools[w][lane];
  }
  entries[(long long)blockIdx.x * WIDTH + channel] = pool / sum;
}
