// Vectors of float32 as wide as the machine's, and numbers of other formats read as such.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__F16C__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

template <class T>
struct LanesOf {
  typedef T type __attribute__((vector_size(kLanes * sizeof(T))));
};
using Floats = LanesOf<float>::type;
using Ints = LanesOf<int32_t>::type;
using Words = LanesOf<uint32_t>::type;
using Halves = LanesOf<uint16_t>::type;
using Bytes = LanesOf<uint8_t>::type;
using Signed = LanesOf<int8_t>::type;

template <class To, class From>
inline To as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

template <class T>
inline T read(const void* from) {
  T to;
  std::memcpy(&to, from, sizeof to);
  return to;
}

inline Floats load(const float* from) { return read<Floats>(from); }
inline void store(float* to, Floats value) { std::memcpy(to, &value, sizeof value); }
inline Floats all(float value) { return Floats{} + value; }

// Of the first lanes alone, zeros in the others.
inline Floats load_first(const float* from, int count) {
#if defined(__AVX512F__)
  return (Floats)_mm512_maskz_loadu_ps((1u << count) - 1, from);
#else
  if (count == kLanes) return load(from);
  Floats value{};
  std::memcpy(&value, from, count * sizeof(float));
  return value;
#endif
}

inline void store_first(float* to, Floats value, int count) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(to, (1u << count) - 1, (__m512)value);
#else
  if (count == kLanes) return store(to, value);
  std::memcpy(to, &value, count * sizeof(float));
#endif
}

// Lanes of another width. Compilers make several instructions of what is one.
inline Words widen_lanes(Halves from) {
#if defined(__AVX512F__)
  return (Words)_mm512_cvtepu16_epi32((__m256i)from);
#elif defined(__AVX2__)
  return (Words)_mm256_cvtepu16_epi32((__m128i)from);
#else
  return __builtin_convertvector(from, Words);
#endif
}

inline Words widen_lanes(Bytes from) {
#if defined(__AVX512F__)
  return (Words)_mm512_cvtepu8_epi32((__m128i)from);
#else
  return __builtin_convertvector(from, Words);
#endif
}

inline Halves extend_lanes(Signed from) {
#if defined(__AVX512F__)
  return (Halves)_mm256_cvtepi8_epi16((__m128i)from);
#else
  return as<Halves>(__builtin_convertvector(from, LanesOf<int16_t>::type));
#endif
}

inline Halves narrow_lanes(Words from) {
#if defined(__AVX512F__)
  return (Halves)_mm512_cvtepi32_epi16((__m512i)from);
#else
  return __builtin_convertvector(from, Halves);
#endif
}

typedef float Four __attribute__((vector_size(16)));

// Sums of the lanes of four vectors at once, and of one, in the same order.
#if defined(__AVX512F__)
inline Four sums_of(Floats a, Floats b, Floats c, Floats d) {
  const __m512 w = (__m512)a, x = (__m512)b, y = (__m512)c, z = (__m512)d;
  const __m512 ab = _mm512_maskz_unpacklo_ps(-1, w, x) + _mm512_maskz_unpackhi_ps(-1, w, x);
  const __m512 cd = _mm512_maskz_unpacklo_ps(-1, y, z) + _mm512_maskz_unpackhi_ps(-1, y, z);
  const Floats all = (Floats)(_mm512_maskz_shuffle_ps(-1, ab, cd, 0x44) + _mm512_maskz_shuffle_ps(-1, ab, cd, 0xee));
  Four parts[4];
  std::memcpy(parts, &all, sizeof all);
  return (parts[0] + parts[1]) + (parts[2] + parts[3]);
}

inline float sum(Floats value) { return sums_of(value, value, value, value)[0]; }
#else
// Four lanes at a time: one after another would take as long as a short row itself.
inline float sum(Floats value) {
  Four parts[kLanes / 4];
  std::memcpy(parts, &value, sizeof value);
  for (int i = 1; i < kLanes / 4; i++) parts[0] += parts[i];
  return (parts[0][0] + parts[0][1]) + (parts[0][2] + parts[0][3]);
}

inline Four sums_of(Floats a, Floats b, Floats c, Floats d) { return Four{sum(a), sum(b), sum(c), sum(d)}; }
#endif

// Lanes of a where the mask has ones, of b where it has zeros.
inline Floats choose(Ints mask, Floats a, Floats b) { return as<Floats>((mask & as<Ints>(a)) | (~mask & as<Ints>(b))); }
inline Floats least(Floats a, Floats b) { return choose(a < b, a, b); }
inline Floats most(Floats a, Floats b) { return choose(a > b, a, b); }

