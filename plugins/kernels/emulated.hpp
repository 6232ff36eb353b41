// CUDA's execution on a CPU: enough of it to run this folder's kernels, a block at a time, a fibre a thread.
//
// Threads of a warp meet at shuffles and matrix products, those of a block at __syncthreads; whoever is missing there is
// an error, as is a barrier that a thread left the kernel before. Shared memory starts as rubbish. What it cannot find
// are races between two meetings, and what memory a GPU makes visible when.
#pragma once
#include <csetjmp>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <tuple>
#include <ucontext.h>
#include <utility>
#include <vector>

struct dim3 { unsigned x = 1, y = 1, z = 1; };
struct uint2 { unsigned x, y; };
struct uint4 { unsigned x, y, z, w; };
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__
#define __align__(n) alignas(n)
#define __shared__ static
#define SHARED_BYTES(name) unsigned char* const name = emulated::shared.data()
#define LOWEST_FLOAT __int_as_float(0xff7fffff)
#define NEGATIVE_INFINITY (-INFINITY)

inline float __int_as_float(int bits) { float x; std::memcpy(&x, &bits, 4); return x; }
inline int __float_as_int(float x) { int bits; std::memcpy(&bits, &x, 4); return bits; }

namespace emulated {
constexpr int MAX_THREADS = 1024, STACK = 1 << 17, BOX = 64;
enum State { RUNS, IN_WARP, IN_BLOCK, DONE };

struct Fibre { ucontext_t context; jmp_buf at; std::vector<char> stack; State state; bool begun; };
inline std::vector<Fibre> fibres(MAX_THREADS);
inline ucontext_t start;
inline jmp_buf scheduler;
inline int current, threads;
inline std::vector<unsigned char> shared;
inline unsigned char box[MAX_THREADS][BOX];
inline void (*body)();

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulated kernel: %s (block %u %u %u, thread %d)\n", what, blockIdx.x, blockIdx.y, blockIdx.z, current);
  std::abort();
}

inline void enter() {
  body();
  fibres[current].state = DONE;
  _longjmp(scheduler, 1);
}

inline void wait(State state) {
  Fibre& fibre = fibres[current];
  fibre.state = state;
  if (_setjmp(fibre.at) == 0) _longjmp(scheduler, 1);
}

// Runs one thread until it waits or is done. Locals must not live across the jumps, hence a function of its own.
inline void resume(int thread) {
  current = thread;
  threadIdx = {(unsigned)thread, 0, 0};
  if (_setjmp(scheduler)) return;
  Fibre& fibre = fibres[thread];
  if (fibre.begun) _longjmp(fibre.at, 1);
  fibre.begun = true;
  getcontext(&fibre.context);
  fibre.context.uc_stack.ss_sp = fibre.stack.data();
  fibre.context.uc_stack.ss_size = fibre.stack.size();
  fibre.context.uc_link = nullptr;
  makecontext(&fibre.context, (void (*)())enter, 0);
  swapcontext(&start, &fibre.context);
}

// Whether all of [first, last) wait for the same thing; a mixture with finished ones is an error.
inline bool meet(int first, int last, State state, const char* what) {
  int here = 0, gone = 0;
  for (int i = first; i < last; ++i) here += fibres[i].state == state, gone += fibres[i].state == DONE;
  if (here == 0) return false;
  if (here + gone == last - first && gone) fail(what);
  if (here < last - first) return false;
  for (int i = first; i < last; ++i) fibres[i].state = RUNS;
  return true;
}

inline void run_block() {
  for (int i = 0; i < threads; ++i) fibres[i].state = RUNS, fibres[i].begun = false;
  for (;;) {
    int done = 0;
    for (int i = 0; i < threads; ++i) {
      if (fibres[i].state == RUNS) resume(i);
      done += fibres[i].state == DONE;
    }
    if (done == threads) return;
    bool released = false;
    for (int first = 0; first < threads; first += 32)
      released |= meet(first, first + 32, IN_WARP, "a lane left before its warp's meeting");
    if (!released && !meet(0, threads, IN_BLOCK, "a thread left before its block's barrier"))
      fail("threads wait for each other in different places");
  }
}

