// Products of matrices by AMX: 16 x 16 sums take up the products of 16 x 32 and 32 x 16 bfloat16 numbers at once. Products are
// exact and sums are float32, as those of vectors are, in another order.
//
// The left side are `Lines`, rows one behind the other; the right side are `Pairs`: panels of 16 columns, in which two numbers
// that follow each other in a column lie side by side. A float32 number is three bfloat16 ones, parts that add up to it, of
// which all products are taken but those too small to count.
#pragma once

#include <vector>

#include "products.hpp"

#if defined(__AMX_BF16__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace amx {

constexpr int kSide = 16;     // rows and columns of a tile of sums
constexpr int kDepth = 32;    // numbers that an instruction sums over
constexpr int kBlock = 32;    // rows and columns that share what they load: two tiles
constexpr int kTogether = 4 * kBlock;  // rows that take up columns together, which are read from far away once for all of them
constexpr int64_t kChunk = 384;       // numbers of a column, in all of its parts, that stay in a cache for all rows
constexpr int kParts = 3;      // of a float32 number
constexpr int64_t kWorth = 8;  // vectors from which on packing them pays
constexpr int64_t kWorthInParts = 64;

inline int64_t whole(int64_t count, int64_t of) { return (count + of - 1) / of * of; }

// A distance of that much and more between what is taken together, an odd number of cache lines, which have `line` numbers: whole
// powers of two would share a few sets of a cache.
inline int64_t spread(int64_t count, int64_t line) { return ((count + line - 1) / line | 1) * line; }

struct alignas(64) Line {
  uint16_t numbers[kDepth];
};

// Lines of bfloat16 numbers, as many of each as instructions need, wherever they are; parts of a line follow each other.
struct Left {
  const uint16_t* first;
  int64_t stride, depth;  // numbers from a line to the next, and of a part of a line
  int parts = 1;

  const uint16_t* operator[](int64_t line) const { return first + line * stride; }
};

// Such lines, to be written.
class Lines {
 public:
  int64_t depth = 0;
  int parts = 1;

  void resize(int64_t count, int64_t width, int parts = 1) {
    this->parts = parts;
    depth = whole(width, kDepth);
    stride_ = spread(parts * depth, kDepth);
    all_.resize(count * stride_ / kDepth);
  }
  uint16_t* operator[](int64_t line) { return all_.data()->numbers + line * stride_; }
  operator Left() const { return {all_.data()->numbers, stride_, depth, parts}; }

 private:
  int64_t stride_ = 0;
  std::vector<Line> all_;
};

// Panels of 16 columns: [parts][depth / 2][16][2].
class Pairs {
 public:
  int64_t columns = 0, depth = 0;
  int parts = 1;

  void resize(int64_t columns, int64_t width, int parts = 1) {
    this->columns = columns;
    this->parts = parts;
    depth = whole(width, kDepth);
    stride_ = spread(parts * depth * kSide, kDepth);
    all_.resize(panels() * stride_ / kDepth);
  }
  int64_t panels() const { return (columns + kSide - 1) / kSide; }
  int64_t stride() const { return stride_; }  // from a panel to the next
  uint16_t* panel(int64_t number) { return all_.data()->numbers + number * stride(); }
  const uint16_t* panel(int64_t number) const { return all_.data()->numbers + number * stride(); }

 private:
  int64_t stride_ = 0;
  std::vector<Line> all_;
};

// What a block of sums is made of: numbers, how far the next 16 lines or columns are, and how far their next part is.
struct Side {
  const uint16_t* numbers;
  int64_t next, part;
};

// Whether products of such parts count: of the others, the greatest are at most 2^-21 of the whole, and 2^-25 on average.
constexpr bool counts(int left, int right) { return left + right < kParts; }

#if defined(__AMX_BF16__)

// Whether the system lets this process use tiles, for which it has to be asked once.
inline bool ready() {
  static const bool granted = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0;
  return granted;
}

// This thread's tiles, as long as it lives. Others' code may have left them in another shape.
struct Tiles {
  Tiles() {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } shape;
    _tile_loadconfig(&shape);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
};

