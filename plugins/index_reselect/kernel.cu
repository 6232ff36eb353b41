// index_reselect, second node: the scores of keys in marked blocks, in order of the keys' numbers.
//
//   score_n = scale * sum over h of w_h * relu(q_h . key_n), the lowest float where the query does not see key n or
//   n / BLOCK is not marked
//
// Bytes: keys of marked blocks and 4 M N of scores: for DeepSeek-V4.1, whose 2048 blocks of 8 keys are 4.2 MB, a token
// at N = 65536 moves 4.5 MB, 1.3 us of an H100's memory. Warps none of whose keys is marked only write.
#include "../index_select/scores.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, 3)
index_rescore(const TYPE_T* __restrict__ q, const float* __restrict__ weights, const TYPE_T* __restrict__ fresh,
              const TYPE_T* __restrict__ cache, const unsigned* __restrict__ marks, const long long* __restrict__ position,
              int S, int U, int C, int W, float* __restrict__ scores) {
  score_keys<BLOCK>(q, weights, fresh, cache, marks, position, S, U, C, W, scores);
}
