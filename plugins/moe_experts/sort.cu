// expert_sort: pairs of a token and an expert it chose, in order of the experts, cut into tiles of at most TOKENS.
//
//   order: the pairs m * K + k, those of an expert next to each other;  tiles: (expert, first place in order, how many)
//
// Bytes: 8 read and 4 written a pair. One block: counting, a running sum and placing are three passes over some
// thousand numbers at most. Which of its expert's places a pair gets varies from run to run, and nothing that is
// computed from it: each pair's result is computed by itself and stands at the pair's own number.
#include "../kernels/v4.cuh"

extern "C" __global__ void __launch_bounds__(THREADS)
expert_sort(const long long* __restrict__ indices, int N, int L, int* __restrict__ order, int* __restrict__ tiles) {
  __shared__ int count[DIM_E], place[DIM_E], warp_places[THREADS / 32], warp_tiles[THREADS / 32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  constexpr int EACH = (DIM_E + THREADS - 1) / THREADS;
  for (int e = threadIdx.x; e < DIM_E; e += THREADS) count[e] = 0;
  for (int i = threadIdx.x; i < 3 * L; i += THREADS) tiles[i] = 0;
  __syncthreads();
  auto expert_of = [&](int pair) { return least(most((int)indices[pair], 0), DIM_E - 1); };
  for (int pair = threadIdx.x; pair < N; pair += THREADS) atomicAdd(&count[expert_of(pair)], 1);
  __syncthreads();
  // Where each thread's experts begin, in pairs and in tiles: running sums over lanes, then over warps.
  int places = 0, own_tiles = 0;
  for (int i = 0; i < EACH; ++i) {
    const int e = threadIdx.x * EACH + i;
    if (e < DIM_E) places += count[e], own_tiles += cdiv(count[e], TOKENS);
  }
  int place_end = places, tile_end = own_tiles;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int p = shuffle(place_end, lane - step), t = shuffle(tile_end, lane - step);
    if (lane >= step) place_end += p, tile_end += t;
  }
  if (lane == 31) warp_places[warp] = place_end, warp_tiles[warp] = tile_end;
  __syncthreads();
  int at = place_end - places, tile = tile_end - own_tiles;
  for (int w = 0; w < warp; ++w) at += warp_places[w], tile += warp_tiles[w];
  for (int i = 0; i < EACH; ++i) {
    const int e = threadIdx.x * EACH + i;
    if (e >= DIM_E) continue;
    place[e] = at;
    for (int done = 0; done < count[e]; done += TOKENS, ++tile) {
      tiles[3 * tile] = e, tiles[3 * tile + 1] = at + done, tiles[3 * tile + 2] = least(TOKENS, count[e] - done);
    }
    at += count[e];
  }
  __syncthreads();
  for (int pair = threadIdx.x; pair < N; pair += THREADS) order[atomicAdd(&place[expert_of(pair)], 1)] = pair;
}