inline void launch(const int* grid, int block, int shared_bytes, void (*kernel)()) {
  if (block % 32) fail("blocks are whole warps");
  gridDim = {(unsigned)grid[0], (unsigned)grid[1], (unsigned)grid[2]};
  blockDim = {(unsigned)block, 1, 1};
  threads = block;
  body = kernel;
  for (int i = 0; i < block; ++i) fibres[i].stack.resize(STACK);
  for (unsigned z = 0; z < gridDim.z; ++z)
    for (unsigned y = 0; y < gridDim.y; ++y)
      for (unsigned x = 0; x < gridDim.x; ++x) {
        blockIdx = {x, y, z};
        shared.assign(shared_bytes + 16, 0xcd);
        run_block();
      }
}

// What every lane of the warp put forward, once all have.
template <class T> inline void put(const T& value) {
  static_assert(sizeof(T) <= BOX);
  std::memcpy(box[current], &value, sizeof value);
  wait(IN_WARP);
}
template <class T> inline T get(int lane) {
  T value;
  std::memcpy(&value, box[(current & ~31) | (lane & 31)], sizeof value);
  return value;
}
template <class T> inline T exchange(T value, int lane) {
  put(value);
  T got = get<T>(lane);
  wait(IN_WARP);
  return got;
}

inline float half_to_float(unsigned short h) {
  int e = h >> 10 & 31, m = h & 1023;
  float x = e == 31 ? (m ? NAN : INFINITY) : e ? std::ldexp(1024.0f + m, e - 25) : std::ldexp((float)m, -24);
  return h & 0x8000 ? -x : x;
}
inline unsigned short float_to_half(float x) {
  unsigned short sign = std::signbit(x) ? 0x8000 : 0;
  float a = std::fabs(x);
  if (std::isnan(x)) return sign | 0x7e00;
  if (a >= 65520.0f) return sign | 0x7c00;
  int e;
  std::frexp(a, &e);
  int shift = (e > -14 ? e : -13) - 11;  // of the last bit that is kept
  float scaled = std::nearbyint(std::ldexp(a, -shift));
  if (scaled >= 2048.0f) scaled /= 2, ++shift;
  unsigned bits = (unsigned)scaled;
  return sign | (unsigned short)(bits < 1024 ? bits : bits - 1024 + ((shift + 25) << 10));
}

template <class... A, std::size_t... I> void call(void (*kernel)(A...), void** args, std::index_sequence<I...>) {
  kernel(*static_cast<std::remove_cv_t<A>*>(args[I])...);
}
template <class... A> void call(void (*kernel)(A...), void** args) { call(kernel, args, std::index_sequence_for<A...>{}); }
inline void** arguments;
}  // namespace emulated

inline void __syncthreads() { emulated::wait(emulated::IN_BLOCK); }
inline void __syncwarp() { emulated::wait(emulated::IN_WARP); }
template <class T> inline T __shfl_sync(unsigned, T value, int lane) { return emulated::exchange(value, lane); }
template <class T> inline T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulated::exchange(value, (emulated::current & 31) ^ mask);
}
inline unsigned __ballot_sync(unsigned, bool vote) {
  emulated::put(vote);
  unsigned votes = 0;
  for (int lane = 0; lane < 32; ++lane) votes |= (unsigned)emulated::get<bool>(lane) << lane;
  emulated::wait(emulated::IN_WARP);
  return votes;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int atomicAdd(int* at, int value) { int old = *at; *at += value; return old; }
inline unsigned atomicOr(unsigned* at, unsigned value) { unsigned old = *at; *at |= value; return old; }

// The library's only function: `grid` has three numbers, `args` the address of every parameter.
#define EMULATE(entry)                                                                             \
  extern "C" void launch(const int* grid, int block, int shared, void** args) {                    \
    emulated::arguments = args;                                                                    \
    emulated::launch(grid, block, shared, [] { emulated::call(entry, emulated::arguments); });     \
  }
