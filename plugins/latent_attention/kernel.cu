// latent_attention: absorbed queries over the latent cache and the new tokens' rows, in shares.
//
// A query of token s sees the rows held and the new ones up to its own. The value of a row is its first VALUES numbers.
//
// Bytes: W numbers of each row once a query token, whatever H is: 1152 for DeepSeek-V3 in bfloat16, 302 MB at 256
// sequences of 1024 tokens. Operations: 2 H (W + VALUES) a row, 278 thousand, 242 a byte: with H = 128 either may bind.
#include "../kernels/attention.cuh"

struct Rows : Numbered {
  int count;
};

extern "C" __global__ void __launch_bounds__(THREADS, 1)
latent_attention_split(const Number* __restrict__ q, const Number* __restrict__ fresh, const Number* __restrict__ cache,
                       const long long* __restrict__ position, int S, int T, int P, float* __restrict__ partial,
                       float* __restrict__ extent) {
  const long long b = blockIdx.x / S;
  const int held = least((int)position[b], T), step = blockIdx.x % S;
  attend(q, Rows{{cache + b * T * DIM_W, fresh + b * S * DIM_W, T, S, held}, held + step + 1}, P, partial, extent);
}
