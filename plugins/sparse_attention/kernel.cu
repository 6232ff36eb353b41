// sparse_attention: queries over the R newest tokens' rows and selected entries, in shares.
//
// Bytes: W numbers of R + K rows a query token: 655 KB for the 128 + 512 of DeepSeek-V4-Flash in bfloat16.
#include "../kernels/attention.cuh"

struct Rows {
  Window window;
  Numbered entries;
  const long long* selected;
  int count;
  __device__ __forceinline__ const Number* at(int n) const {
    return n < window.count ? window.at(n) : entries.at(selected[n - window.count]);
  }
};

extern "C" __global__ void __launch_bounds__(THREADS, 1)
ENTRY(const Number* __restrict__ q, const Number* __restrict__ fresh, const Number* __restrict__ ring,
      const Number* __restrict__ fresh_entry, const Number* __restrict__ entry, const long long* __restrict__ selected,
      const long long* __restrict__ position,
#if SINCE
      const long long* __restrict__ since,
#endif
      int S, int R, int U, int C, int K, int P, float* __restrict__ partial, float* __restrict__ extent) {
  const long long m = blockIdx.x, b = m / S;
#if SINCE
  const int first = (int)since[b];
#else
  const int first = 0;
#endif
  const int held = (int)position[b];
  const Window window(ring + b * R * DIM_W, fresh + b * S * DIM_W, R, held, (int)(m % S), first);
  const Numbered entries{entry + b * C * DIM_W, fresh_entry + b * U * DIM_W, C, U, held / RATIO};
  attend(q, Rows{window, entries, selected + m * K, window.count + K}, P, partial, extent);
}
