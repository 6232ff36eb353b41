// Rows of experts' matrices in their stored form, as operands of products: numbers of the activations' type, FP8 E4M3
// with a multiplier for each block, or packed E2M1 with one for each 32 numbers of a row.
//
// A lane reads 16 bytes of a row at once. Where that is more than eight numbers, they are several chunks, and the order
// of k follows: lane 4 g + t has numbers t * SPAN .. (t + 1) * SPAN - 1 of each BLOCK, of both operands.
#pragma once
#include "../kernels/mma.cuh"

#define PLAIN 0
#define FP8 1
#define FP4 2

typedef TYPE_T Number;
constexpr int CHUNKS = FORMAT == FP8 ? 2 : FORMAT == FP4 ? 4 : 1, SPAN = 8 * CHUNKS, BLOCK = 4 * SPAN;
constexpr int WARPS = THREADS / 32, TILES = TOKENS / 8;

// E matrices: a table of their addresses, or PARTS stacks of PART matrices each.
#if PARTS == 0
#define STACK(name) const long long* __restrict__ name
#define GIVEN(name) name
typedef const long long* Stack;
#else
struct Stack { const unsigned char* part[4]; };
#define PART_OF(name, i) const unsigned char* __restrict__ name##i
#if PARTS == 1
#define STACK(name) PART_OF(name, 0)
#define GIVEN(name) Stack{{name##0, name##0, name##0, name##0}}
#elif PARTS == 2
#define STACK(name) PART_OF(name, 0), PART_OF(name, 1)
#define GIVEN(name) Stack{{name##0, name##1, name##1, name##1}}
#elif PARTS == 3
#define STACK(name) PART_OF(name, 0), PART_OF(name, 1), PART_OF(name, 2)
#define GIVEN(name) Stack{{name##0, name##1, name##2, name##2}}
#else
#define STACK(name) PART_OF(name, 0), PART_OF(name, 1), PART_OF(name, 2), PART_OF(name, 3)
#define GIVEN(name) Stack{{name##0, name##1, name##2, name##3}}
#endif
#endif

// Expert e's matrix, of so many bytes.
__device__ __forceinline__ const unsigned char* matrix_of(const Stack stack, int e, long long bytes) {
#if PARTS == 0
  return reinterpret_cast<const unsigned char*>(stack[e]);
#else
  const int part = e / PART;  // compared, since what is indexed by a variable does not stay in registers
  const unsigned char* at = part == 0 ? stack.part[0] : part == 1 ? stack.part[1] : part == 2 ? stack.part[2] : stack.part[3];
  return at + (e - part * PART) * bytes;
#endif
}

// What a stored matrix [HEIGHT, WIDTH] is made of.
template <int HEIGHT, int WIDTH> struct Stored {
  static constexpr long long ROW = FORMAT == FP4 ? WIDTH / 2 : FORMAT == FP8 ? WIDTH : WIDTH * sizeof(Number);
  static constexpr int SCALES = FORMAT == FP4 ? WIDTH / 32 : FORMAT == FP8 ? (WIDTH + COLUMNS - 1) / COLUMNS : 0;
  static constexpr long long SCALE_ROWS = FORMAT == FP4 ? HEIGHT : FORMAT == FP8 ? (HEIGHT + ROWS - 1) / ROWS : 0;
  static constexpr int SCALE_BYTES = FORMAT == FP4 ? 2 : 4;
  const unsigned char *numbers, *scales;
  __device__ __forceinline__ Stored(const Stack matrices, const Stack multipliers, int e)
      : numbers(matrix_of(matrices, e, HEIGHT * ROW)), scales(matrix_of(multipliers, e, SCALE_ROWS * SCALES * SCALE_BYTES)) {}
};

// Two numbers from their codes, which stand in the low bits of the two halves of a word. The codes' bits are those of a
// number of the wider type, but for its exponent's bias.
__device__ __forceinline__ void from_bits(Pair<float>& to, unsigned two, unsigned sign, unsigned rest, int up, int shift) {
  to = {bits_to_float((two & sign) << (24 + up) | (two & rest) << (16 + shift)),
        bits_to_float((two >> 16 & sign) << (24 + up) | (two >> 16 & rest) << (16 + shift))};
}
template <class T> __device__ __forceinline__ void from_bits(Pair<T>& to, unsigned two, unsigned sign, unsigned rest, int up, int shift) {
  const unsigned bits = (two & (sign | sign << 16)) << (8 + up) | (two & (rest | rest << 16)) << shift;
  to = {{(unsigned short)bits}, {(unsigned short)(bits >> 16)}};
}
template <class T> struct Bias;  // by how much a code is shifted, and what brings its exponent right
template <> struct Bias<float> { static constexpr int FP8_SHIFT = 4, FP4_SHIFT = 6; static constexpr float FP8_POWER = 0x1p120f, FP4_POWER = 0x1p126f; };
template <> struct Bias<bfloat> : Bias<float> {};
template <> struct Bias<half> { static constexpr int FP8_SHIFT = 7, FP4_SHIFT = 9; static constexpr float FP8_POWER = 0x1p8f, FP4_POWER = 0x1p14f; };

