// window_attention: queries over the R newest tokens' rows, in shares; the sink comes with their sum.
//
// Bytes: W numbers of R rows a query token: 131 KB for the 128 of DeepSeek-V4 in bfloat16, so a step of a few sequences
// is bound by the launch.
#include "../kernels/attention.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, 1)
ENTRY(const Number* __restrict__ q, const Number* __restrict__ fresh, const Number* __restrict__ ring,
      const long long* __restrict__ position,
#if SINCE
      const long long* __restrict__ since,
#endif
      int S, int R, int P, float* __restrict__ partial, float* __restrict__ extent) {
  const long long b = blockIdx.x / S;
#if SINCE
  const int first = (int)since[b];
#else
  const int first = 0;
#endif
  attend(q, Window(ring + b * R * DIM_W, fresh + b * S * DIM_W, R, (int)position[b], blockIdx.x % S, first), P, partial,
         extent);
}
