// thought_attention: a thought's step over its sequence's latent rows up to the token it is about, and over the
// thought's own rows, in shares.
//
// Bytes: W numbers of each row once a thought, as in latent_attention.
#include "../kernels/attention.cuh"

struct Rows : Numbered {
  int count;
};

extern "C" __global__ void __launch_bounds__(THREADS, 1)
thought_attention_split(const Number* __restrict__ q, const Number* __restrict__ own, const Number* __restrict__ cache,
                        const long long* __restrict__ thought_at, int T, int Q, int steps, int P,
                        float* __restrict__ partial, float* __restrict__ extent) {
  const long long m = blockIdx.x, b = m / Q;
  const int held = least((int)thought_at[m] + 1, T);
  attend(q, Rows{{cache + b * T * DIM_W, own + m * steps * DIM_W, T, steps, held}, held + steps}, P, partial, extent);
}
