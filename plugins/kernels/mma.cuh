// Products of small matrices by a warp: D[16 x 8] += A[16 x 16] B[16 x 8], float32 sums.
//
// Operands are pairs of neighbouring k. Lane 4 g + t holds, as PTX lays out mma.m16n8k16,
//   a: rows g, g + 8 at k = 2t, 2t + 1, then the same rows at k + 8;   b: column g at k = 2t, 2t + 1, then at k + 8;
//   c: row g, columns 2t and 2t + 1, then row g + 8.
// The order of k is free as long as both operands have the same: a lane that reads eight values in a row of memory
// has two such steps in its hands (chunk).
#pragma once
#include "v4.cuh"

template <class T> struct __align__(2 * sizeof(T)) Pair { T x, y; };

template <class T> __device__ __forceinline__ Pair<T> pair_at(const T* at) { return *reinterpret_cast<const Pair<T>*>(at); }

#ifndef EMULATED
template <class T> __device__ __forceinline__ unsigned bits_of(Pair<T> p) { return (unsigned)p.x.bits | (unsigned)p.y.bits << 16; }

#define MMA(type)                                                                                             \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "   \
               "{%8,%9}, {%0,%1,%2,%3};"                                                                      \
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                               \
               : "r"(bits_of(a[0])), "r"(bits_of(a[1])), "r"(bits_of(a[2])), "r"(bits_of(a[3])),              \
                 "r"(bits_of(b[0])), "r"(bits_of(b[1])))
__device__ __forceinline__ void mma(float (&c)[4], const Pair<half> (&a)[4], const Pair<half> (&b)[2]) { MMA("f16"); }
__device__ __forceinline__ void mma(float (&c)[4], const Pair<bfloat> (&a)[4], const Pair<bfloat> (&b)[2]) { MMA("bf16"); }
#else
template <class T> inline void mma(float (&c)[4], const Pair<T> (&a)[4], const Pair<T> (&b)[2]) {
  struct Held { Pair<T> a[4], b[2]; } held;
  for (int i = 0; i < 4; ++i) held.a[i] = a[i];
  for (int i = 0; i < 2; ++i) held.b[i] = b[i];
  emulated::put(held);
  const int g = emulated::current % 32 / 4, t = emulated::current % 4;
  for (int s = 0; s < 4; ++s) {
    const Held rows = emulated::get<Held>(4 * g + s);
    for (int j = 0; j < 2; ++j) {
      const Held column = emulated::get<Held>(4 * (2 * t + j) + s);
      for (int step = 0; step < 2; ++step)
        for (int row = 0; row < 2; ++row)
          c[2 * row + j] += to_float(rows.a[2 * step + row].x) * to_float(column.b[step].x)
                          + to_float(rows.a[2 * step + row].y) * to_float(column.b[step].y);
    }
  }
  emulated::wait(emulated::IN_WARP);
}
#endif

// The same for float32, which tensor cores would round: by shuffles.
__device__ __forceinline__ void mma(float (&c)[4], const Pair<float> (&a)[4], const Pair<float> (&b)[2]) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int s = 0; s < 4; ++s)
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      float row[2][2], column[2][2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        row[i][0] = shuffle(a[2 * step + i].x, 4 * g + s), row[i][1] = shuffle(a[2 * step + i].y, 4 * g + s);
        column[i][0] = shuffle(b[step].x, 4 * (2 * t + i) + s), column[i][1] = shuffle(b[step].y, 4 * (2 * t + i) + s);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int j = 0; j < 2; ++j) c[2 * i + j] += row[i][0] * column[j][0] + row[i][1] * column[j][1];
    }
}

// Products of two pairs, each rounded to the type.
__device__ __forceinline__ Pair<float> times(Pair<float> a, Pair<float> b) { return {a.x * b.x, a.y * b.y}; }
#ifndef EMULATED
__device__ __forceinline__ Pair<half> times(Pair<half> a, Pair<half> b) {
  unsigned y;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(y) : "r"(bits_of(a)), "r"(bits_of(b)));
  return {{(unsigned short)y}, {(unsigned short)(y >> 16)}};
}
__device__ __forceinline__ Pair<bfloat> times(Pair<bfloat> a, Pair<bfloat> b) {
  unsigned y;  // there is no product of its own before sm_90; adding -0 changes nothing
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(y) : "r"(bits_of(a)), "r"(bits_of(b)), "r"(0x80008000u));
  return {{(unsigned short)y}, {(unsigned short)(y >> 16)}};
}
#else
template <class T> inline Pair<T> times(Pair<T> a, Pair<T> b) {
  return {rounded<T>(to_float(a.x) * to_float(b.x)), rounded<T>(to_float(a.y) * to_float(b.y))};
}
#endif

// Eight neighbouring numbers of a row: what a lane holds of a row or column for two steps of 16. In a block of 32 numbers
// from k0 on, lane 4 g + t has those from k0 + 8 t on.
template <class T> struct Chunk { Pair<T> pair[4]; };

// Numbers k .. k + 7 of a row of `width`, zeros behind its end. WHOLE: widths are multiples of 8 and rows stand on
// multiples of 16 bytes.
template <bool WHOLE, class T> __device__ __forceinline__ Chunk<T> chunk_at(const T* row, int k, int width) {
  Chunk<T> chunk;
  if (WHOLE && k < width) {
    constexpr int VECTORS = sizeof(chunk) / sizeof(uint4);
#pragma unroll
    for (int i = 0; i < VECTORS; ++i) {
      const uint4 bits = reinterpret_cast<const uint4*>(row + k)[i];
      memcpy(reinterpret_cast<unsigned char*>(&chunk) + 16 * i, &bits, 16);
    }
    return chunk;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    chunk.pair[i].x = k + 2 * i < width ? row[k + 2 * i] : rounded<T>(0.0f);
    chunk.pair[i].y = k + 2 * i + 1 < width ? row[k + 2 * i + 1] : rounded<T>(0.0f);
  }
  return chunk;
}

// c += A B over the 32 numbers of k that the chunks of a quad have: rows g and g + 8 of A, column g of B.
template <class T>
__device__ __forceinline__ void mma(float (&c)[4], const Chunk<T>& low, const Chunk<T>& high, const Chunk<T>& column) {
#pragma unroll
  for (int step = 0; step < 2; ++step) {
    const Pair<T> a[4] = {low.pair[2 * step], high.pair[2 * step], low.pair[2 * step + 1], high.pair[2 * step + 1]};
    const Pair<T> b[2] = {column.pair[2 * step], column.pair[2 * step + 1]};
    mma(c, a, b);
  }
}
