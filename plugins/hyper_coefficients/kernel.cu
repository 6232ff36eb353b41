// hyper_coefficients, from hyper_connection's partial sums on: shares and Sinkhorn's matrix. A block a token.
//
//   [m | s] = sum over p of partials;  pre, post, comb = of m / sqrt(s + norm_eps)
//
// Bytes: 4 P (1 + (2 + X) X) read and 4 (2 + X) X written a token, 100 P and 96 for X = 4: bound by latency, that of
// Sinkhorn's 2 ITERATIONS dependent sums and quotients, about 2 us for DeepSeek-V4's 20.
#include "../hyper_connection/coefficients.cuh"

extern "C" __global__ void __launch_bounds__(THREADS)
hyper_shares(const float* __restrict__ partials, const float* __restrict__ base, const float* __restrict__ scale, int P,
             float* __restrict__ pre, float* __restrict__ post, float* __restrict__ comb) {
  __shared__ float shares[ROWS];
  const long long token = blockIdx.x;
  stream_shares(partials + token * P * (ROWS + 1), base, scale, P, shares);
  for (int i = threadIdx.x; i < ROWS; i += THREADS)
    if (i < DIM_X) pre[token * DIM_X + i] = shares[i];
    else if (i < 2 * DIM_X) post[token * DIM_X + i - DIM_X] = shares[i];
    else comb[token * DIM_X * DIM_X + i - 2 * DIM_X] = shares[i];
}