// R x C tiles of sums, of lines in L parts and pairs in P.
template <int R, int C, int L, int P>
void block(const Side& lines, int64_t line, const Side& pairs, int64_t depth, float* to, int64_t stride, bool add) {
  const int64_t apart = stride * sizeof(float), along = line * sizeof(uint16_t);
  asm volatile("" ::: "memory");  // loads of tiles do not say that they read memory
  if (add) {
    _tile_loadd(0, to, apart);
    if (R > 1) _tile_loadd(1, to + kSide * stride, apart);
    if (C > 1) _tile_loadd(2, to + kSide, apart);
    if (R > 1 && C > 1) _tile_loadd(3, to + kSide * stride + kSide, apart);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t k = 0; k < depth; k += kDepth)
    for (int i = 0; i < L; i++) {
      const uint16_t* left = lines.numbers + i * lines.part + k;
      _tile_loadd(4, left, along);
      if (R > 1) _tile_loadd(5, left + lines.next, along);
      for (int j = 0; j < P && counts(i, j); j++) {
        const uint16_t* right = pairs.numbers + j * pairs.part + k * kSide;
        _tile_loadd(6, right, 64);
        _tile_dpbf16ps(0, 4, 6);
        if (R > 1) _tile_dpbf16ps(1, 5, 6);
        if (C > 1) {
          _tile_loadd(7, right + pairs.next, 64);
          _tile_dpbf16ps(2, 4, 7);
        }
        if (R > 1 && C > 1) _tile_dpbf16ps(3, 5, 7);
      }
    }
  _tile_stored(0, to, apart);
  if (R > 1) _tile_stored(1, to + kSide * stride, apart);
  if (C > 1) _tile_stored(2, to + kSide, apart);
  if (R > 1 && C > 1) _tile_stored(3, to + kSide * stride + kSide, apart);
}

#else

// Tiles by loops, for tests on machines that have none.
inline bool ready() {
#if defined(TILES_BY_LOOPS)
  return true;
#else
  return false;
#endif
}

struct Tiles {
  Tiles() {}
};

template <int R, int C, int L, int P>
void block(const Side& lines, int64_t line, const Side& pairs, int64_t depth, float* to, int64_t stride, bool add) {
  const auto wide = [](uint16_t number) { return as<float>(uint32_t{number} << 16); };
  for (int r = 0; r < R * kSide; r++)
    for (int c = 0; c < C * kSide; c++) {
      float sum = add ? to[r * stride + c] : 0;
      for (int i = 0; i < L; i++)
        for (int j = 0; j < P && counts(i, j); j++) {
          const uint16_t* left = lines.numbers + r / kSide * lines.next + r % kSide * line + i * lines.part;
          const uint16_t* column = pairs.numbers + c / kSide * pairs.next + j * pairs.part + 2 * (c % kSide);
          for (int64_t k = 0; k < depth; k++) sum += wide(left[k]) * wide(column[k / 2 * 2 * kSide + k % 2]);
        }
      to[r * stride + c] = sum;
    }
}

#endif

// Numbers from place `first` on that sums go over.
struct Depth {
  int64_t first, count;
};

// to [rows, columns] = or += lines from number n on times the pairs' columns from c on, in whole tiles, at most two each way;
// `stride` is of numbers.
inline void block(const Left& lines, int64_t n, int64_t rows, const Pairs& pairs, int64_t c, Depth depth, float* to, int64_t stride,
                  bool add) {
  using Block = decltype(&block<1, 1, 1, 1>);
  static constexpr Block kBlocks[2][2][2][2] = {  // lines in parts, pairs in parts, two tiles of lines, two of columns
      {{{block<1, 1, 1, 1>, block<1, 2, 1, 1>}, {block<2, 1, 1, 1>, block<2, 2, 1, 1>}},
       {{block<1, 1, 1, kParts>, block<1, 2, 1, kParts>}, {block<2, 1, 1, kParts>, block<2, 2, 1, kParts>}}},
      {{{block<1, 1, kParts, 1>, block<1, 2, kParts, 1>}, {block<2, 1, kParts, 1>, block<2, 2, kParts, 1>}},
       {{block<1, 1, kParts, kParts>, block<1, 2, kParts, kParts>}, {block<2, 1, kParts, kParts>, block<2, 2, kParts, kParts>}}}};
  const Side left{lines[n] + depth.first, kSide * lines.stride, lines.depth};
  const Side right{pairs.panel(c / kSide) + depth.first * kSide, pairs.stride(), pairs.depth * kSide};
  const Block run = kBlocks[lines.parts > 1][pairs.parts > 1][rows > kSide][pairs.columns - c > kSide];
  run(left, lines.stride, right, depth.count, to, stride, add);
}

using Square = uint32_t[kSide][kSide];