__device__ __forceinline__ Pair<Number> both(float x) { return {rounded<Number>(x), rounded<Number>(x)}; }
__device__ __forceinline__ Pair<Number> from_fp8(unsigned two) {
  Pair<Number> pair;
  from_bits(pair, two, 0x80u, 0x7fu, 0, Bias<Number>::FP8_SHIFT);
  return times(pair, both(Bias<Number>::FP8_POWER));
}
__device__ __forceinline__ Pair<Number> from_fp4(unsigned two) {
  Pair<Number> pair;
  from_bits(pair, two, 0x8u, 0x7u, 4, Bias<Number>::FP4_SHIFT);
  return times(pair, both(Bias<Number>::FP4_POWER));
}

typedef Chunk<Number> Span[CHUNKS];

// Numbers k .. k + SPAN - 1 of a row of tokens.
__device__ __forceinline__ void load(Span& span, const Number* row, int k, int width, bool there) {
#pragma unroll
  for (int i = 0; i < CHUNKS; ++i) span[i] = chunk_at<EVEN>(row, there ? k + 8 * i : width, width);
}

// The same of a row of a matrix, as it is stored until a chunk of it is wanted.
struct Held {
  Chunk<Number> plain;
  unsigned words[4];
  Pair<Number> power;  // FP4's multiplier, a power of two: products with it are exact

  template <int HEIGHT, int WIDTH>
  __device__ __forceinline__ Held(const Stored<HEIGHT, WIDTH>& matrix, int row, int k) {
    const unsigned char* at = matrix.numbers + row * Stored<HEIGHT, WIDTH>::ROW;
    const bool there = row < HEIGHT && k < WIDTH;
    if (FORMAT == PLAIN) {
      plain = chunk_at<EVEN>(reinterpret_cast<const Number*>(at), there ? k : WIDTH, WIDTH);
      return;
    }
    constexpr int BYTES = 16, A_BYTE = FORMAT == FP4 ? 2 : 1;
    uint4 bits = {};
    if (WIDTH % SPAN == 0 && there) bits = *reinterpret_cast<const uint4*>(at + k / A_BYTE);
    words[0] = bits.x, words[1] = bits.y, words[2] = bits.z, words[3] = bits.w;
    if (WIDTH % SPAN && there) {
#pragma unroll
      for (int i = 0; i < BYTES; ++i)
        if (k + i * A_BYTE < WIDTH) words[i / 4] |= (unsigned)at[k / A_BYTE + i] << 8 * (i % 4);
    }
    power = both(1.0f);
    if (FORMAT == FP4 && there)
      power = both(to_float(reinterpret_cast<const bfloat*>(matrix.scales)[row * Stored<HEIGHT, WIDTH>::SCALES + k / 32]));
  }

  __device__ __forceinline__ Chunk<Number> chunk(int i) const {
    if (FORMAT == PLAIN) return plain;
    Chunk<Number> chunk;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (FORMAT == FP8) {
        const unsigned two = words[2 * i + j / 2] >> 16 * (j % 2);
        chunk.pair[j] = from_fp8((two & 0xffu) | (two & 0xff00u) << 8);
      } else {
        const unsigned two = words[i] >> 8 * j;
        chunk.pair[j] = times(from_fp4((two & 0xfu) | (two & 0xf0u) << 12), power);
      }
    }
    return chunk;
  }
};

// The multiplier of row `row` of an FP8 matrix in the BLOCK that starts at column k, whichever lane's numbers it is for.
template <int HEIGHT, int WIDTH>
__device__ __forceinline__ float scale_of(const Stored<HEIGHT, WIDTH>& matrix, int row, int k) {
  if (FORMAT != FP8 || row >= HEIGHT) return 1.0f;
  return reinterpret_cast<const float*>(matrix.scales)[row / ROWS * Stored<HEIGHT, WIDTH>::SCALES + k / COLUMNS];
}

typedef float Sums[TILES][4];

// sums += rows `first` .. `first` + 15 of a matrix times columns of tokens, over the BLOCK that starts at column k.
template <int HEIGHT, int WIDTH>
__device__ __forceinline__ void multiply(Sums& sums, const Stored<HEIGHT, WIDTH>& matrix, int first, int k, const Span (&tokens)[TILES], int count) {
  const int row = first + threadIdx.x % 32 / 4;
  const Held low(matrix, row, k + threadIdx.x % 4 * SPAN), high(matrix, row + 8, k + threadIdx.x % 4 * SPAN);
  Sums block = {};  // of FP8, to be multiplied
#pragma unroll
  for (int i = 0; i < CHUNKS; ++i) {
    const Chunk<Number> below = low.chunk(i), above = high.chunk(i);
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile)
      if (tile * 8 < count) mma(FORMAT == FP8 ? block[tile] : sums[tile], below, above, tokens[tile][i]);
  }
  if (FORMAT != FP8) return;
  const float below = scale_of(matrix, row, k), above = scale_of(matrix, row + 8, k);
#pragma unroll
  for (int tile = 0; tile < TILES; ++tile) {
    sums[tile][0] += block[tile][0] * below, sums[tile][1] += block[tile][1] * below;
    sums[tile][2] += block[tile][2] * above, sums[tile][3] += block[tile][3] * above;
  }
}

// A warp's sums for the whole block: [row of 16][token], in shared memory of its own.
__device__ __forceinline__ void lay_down(float* to, const Sums& sums) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
    for (int j = 0; j < 4; ++j) to[(g + j / 2 * 8) * TOKENS + tile * 8 + 2 * t + j % 2] = sums[tile][j];
}
__device__ __forceinline__ float picked_up(const float (&of)[WARPS][16 * TOKENS], int i) {
  float sum = 0;
#pragma unroll
  for (int warp = 0; warp < WARPS; ++warp) sum += of[warp][i];
  return sum;
}
