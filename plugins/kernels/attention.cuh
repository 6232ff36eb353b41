// Attention of one query's heads over a share of the rows that it sees, whose keys are their own values.
//
//   score = SCALE q . row,  p = exp(score - top),  partial = sum of p row[:VALUES],  extent = (top, sum of p)
//
// A block has HEADS heads of one query, since all heads see the same rows: a tile of ROWS rows is fetched once, by
// asynchronous copies a tile ahead where STAGES is 2, multiplied by the queries (scores), and again by the
// probabilities (values). Tensor cores take both, with p rounded to the rows' type, as it was summed up. What is left
// over of the softmax is for attention_combine.
#pragma once
#include "tiles.cuh"

typedef TYPE_T Number;
constexpr int WIDTH = (DIM_W + 15) / 16 * 16;                  // of rows in shared memory, zeros behind DIM_W
constexpr int PITCH = WIDTH + 16 / sizeof(Number);             // rows start in different banks
constexpr int P_PITCH = ROWS + 16 / sizeof(Number);
constexpr int WARPS = THREADS / 32, STRIPS = HEADS / 16;       // heads go by 16 through a product
constexpr int SCORE_TILES = ROWS / 8, SCORE_WARPS = WARPS / STRIPS;
constexpr int SCORES_EACH = (SCORE_TILES + SCORE_WARPS - 1) / SCORE_WARPS;
constexpr int VALUE_TILES = (VALUES + 7) / 8, VALUES_EACH = (VALUE_TILES + WARPS - 1) / WARPS;
constexpr bool BY_16_BYTES = DIM_W * sizeof(Number) % 16 == 0;

struct Shared {
  Number q[HEADS * PITCH], rows[STAGES][ROWS * PITCH], p[HEADS * P_PITCH];
  float score[HEADS * ROWS], top[HEADS], sum[HEADS], factor[HEADS];
  int there[STAGES][ROWS];
};
static_assert(sizeof(Shared) <= SHARED_SIZE, "a launch asks for less shared memory than is used");

// Rows to shared memory, from any function of their number; of those there are none of, zeros.
template <int COUNT, class At> __device__ __forceinline__ void fetch(Number* to, At at, int* there) {
  constexpr int PIECE = BY_16_BYTES ? 16 / sizeof(Number) : 1, PIECES = WIDTH / PIECE;
  for (int i = threadIdx.x; i < COUNT * PIECES; i += THREADS) {
    const int row = i / PIECES, column = i % PIECES * PIECE;
    const Number* from = at(row);
    if (there && column == 0) there[row] = from != nullptr;
    copy_async<PIECE>(to + row * PITCH + column, from && column < DIM_W ? from + column : nullptr);
  }
}

__device__ __forceinline__ void score(Shared& s, int stage) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, strip = warp % STRIPS;
  if (warp / STRIPS >= SCORE_WARPS) return;
  float c[SCORES_EACH][4] = {};
#pragma unroll 4
  for (int k = 0; k < WIDTH; k += 16) {
    Pair<Number> a[4], b[2];
    load_rows(a, s.q + strip * 16 * PITCH + k, PITCH);
#pragma unroll
    for (int i = 0; i < SCORES_EACH; ++i) {
      const int tile = warp / STRIPS + i * SCORE_WARPS;
      if (tile >= SCORE_TILES) continue;
      load_columns(b, s.rows[stage] + tile * 8 * PITCH + k, PITCH);
      mma(c[i], a, b);
    }
  }
#pragma unroll
  for (int i = 0; i < SCORES_EACH; ++i) {
    const int tile = warp / STRIPS + i * SCORE_WARPS;
    if (tile >= SCORE_TILES) continue;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int head = strip * 16 + lane / 4 + j / 2 * 8, row = tile * 8 + lane % 4 * 2 + j % 2;
      s.score[head * ROWS + row] = s.there[stage][row] ? c[i][j] * SCALE : NEGATIVE_INFINITY;
    }
  }
}

// From scores to probabilities, with what was summed before brought to the new maximum.
__device__ __forceinline__ void soften(Shared& s) {
  const int lane = threadIdx.x % 32;
  for (int head = threadIdx.x / 32; head < HEADS; head += WARPS) {
    float top = s.top[head], sum = 0;
#pragma unroll
    for (int row = lane; row < ROWS + lane; row += 32)
      if (row < ROWS) top = fmaxf(top, s.score[head * ROWS + row]);
    top = warp_max(top);
#pragma unroll
    for (int row = lane; row < ROWS + lane; row += 32)
      if (row < ROWS) {
        const float score = s.score[head * ROWS + row];
        const Number p = rounded<Number>(score == NEGATIVE_INFINITY ? 0.0f : expf(score - top));
        s.p[head * P_PITCH + row] = p;
        sum += to_float(p);
      }
    sum = warp_sum(sum);
    if (lane == 0) {
      const float factor = s.top[head] == NEGATIVE_INFINITY ? 0.0f : expf(s.top[head] - top);
      s.factor[head] = factor, s.sum[head] = s.sum[head] * factor + sum, s.top[head] = top;
    }
    __syncwarp();
  }
}

