// What every kernel is written with: half types, conversions, warp reductions. It needs no header of CUDA's, so that
// NVRTC compiles it by itself, and nothing of a GPU: with EMULATED defined, emulated.hpp stands for the rest.
#pragma once

#ifndef EMULATED
#define SHARED_BYTES(name) extern __shared__ __align__(16) unsigned char name[]
#define LOWEST_FLOAT __int_as_float(0xff7fffff)
#define NEGATIVE_INFINITY __int_as_float(0xff800000)
#endif

struct half { unsigned short bits; };
struct bfloat { unsigned short bits; };

__device__ __forceinline__ float bits_to_float(unsigned bits) { return __int_as_float((int)bits); }
__device__ __forceinline__ unsigned float_to_bits(float x) { return (unsigned)__float_as_int(x); }

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bfloat x) { return bits_to_float((unsigned)x.bits << 16); }
__device__ __forceinline__ float to_float(half x) {
#ifdef EMULATED
  return emulated::half_to_float(x.bits);
#else
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
#endif
}

// The nearest number of a type, ties to even.
template <class T> __device__ __forceinline__ T rounded(float x);
template <> __device__ __forceinline__ float rounded<float>(float x) { return x; }
template <> __device__ __forceinline__ bfloat rounded<bfloat>(float x) {
#ifdef EMULATED
  unsigned bits = float_to_bits(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {(unsigned short)(bits >> 16 | 0x40u)};  // not a number
  return {(unsigned short)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
#else
  bfloat y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
#endif
}
template <> __device__ __forceinline__ half rounded<half>(float x) {
#ifdef EMULATED
  return {emulated::float_to_half(x)};
#else
  half y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
#endif
}

template <class T> __device__ __forceinline__ T shuffle(T x, int lane) { return __shfl_sync(0xffffffffu, x, lane); }
template <class T> __device__ __forceinline__ T shuffle_xor(T x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int mask = 16; mask; mask >>= 1) x += shuffle_xor(x, mask);
  return x;
}
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int mask = 16; mask; mask >>= 1) x = fmaxf(x, shuffle_xor(x, mask));
  return x;
}

// The sum over a block of THREADS threads, known to all of them; `scratch` has a float for each warp.
__device__ __forceinline__ float block_sum(float x, float* scratch) {
  x = warp_sum(x);
  if (THREADS == 32) return x;
  __syncthreads();
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
  __syncthreads();
  float sum = 0;
#pragma unroll
  for (int warp = 0; warp < THREADS / 32; ++warp) sum += scratch[warp];
  return sum;
}

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }
__device__ __forceinline__ int least(int a, int b) { return a < b ? a : b; }
__device__ __forceinline__ int most(int a, int b) { return a > b ? a : b; }
__device__ __forceinline__ int cdiv(int a, int b) { return (a + b - 1) / b; }

// N neighbouring numbers that stand on a multiple of their bytes, or of 16, moved at once and widened to float32.
template <class T, int N> struct __align__(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Several { T at[N]; };
template <int N, class T> __device__ __forceinline__ void load_floats(const T* from, float* x) {
  const Several<T, N> all = *reinterpret_cast<const Several<T, N>*>(from);
#pragma unroll
  for (int i = 0; i < N; ++i) x[i] = to_float(all.at[i]);
}
// Stores of a vector, said so outright: the compiler takes them apart where an address is also used elsewhere. What a
// kernel stores like this it must not load again.
template <class Bits> __device__ __forceinline__ void store(Bits* to, Bits x) { *to = x; }
#ifndef EMULATED
__device__ __forceinline__ void store(uint2* to, uint2 x) {
  asm volatile("st.v2.b32 [%0], {%1, %2};" ::"l"(to), "r"(x.x), "r"(x.y));
}
__device__ __forceinline__ void store(uint4* to, uint4 x) {
  asm volatile("st.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w));
}
#endif
template <int BYTES> struct Moved { using type = unsigned short; };
template <> struct Moved<4> { using type = unsigned; };
template <> struct Moved<8> { using type = uint2; };
template <> struct Moved<16> { using type = uint4; };
template <int N, class T> __device__ __forceinline__ void store_floats(T* to, const float* x) {
  Several<T, N> all;
#pragma unroll
  for (int i = 0; i < N; ++i) all.at[i] = rounded<T>(x[i]);
  typename Moved<sizeof all>::type bits;
  memcpy(&bits, &all, sizeof all);
  store(reinterpret_cast<decltype(bits)*>(to), bits);
}
