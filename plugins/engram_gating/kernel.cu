// engram_gating: what Engram looked up, weighted by how well it fits a stream. A block a token's stream.
//
//   g = (h . (q_weight k_weight k)) / D * sqrt(D) / (rms(h) rms(k));  u = sigmoid(+-sqrt(max(|g|, 1e-6))) value
//
// Bytes: (3 X + 1) D sizeof(T) a token: 133 KB for DeepSeek-V4.1, 40 ns of an H100's memory; the weights stay in the L2
// cache. Up to some 100 tokens it is bound by latency: two rounds of loads with three sums over a block in between.
#include "../kernels/v4.cuh"

// One block, or the compiler spills for the sake of more of them.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
engram_gating(const TYPE_T* __restrict__ streams, const TYPE_T* __restrict__ keys, const TYPE_T* __restrict__ value,
              const Q_TYPE* __restrict__ q_weight, const K_TYPE* __restrict__ k_weight, TYPE_T* __restrict__ gated) {
  __shared__ float scratch[THREADS / 32];
  const long long token = blockIdx.x, row = (token * DIM_X + blockIdx.y) * DIM_D;
  float dot = 0, hh = 0, kk = 0;
#pragma unroll
  for (int n = 0; n < ROUNDS; ++n) {
    const int c = (n * THREADS + threadIdx.x) * VEC;
    if (c >= DIM_D) continue;
    float h[VEC], k[VEC], q_share[VEC], k_share[VEC];
    load_floats<VEC>(streams + row + c, h);
    load_floats<VEC>(keys + row + c, k);
    load_floats<VEC>(q_weight + blockIdx.y * DIM_D + c, q_share);
    load_floats<VEC>(k_weight + blockIdx.y * DIM_D + c, k_share);
#pragma unroll
    for (int i = 0; i < VEC; ++i)
      dot += h[i] * (q_share[i] * k_share[i]) * k[i], hh += h[i] * h[i], kk += k[i] * k[i];
  }
  dot = block_sum(dot, scratch), hh = block_sum(hh, scratch), kk = block_sum(kk, scratch);
  const float norms = sqrtf(hh / DIM_D + EPS) * sqrtf(kk / DIM_D + EPS);  // a product of the squares may be too small
  const float g = dot / DIM_D * sqrtf(DIM_D) / norms, root = sqrtf(fmaxf(fabsf(g), 1e-6f));
  const float gate = sigmoid(g < 0 ? -root : root);
#pragma unroll
  for (int n = 0; n < ROUNDS; ++n) {
    const int c = (n * THREADS + threadIdx.x) * VEC;
    if (c >= DIM_D) continue;
    float u[VEC];
    load_floats<VEC>(value + token * DIM_D + c, u);
#pragma unroll
    for (int i = 0; i < VEC; ++i) u[i] *= gate;
    store_floats<VEC>(gated + row + c, u);
  }
}