typedef float Sums[STRIPS][VALUES_EACH][4];

__device__ __forceinline__ void mix(Sums& sums, const Shared& s, int stage) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int strip = 0; strip < STRIPS; ++strip) {
    const float low = s.factor[strip * 16 + lane / 4], high = s.factor[strip * 16 + lane / 4 + 8];
#pragma unroll
    for (int i = 0; i < VALUES_EACH; ++i)
      sums[strip][i][0] *= low, sums[strip][i][1] *= low, sums[strip][i][2] *= high, sums[strip][i][3] *= high;
  }
#pragma unroll
  for (int k = 0; k < ROWS; k += 16) {
    Pair<Number> a[STRIPS][4], b[2];
#pragma unroll
    for (int strip = 0; strip < STRIPS; ++strip) load_rows(a[strip], s.p + strip * 16 * P_PITCH + k, P_PITCH);
#pragma unroll
    for (int i = 0; i < VALUES_EACH; ++i) {
      const int tile = warp + i * WARPS;
      if (tile >= VALUE_TILES) continue;
      load_turned(b, s.rows[stage] + k * PITCH + tile * 8, PITCH);
#pragma unroll
      for (int strip = 0; strip < STRIPS; ++strip) mma(sums[strip][i], a[strip], b);
    }
  }
}

// Block (m, group of heads, split) of a grid. `Rows` has how many rows the query sees (count), and where each is (at),
// or null where it is not one.
template <class Rows>
__device__ __forceinline__ void attend(const Number* q, const Rows rows, int splits, float* partial, float* extent) {
  SHARED_BYTES(bytes);
  Shared& s = *reinterpret_cast<Shared*>(bytes);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, first_head = blockIdx.y * HEADS;
  const long long m = blockIdx.x;
  const int tiles = cdiv(rows.count, ROWS), share = cdiv(tiles, splits);
  const int begin = blockIdx.z * share, end = least(tiles, begin + share);
  auto fetch_tile = [&](int tile, int stage) {
    fetch<ROWS>(s.rows[stage], [&](int row) {
      const int n = tile * ROWS + row;
      return n < rows.count ? rows.at(n) : nullptr;
    }, s.there[stage]);
  };
  fetch<HEADS>(s.q, [&](int head) {
    return first_head + head < DIM_H ? q + (m * DIM_H + first_head + head) * DIM_W : nullptr;
  }, nullptr);
  for (int head = threadIdx.x; head < HEADS; head += THREADS) s.top[head] = NEGATIVE_INFINITY, s.sum[head] = 0;
  if (begin < end) fetch_tile(begin, 0);
  commit_copies();
  Sums sums = {};
  for (int tile = begin; tile < end; ++tile) {
    const int stage = STAGES == 2 ? (tile - begin) % 2 : 0;
    if (STAGES == 2 && tile + 1 < end) fetch_tile(tile + 1, 1 - stage);
    commit_copies();
    wait_for_copies<STAGES == 2 ? 1 : 0>();
    __syncthreads();
    score(s, stage);
    __syncthreads();
    soften(s);
    __syncthreads();
    mix(sums, s, stage);
    __syncthreads();
    if (STAGES == 1 && tile + 1 < end) fetch_tile(tile + 1, 0);
  }
  const long long at = (m * splits + blockIdx.z) * DIM_H;
#pragma unroll
  for (int strip = 0; strip < STRIPS; ++strip)
#pragma unroll
    for (int i = 0; i < VALUES_EACH; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int head = first_head + strip * 16 + lane / 4 + j / 2 * 8, column = (warp + i * WARPS) * 8 + lane % 4 * 2 + j % 2;
        if (head < DIM_H && column < VALUES) partial[(at + head) * VALUES + column] = sums[strip][i][j];
      }
  for (int head = threadIdx.x; head < HEADS; head += THREADS)
    if (first_head + head < DIM_H) {
      extent[(at + first_head + head) * 2] = s.top[head];
      extent[(at + first_head + head) * 2 + 1] = s.sum[head];
    }
}

// The newest rows that a query sees: those of tokens held in a ring of `size`, token t at t % size, and new ones.
struct Window {
  const Number *ring, *fresh;
  int size, position, first, count;
  __device__ __forceinline__ Window(const Number* ring, const Number* fresh, int size, int position, int step, int since)
      : ring(ring), fresh(fresh), size(size), position(position), first(most(most(since, 0), position + step + 1 - size)),
        count(position + step + 1 - first) {}
  __device__ __forceinline__ const Number* at(int n) const {
    const int token = first + n;
    return token < position ? ring + (long long)(token % size) * DIM_W : fresh + (long long)(token - position) * DIM_W;
  }
};

// Rows by number: those held in a cache of `size`, and new ones behind them; null where there is none.
struct Numbered {
  const Number *cache, *fresh;
  int size, added, held;
  __device__ __forceinline__ const Number* at(long long n) const {
    if (n < 0 || n >= (long long)held + added) return nullptr;
    return n < held ? (n < size ? cache + n * DIM_W : nullptr) : fresh + (n - held) * DIM_W;
  }
};