// e^x to 2 units in the last place: e^x = 2^n e^r with |r| <= ln(2) / 2, and e^r by Taylor's series.
inline Floats exp(Floats x) {
  x = most(least(x, all(88.0f)), all(-87.0f));
  const Floats shift = all(12582912.0f);  // adding it leaves the nearest integer in the low bits
  Floats n = x * 1.44269504088896341f + shift;
  const Ints exponent = as<Ints>(n) << 23;
  n -= shift;
  const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Floats p = all(1.0f / 5040);
  for (float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = p * r + c;
  return as<Floats>(as<Ints>(p) + exponent);
}

// --- formats: how many bytes `count` numbers take, the vector of numbers that starts at some bytes, of which each means
// kUnit as much, whether they have multipliers, how many vectors are widened together, and whether these are of even and of
// odd places.

struct Float32 {
  static constexpr bool kScaled = false;
  static constexpr int kStep = 1;
  static constexpr bool kApart = false;
  static constexpr float kUnit = 1;
  static constexpr int64_t bytes(int64_t count) { return 4 * count; }
  static Floats widen(const uint8_t* from) { return read<Floats>(from); }
};

struct Bfloat16 {
  static constexpr bool kScaled = false;
  static constexpr int kStep = 1;
  static constexpr bool kApart = false;
  static constexpr float kUnit = 1;
  static constexpr int64_t bytes(int64_t count) { return 2 * count; }
  static Floats widen(const uint8_t* from) {
    return as<Floats>(widen_lanes(read<Halves>(from)) << 16);
  }
};

inline Floats widen_halves(Halves from) {
#if defined(__AVX512F__)
  return (Floats)_mm512_cvtph_ps((__m256i)from);
#elif defined(__F16C__) && defined(__AVX__)
  return (Floats)_mm256_cvtph_ps((__m128i)from);
#else
  // Exponents are moved by a product, which subnormal numbers survive.
  const Words wide = widen_lanes(from);
  const Floats magnitude = as<Floats>((wide & 0x7fff) << 13) * 0x1p112f;
  return as<Floats>(as<Words>(magnitude) | (wide & 0x8000) << 16);
#endif
}

struct Float16 {
  static constexpr bool kScaled = false;
  static constexpr int kStep = 1;
  static constexpr bool kApart = false;
  static constexpr float kUnit = 1;
  static constexpr int64_t bytes(int64_t count) { return 2 * count; }
  static Floats widen(const uint8_t* from) { return widen_halves(read<Halves>(from)); }
};

// Sign, four bits of exponent, three of mantissa: a float16 of an exponent 8 too small. Extending the sign puts it in place.
struct E4M3 {
  static constexpr bool kScaled = true;
  static constexpr int kStep = 2;
  static constexpr bool kApart = false;
  static constexpr float kUnit = 256;
  static constexpr int64_t bytes(int64_t count) { return count; }
  static Floats widen(const uint8_t* from) { return widen_halves(extend_lanes(read<Signed>(from)) << 7 & 0xbfff); }
  static void widen(const uint8_t* from, Floats& first, Floats& second) {
#if defined(__AVX512BW__)
    const __m512i wide = _mm512_slli_epi16(_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)from)), 7);
    const __m512i halves = _mm512_and_si512(wide, _mm512_set1_epi16(int16_t(0xbfff)));
    first = (Floats)_mm512_cvtph_ps(_mm512_castsi512_si256(halves));
    second = (Floats)_mm512_cvtph_ps(_mm512_extracti64x4_epi64(halves, 1));
#else
    first = widen(from);
    second = widen(from + kLanes);
#endif
  }
};

// Two numbers a byte, the even one in the low bits.
struct E2M1 {
  static constexpr bool kScaled = true;
  static constexpr int kStep = 1;
  static constexpr bool kApart = false;
  static constexpr float kUnit = 1;
  static constexpr int64_t bytes(int64_t count) { return (count + 1) / 2; }

  static Floats widen(const uint8_t* from) {
    // Each byte alone in 64 bits, then its high half moved into the upper 32 of them.
    typedef uint64_t Wide __attribute__((vector_size(kLanes * 4)));
#if defined(__AVX512F__)
    const Wide pairs = (Wide)_mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i*)from));
#else
    typedef uint8_t Pairs __attribute__((vector_size(kLanes / 2)));
    const Wide pairs = __builtin_convertvector(read<Pairs>(from), Wide);
#endif
    return number(as<Words>(pairs | pairs << 28));
  }

  // As many bytes as lanes: their even numbers, and their odd ones.
  static void widen(const uint8_t* from, Floats& even, Floats& odd) {
    const Words pairs = widen_lanes(read<Bytes>(from));
    even = number(pairs);
    odd = number(pairs >> 4);
  }

 private:
  // Of the code in a lane's low four bits, whatever the others are.
  static Floats number(Words code) {
#if defined(__AVX512F__)
    const __m512 table = _mm512_setr_ps(0, .5f, 1, 1.5f, 2, 3, 4, 6, -0.f, -.5f, -1, -1.5f, -2, -3, -4, -6);
    return (Floats)_mm512_permutexvar_ps((__m512i)code, table);
#else
    // Above one half, exponent and mantissa are those of a float of an exponent 126 too small.
    const Ints magnitude = as<Ints>(code & 7), sign = as<Ints>((code & 8) << 28);
    const Floats large = as<Floats>((magnitude << 22) + (126 << 23)), small = all(0.5f) * __builtin_convertvector(magnitude, Floats);
    return as<Floats>(as<Ints>(choose(magnitude > 1, large, small)) | sign);
#endif
  }
};

// The same, which multiplies vectors in which even and odd places of every two vectors are apart.
struct E2M1Pairs : E2M1 {
  static constexpr int kStep = 2;
  static constexpr bool kApart = true;
};

template <class Format>
inline void widen(const uint8_t* from, Floats (&to)[Format::kStep]) {
  if constexpr (Format::kStep == 2) {
    Format::widen(from, to[0], to[1]);
  } else {
    to[0] = Format::widen(from);
  }
}

// --- what activations are rounded to

enum class Rounding { kNone, kBfloat16, kFloat16 };

inline Floats to_bfloat16(Floats value) {
  const Words bits = as<Words>(value);
  return as<Floats>((bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u);
}

inline Floats to_float16(Floats value) {
#if defined(__AVX512F__)
  return (Floats)_mm512_cvtph_ps(_mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__) && defined(__AVX__)
  return (Floats)_mm256_cvtph_ps(_mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int lane = 0; lane < kLanes; lane++) value[lane] = (float)(_Float16)value[lane];
  return value;
#endif
}

inline Floats rounded(Floats value, Rounding to) {
  return to == Rounding::kNone ? value : to == Rounding::kBfloat16 ? to_bfloat16(value) : to_float16(value);
}
