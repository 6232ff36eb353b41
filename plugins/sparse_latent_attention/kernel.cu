// sparse_latent_attention: absorbed queries over selected rows of the latent cache and the new tokens, in shares.
//
// Bytes: W numbers of each selected row a query token; 2.4 MB for the 2048 of DeepSeek-V3.2 in bfloat16.
#include "../kernels/attention.cuh"

struct Rows {
  Numbered all;
  const long long* selected;
  int count;
  __device__ __forceinline__ const Number* at(int n) const { return all.at(selected[n]); }
};

extern "C" __global__ void __launch_bounds__(THREADS, 1)
sparse_latent_attention_split(const Number* __restrict__ q, const Number* __restrict__ fresh,
                              const Number* __restrict__ cache, const long long* __restrict__ selected,
                              const long long* __restrict__ position, int S, int T, int K, int P,
                              float* __restrict__ partial, float* __restrict__ extent) {
  const long long m = blockIdx.x, b = m / S;
  const Numbered all{cache + b * T * DIM_W, fresh + b * S * DIM_W, T, S, (int)position[b]};
  attend(q, Rows{all, selected + m * K, K}, P, partial, extent);
}