// Rows and columns change places.
inline void transpose(Square& rows) {
#if defined(__AVX512F__)
  __m512i a[kSide], b[kSide];
  std::memcpy(a, rows, sizeof a);
  for (int i = 0; i < kSide; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
  for (int i = 0; i < kSide; i += 4)
    for (int j = 0; j < 2; j++) {
      a[i + 2 * j] = _mm512_unpacklo_epi64(b[i + j], b[i + j + 2]);
      a[i + 2 * j + 1] = _mm512_unpackhi_epi64(b[i + j], b[i + j + 2]);
    }
  // Quarters of vectors, which instructions move whole, are columns of 4 rows now: 0x88 takes the even ones, 0xdd the odd.
  for (int i = 0; i < 4; i++) {
    const __m512i even[] = {_mm512_shuffle_i32x4(a[i], a[i + 4], 0x88), _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88)};
    const __m512i odd[] = {_mm512_shuffle_i32x4(a[i], a[i + 4], 0xdd), _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xdd)};
    b[i] = _mm512_shuffle_i32x4(even[0], even[1], 0x88);
    b[i + 4] = _mm512_shuffle_i32x4(odd[0], odd[1], 0x88);
    b[i + 8] = _mm512_shuffle_i32x4(even[0], even[1], 0xdd);
    b[i + 12] = _mm512_shuffle_i32x4(odd[0], odd[1], 0xdd);
  }
  std::memcpy(rows, b, sizeof b);
#else
  for (int i = 0; i < kSide; i++)
    for (int j = 0; j < i; j++) std::swap(rows[i][j], rows[j][i]);
#endif
}

// The upper halves of what bfloat16 can hold.
inline void store_halves(uint16_t* to, Floats value, int64_t count = kLanes) {
  const Halves halves = narrow_lanes(as<Words>(value) >> 16);
  if (count == kLanes) return void(std::memcpy(to, &halves, sizeof halves));
  std::memcpy(to, &halves, count * sizeof(uint16_t));
}

// In so many parts, which are `part` numbers from each other: rounded if it is one; of three, each takes the next 8 bits.
inline void store_parts(uint16_t* to, Floats value, int parts, int64_t part, int64_t count = kLanes) {
  if (parts == 1) return store_halves(to, to_bfloat16(value), count);
  for (int i = 0; i < parts; i++) {
    const Floats upper = as<Floats>(as<Words>(value) & 0xffff0000u);
    store_halves(to + i * part, upper, count);
    value -= upper;
  }
}

// Zeros behind the numbers of a line.
inline void pad(uint16_t* to, int64_t count, int64_t depth, int parts) {
  for (int i = 0; i < parts; i++) std::fill(to + i * depth + count, to + (i + 1) * depth, 0);
}

// A vector as a line in parts of `depth` numbers.
inline void narrow(const float* from, int64_t count, uint16_t* to, int64_t depth, int parts = 1) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store_parts(to + i, load(from + i), parts, depth);
  if (i < count) store_parts(to + i, load_first(from + i, static_cast<int>(count - i)), parts, depth, count - i);
  pad(to, count, depth, parts);
}

// Vectors [width] as the columns of a panel.
inline void pack(Pairs& to, const float* const* vectors, int64_t width, int64_t panel) {
  const int64_t some = std::min<int64_t>(kSide, to.columns - panel * kSide);
  for (int64_t k = 0; k < to.depth; k += kDepth) {
    uint16_t lines[kSide][kParts * kDepth] = {};
    for (int64_t c = 0; c < some; c++)
      narrow(vectors[panel * kSide + c] + k, std::min<int64_t>(kDepth, width - k), lines[c], kDepth, to.parts);
    for (int i = 0; i < to.parts; i++) {
      Square square;
      for (int c = 0; c < kSide; c++) std::memcpy(square[c], lines[c] + i * kDepth, sizeof square[c]);
      transpose(square);
      std::memcpy(to.panel(panel) + (i * to.depth + k) * kSide, square, sizeof square);
    }
  }
}

// All panels.
inline void pack(Pairs& to, const std::vector<const float*>& vectors, int64_t width) {
  to.resize(vectors.size(), width);
  for (int64_t panel = 0; panel < to.panels(); panel++) pack(to, vectors.data(), width, panel);
}

// A row of a matrix as a line, times its multipliers: in parts, or rounded as a graph does that multiplies first.
template <class Format>
void widen(const Matrix& m, int64_t row, uint16_t* to, int64_t depth, int parts = 1) {
  if constexpr (std::is_same_v<Format, Bfloat16>) std::memcpy(to, m.rows[row], m.width * sizeof(uint16_t));
  pad(to, m.width, depth, parts);
  const int64_t block = Format::kScaled ? m.block : m.width;
  for (int64_t begin = 0, number = 0; !std::is_same_v<Format, Bfloat16> && begin < m.width; begin += block, number++) {
    const int64_t end = std::min(begin + block, m.width);
    const float scale = Format::kScaled ? m.multipliers[row][number] * Format::kUnit : 1;
    int64_t k = begin;
    for (; k + kLanes <= end; k += kLanes) store_parts(to + k, Format::widen(m.rows[row] + Format::bytes(k)) * scale, parts, depth);
    if (k == end) continue;
    uint8_t last[kLanes * 4] = {};
    std::memcpy(last, m.rows[row] + Format::bytes(k), Format::bytes(end - k));
    store_parts(to + k, Format::widen(last) * scale, parts, depth, end - k);
  }
}

