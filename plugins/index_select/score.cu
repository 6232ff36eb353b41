// index_select, first node: every key's score for every query, in order of the keys' numbers.
//
//   score_n = scale * sum over h of w_h * relu(q_h . key_n), the lowest float where the query does not see key n
//
// Bytes: keys once and 4 M N of scores written: for DeepSeek-V3.2 at N = 65536 a decoded token reads 16.8 MB, 5 us of
// an H100's memory. Products are 2 M N H I: from about ten tokens of a sequence on the tensor cores are the floor, 1 TFLOP
// for 1024 tokens of that step.
#include "scores.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, 3)
index_score(const TYPE_T* __restrict__ q, const float* __restrict__ weights, const TYPE_T* __restrict__ fresh,
            const TYPE_T* __restrict__ cache, const long long* __restrict__ position, int S, int U, int C,
            float* __restrict__ scores) {
  score_keys<0>(q, weights, fresh, cache, nullptr, position, S, U, C, 0, scores);
}
