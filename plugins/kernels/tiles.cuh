// What a tile of rows goes through: copies to shared memory, and operands of products from there.
#pragma once
#include "mma.cuh"

// PIECE numbers to shared memory, of 16 bytes asynchronously; zeros where there is nowhere to copy from.
template <int PIECE, class T> __device__ __forceinline__ void copy_async(T* to, const T* from) {
  if (PIECE == 1) {
    *to = from ? *from : rounded<T>(0.0f);
  } else if (!from) {
    *reinterpret_cast<uint4*>(to) = uint4{0, 0, 0, 0};
  } else {
#ifdef EMULATED
    std::memcpy(to, from, 16);
#else
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((unsigned)__cvta_generic_to_shared(to)), "l"(from));
#endif
  }
}
__device__ __forceinline__ void commit_copies() {
#ifndef EMULATED
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Until all but the newest N committed groups have arrived.
template <int N> __device__ __forceinline__ void wait_for_copies() {
#ifndef EMULATED
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

// Operands of mma from shared memory, rows of `pitch` numbers: a from 16 rows of 16, b from 8 rows of 16 (its columns),
// or turned, from 16 rows of 8. Halves come by ldmatrix, for which lane i names row i % 8 of part i / 8.
template <class T> __device__ __forceinline__ void load_rows(Pair<T> (&a)[4], const T* tile, int pitch) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int i = 0; i < 4; ++i) a[i] = pair_at(tile + (g + i % 2 * 8) * pitch + 2 * t + i / 2 * 8);
}
template <class T> __device__ __forceinline__ void load_columns(Pair<T> (&b)[2], const T* tile, int pitch) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int i = 0; i < 2; ++i) b[i] = pair_at(tile + g * pitch + 2 * t + i * 8);
}
template <class T> __device__ __forceinline__ void load_turned(Pair<T> (&b)[2], const T* tile, int pitch) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int i = 0; i < 2; ++i) b[i] = {tile[(2 * t + i * 8) * pitch + g], tile[(2 * t + i * 8 + 1) * pitch + g]};
}
#ifndef EMULATED
template <class T> __device__ __forceinline__ Pair<T> pair_of(unsigned bits) {
  return {{(unsigned short)bits}, {(unsigned short)(bits >> 16)}};
}
template <class T> __device__ __forceinline__ void load_rows_half(Pair<T> (&a)[4], const T* tile, int pitch) {
  const int lane = threadIdx.x % 32;
  const unsigned at = (unsigned)__cvta_generic_to_shared(tile + (lane % 16) * pitch + lane / 16 * 8);
  unsigned r[4];
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
#pragma unroll
  for (int i = 0; i < 4; ++i) a[i] = pair_of<T>(r[i]);
}
#define LOAD_TWO(turned, at)                                                                                   \
  unsigned r[2];                                                                                               \
  asm volatile("ldmatrix.sync.aligned.m8n8.x2" turned ".shared.b16 {%0,%1}, [%2];"                             \
               : "=r"(r[0]), "=r"(r[1]) : "r"((unsigned)__cvta_generic_to_shared(at)) : "memory");             \
  b[0] = pair_of<T>(r[0]), b[1] = pair_of<T>(r[1])
template <class T> __device__ __forceinline__ void load_columns_half(Pair<T> (&b)[2], const T* tile, int pitch) {
  const int lane = threadIdx.x % 16;
  LOAD_TWO("", tile + lane % 8 * pitch + lane / 8 * 8);
}
template <class T> __device__ __forceinline__ void load_turned_half(Pair<T> (&b)[2], const T* tile, int pitch) {
  LOAD_TWO(".trans", tile + threadIdx.x % 16 * pitch);
}
#define BY_LDMATRIX(type)                                                                                                          \
  __device__ __forceinline__ void load_rows(Pair<type> (&a)[4], const type* tile, int pitch) { load_rows_half(a, tile, pitch); }       \
  __device__ __forceinline__ void load_columns(Pair<type> (&b)[2], const type* tile, int pitch) { load_columns_half(b, tile, pitch); } \
  __device__ __forceinline__ void load_turned(Pair<type> (&b)[2], const type* tile, int pitch) { load_turned_half(b, tile, pitch); }
BY_LDMATRIX(half)
BY_LDMATRIX(bfloat)
#endif