// out[c * stride + n] = sum of at most kTogether lines, line_n times the pairs' column c. Columns stay in the first-level cache for
// all lines, so many numbers of them at a time.
inline void products(const Left& lines, int64_t count, const Pairs& pairs, float* out, int64_t stride) {
  const int64_t some = kChunk / std::max(lines.parts, pairs.parts);
  for (int64_t c = 0; c < pairs.columns; c += kBlock) {
    alignas(64) float sums[kTogether * kBlock];
    for (int64_t k = 0; k < pairs.depth; k += some)
      for (int64_t n = 0; n < count; n += kBlock)
        block(lines, n, count - n, pairs, c, {k, std::min(some, pairs.depth - k)}, sums + n * kBlock, kBlock, k > 0);
    for (int64_t n = 0; n < count; n += kSide)
      for (int64_t i = 0; i < kBlock && c + i < pairs.columns; i += kSide) {
        Square tile;
        for (int r = 0; r < kSide; r++) std::memcpy(tile[r], sums + (n + r) * kBlock + i, sizeof tile[r]);
        transpose(tile);
        for (int64_t l = 0; l < std::min<int64_t>(kSide, pairs.columns - c - i); l++) {
          float* to = out + (c + i + l) * stride + n;
          if (count - n >= kSide)  // a size that the compiler knows is a move
            std::memcpy(to, tile[l], sizeof tile[l]);
          else
            std::memcpy(to, tile[l], (count - n) * sizeof(float));
        }
      }
  }
}

// out[c * stride + n] for rows first <= n < last, as `products` of vectors.
template <class Format>
void products(const Matrix& m, int64_t first, int64_t last, const Pairs& vectors, float* out, int64_t stride) {
  thread_local Lines lines;
  lines.resize(kTogether, m.width, std::is_same_v<Format, Bfloat16> ? 1 : vectors.parts);
  const Tiles tiles;
  for (int64_t n = first; n < last; n += kTogether) {
    const int64_t some = std::min<int64_t>(kTogether, last - n);
    for (int64_t r = 0; r < some; r++) widen<Format>(m, n + r, lines[r], lines.depth, lines.parts);
    products(lines, some, vectors, out + n, stride);
  }
}

// What is read next, fetched a few cache lines at a time between other work, so that neither waits for the other.
struct Ahead {
  const uint8_t* next = nullptr;
  int64_t bytes = 0, each = 0;

  void fetch() {
    const int64_t some = std::min(each, bytes);
    for (int64_t i = 0; i < some; i += 64) __builtin_prefetch(next + i);
    next += some;
    bytes -= some;
  }
};

// `count` lines as pairs that run across them, so that lines are what is summed over; zeros follow the last.
inline void across(Pairs& to, const Left& lines, int64_t count, int64_t columns, Ahead* ahead = nullptr) {
  to.resize(columns, count);
  for (int64_t t = 0; t < to.depth; t += 2) {
    if (ahead) ahead->fetch();
    for (int64_t c = 0; c < columns; c += kLanes) {
      const auto of = [&](int64_t line) {
        return line < count ? widen_lanes(read<Halves>(lines[line] + c)) : Words{};
      };
      const Words both = of(t) | of(t + 1) << 16;
      std::memcpy(to.panel(c / kSide) + t * kSide + 2 * (c % kSide), &both, sizeof both);
    }
  }
}

// to[r * stride + c] += sum of line_r times the pairs' column c; `to` has whole tiles.
inline void add(const Left& lines, int64_t rows, const Pairs& pairs, float* to, int64_t stride) {
  for (int64_t r = 0; r < rows; r += kBlock)
    for (int64_t c = 0; c < pairs.columns; c += kBlock) block(lines, r, rows - r, pairs, c, {0, pairs.depth}, to + r * stride + c, stride, true);
}

// In how many parts AMX takes so many vectors, rounded to a type; 0 where it is not worth their packing.
inline int parts(Rounding activations, int64_t vectors) {
  if (!ready() || activations == Rounding::kFloat16) return 0;
  if (activations == Rounding::kBfloat16) return vectors >= kWorth;
  return vectors >= kWorthInParts ? kParts : 0;
}

}  // namespace amx
