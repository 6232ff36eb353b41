// compressed_attention: queries over the R newest tokens' rows and every entry complete by then, in shares.
//
// Bytes: W numbers of R + t / RATIO rows for the query of token t: 1.2 MB at 128k tokens of DeepSeek-V4's heavily
// compressed layers (RATIO 128) in bfloat16.
#include "../kernels/attention.cuh"

struct Rows {
  Window window;
  Numbered entries;
  int count;
  __device__ __forceinline__ const Number* at(int n) const {
    return n < window.count ? window.at(n) : entries.at(n - window.count);
  }
};

extern "C" __global__ void __launch_bounds__(THREADS, 1)
compressed_attention_split(const Number* __restrict__ q, const Number* __restrict__ fresh,
                           const Number* __restrict__ ring, const Number* __restrict__ fresh_entry,
                           const Number* __restrict__ entry, const long long* __restrict__ position, int S, int R, int U,
                           int C, int P, float* __restrict__ partial, float* __restrict__ extent) {
  const long long b = blockIdx.x / S;
  const int held = (int)position[b], step = blockIdx.x % S;
  const Window window(ring + b * R * DIM_W, fresh + b * S * DIM_W, R, held, step, 0);
  const Numbered entries{entry + b * C * DIM_W, fresh_entry + b * U * DIM_W, C, U, held / RATIO};
  attend(q, Rows{window, entries, window.count + (held + step + 1) / RATIO}, P, partial, extent);
}
