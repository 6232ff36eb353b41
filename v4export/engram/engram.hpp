// Engram memory on the host for C++17 programs, with nothing but POSIX: token ids to row numbers to rows.
//
// The same as hashing.py, storage.py and table.py beside this file, bit for bit. A program fills a Layout, and the
// places of its tables, from a bundle's engram.json and engram.map. Every function may be called by several threads.
#pragma once

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace v4export::engram {

// In place of a row number: nothing is looked up, and the row is zeros.
constexpr std::int64_t NO_ROW = -1;

// What failed, the values, and what to do, a line each.
class Error : public std::runtime_error {
 public:
  Error(const std::string& what, const std::string& values, const std::string& fix)
      : std::runtime_error(what + "\n  " + values + "\n  " + fix) {}
};

// The hashes of one layer; see config/hashes.py.
struct LayerHash {
  std::vector<std::int64_t> multipliers;  // [N]: of the token itself, then of those before it
  std::vector<std::int64_t> primes;       // [(N-1) * heads]: buckets of each hash
};

struct Layout {
  std::size_t heads = 0;
  std::int64_t pad = 0;               // compressed id of what is before the first token
  std::int64_t compressed_vocab = 0;  // how many compressed ids there are
  std::vector<std::int32_t> token_map;
  std::vector<LayerHash> layers;
};

class Hasher {
 public:
  explicit Hasher(Layout layout) : layout_(std::move(layout)) {
    const auto& l = layout_;
    bool fits = !l.layers.empty() && l.heads > 0 && 0 <= l.pad && l.pad < l.compressed_vocab;
    for (std::int32_t id : l.token_map) fits = fits && 0 <= id && id < l.compressed_vocab;
    for (const auto& layer : l.layers) {
      const std::size_t order = layer.multipliers.size();
      fits = fits && order >= 2 && order == l.layers[0].multipliers.size();
      fits = fits && layer.primes.size() == (order - 1) * l.heads;
      for (std::int64_t m : layer.multipliers) {
        fits = fits && m > 0 && (l.compressed_vocab == 1 || m <= INT64_MAX / (l.compressed_vocab - 1));
      }
      for (std::int64_t p : layer.primes) fits = fits && p > 0;
    }
    if (!fits) {
      throw Error("an Engram layout does not fit together", std::to_string(l.layers.size()) + " layers",
                  "fill it from a bundle's engram.json and engram.map");
    }
    back_ = l.layers[0].multipliers.size() - 1;
  }

  std::size_t history_size() const { return back_; }                  // N-1, of a sequence
  std::size_t hashes() const { return layout_.layers[0].primes.size(); }  // (N-1) * heads, rows of a token in a layer
  std::vector<std::int64_t> empty_history(std::size_t batch) const {
    return std::vector<std::int64_t>(batch * back_, layout_.pad);
  }

  // Row numbers of new tokens.
  //   tokens [batch, steps]; history [batch, N-1], replaced by the new one; rows: for each layer, where to write
  //   [batch, steps, (N-1) * heads]. lengths [batch]: how many of the steps are tokens; masked [batch, steps]: tokens
  //   that are no text; starts [batch, steps]: tokens that begin a segment. See hashing.py.
  void rows(const std::int64_t* tokens, std::size_t batch, std::size_t steps, std::int64_t* history,
            const std::vector<std::int64_t*>& rows, const std::int64_t* lengths = nullptr,
            const bool* masked = nullptr, const bool* starts = nullptr) const {
    check(tokens, batch, steps, history, lengths, masked);
    std::vector<std::int64_t> seen(back_ + steps), context(back_ + 1);
    for (std::size_t b = 0; b < batch; ++b) {
      const std::size_t length = lengths ? static_cast<std::size_t>(lengths[b]) : steps;
      std::size_t floor = 0;  // the first place in `seen` that a token may look back to
      std::copy_n(history + b * back_, back_, seen.begin());
      for (std::size_t t = 0; t < steps; ++t) {
        const std::size_t at = b * steps + t, place = back_ + t;
        const bool text = t < length && !(masked && masked[at]);
        seen[place] = text ? layout_.token_map[static_cast<std::size_t>(tokens[at])] : layout_.pad;
        if (t < length) floor = !text ? place + 1 : starts && starts[at] ? place : floor;
        for (std::size_t d = 0; d <= back_; ++d) context[d] = place - d >= floor ? seen[place - d] : layout_.pad;
        for (std::size_t i = 0; i < rows.size(); ++i) hash(layout_.layers[i], context, text, rows[i] + at * hashes());
      }
      for (std::size_t i = 0; i < back_; ++i) {
        history[b * back_ + i] = length + i >= floor ? seen[length + i] : layout_.pad;
      }
    }
  }

 private:
  void hash(const LayerHash& layer, const std::vector<std::int64_t>& context, bool text, std::int64_t* out) const {
    std::int64_t mix = context[0] * layer.multipliers[0], offset = 0;
    for (std::size_t h = 0; h < layer.primes.size(); ++h) {
      if (h % layout_.heads == 0) mix ^= context[h / layout_.heads + 1] * layer.multipliers[h / layout_.heads + 1];
      out[h] = text ? mix % layer.primes[h] + offset : NO_ROW;
      offset += layer.primes[h];
    }
  }

  // Before anything is written, so that a refused step leaves the history as it was.
  void check(const std::int64_t* tokens, std::size_t batch, std::size_t steps, const std::int64_t* history,
             const std::int64_t* lengths, const bool* masked) const {
    for (std::size_t i = 0; i < batch * back_; ++i) {
      within("a history holds compressed ids that do not exist", history[i], layout_.compressed_vocab);
    }
    for (std::size_t b = 0; b < batch; ++b) {
      if (lengths) within("lengths do not fit the tokens", lengths[b], static_cast<std::int64_t>(steps) + 1);
      const std::size_t length = lengths ? static_cast<std::size_t>(lengths[b]) : steps;
      for (std::size_t at = b * steps; at < b * steps + length; ++at) {
        if (masked && masked[at]) continue;
        within("token ids are not in the vocabulary", tokens[at], static_cast<std::int64_t>(layout_.token_map.size()));
      }
    }
  }

  static void within(const char* what, std::int64_t value, std::int64_t limit) {
    if (0 <= value && value < limit) return;
    throw Error(what, std::to_string(value) + "; they have to be 0 to " + std::to_string(limit - 1),
                "use the tokenizer and state of this model");
  }

  Layout layout_;
  std::size_t back_ = 0;
};

enum class Type { E4M3, E8M0, BF16, F16, F32 };

// Where a tensor [rows, width] lies.
struct Stored {
  std::string file;
  std::int64_t offset = 0, rows = 0, width = 0;
  Type type = Type::F32;

  std::size_t row_bytes() const {
    const std::size_t size = type == Type::F32 ? 4 : type == Type::BF16 || type == Type::F16 ? 2 : 1;
    return static_cast<std::size_t>(width) * size;
  }
};

inline Error corrupt(const Stored& stored, const std::string& found) {
  return Error("the Engram table is corrupt", stored.file + ": " + found, "copy the file again");
}

// Rows that are read, not mapped: see storage.py for why.
class StoredRows {
 public:
  explicit StoredRows(Stored stored)
      : stored_(std::move(stored)), fd_(::open(stored_.file.c_str(), O_RDONLY | O_CLOEXEC)) {
    struct stat status {};
    if (fd_ < 0 || ::fstat(fd_, &status) != 0) {
      const std::string reason = std::strerror(errno);
      close();
      throw Error("an Engram table cannot be opened", stored_.file + ": " + reason, "build the bundle again");
    }
    const auto room = (status.st_size - stored_.offset) / static_cast<std::int64_t>(stored_.row_bytes());
    if (stored_.offset < 0 || stored_.offset > status.st_size || stored_.rows > room) {
      close();
      throw corrupt(stored_, std::to_string(stored_.rows) + " rows of " + std::to_string(stored_.row_bytes()) +
                                 " bytes from byte " + std::to_string(stored_.offset) + " on, the file has " +
                                 std::to_string(status.st_size));
    }
#ifdef POSIX_FADV_RANDOM
    ::posix_fadvise(fd_, stored_.offset, 0, POSIX_FADV_RANDOM);
#endif
  }
  ~StoredRows() { close(); }
  StoredRows(const StoredRows&) = delete;
  StoredRows& operator=(const StoredRows&) = delete;

  const Stored& stored() const { return stored_; }

  // Begin to read a row that is not in memory; a disk answers many requests in the time of one.
  void ask_for(std::int64_t row) const {
#ifdef POSIX_FADV_WILLNEED
    ::posix_fadvise(fd_, start(row), static_cast<off_t>(stored_.row_bytes()), POSIX_FADV_WILLNEED);
#endif
  }

  void read(std::int64_t row, std::uint8_t* out) const {
    const std::size_t size = stored_.row_bytes();
    const ssize_t got = ::pread(fd_, out, size, start(row));
    if (got < 0) throw corrupt(stored_, std::strerror(errno));
    if (static_cast<std::size_t>(got) < size) {
      throw corrupt(stored_, "the file has become shorter: row " + std::to_string(row) + " is not in it");
    }
  }

 private:
  off_t start(std::int64_t row) const {
    return static_cast<off_t>(stored_.offset + row * static_cast<std::int64_t>(stored_.row_bytes()));
  }
  void close() {
    if (fd_ >= 0) ::close(fd_);
    fd_ = -1;
  }

  Stored stored_;
  int fd_;
};

inline std::array<float, 256> e4m3_values() {
  std::array<float, 256> values{};
  for (int code = 0; code < 256; ++code) {
    const int exponent = code >> 3 & 15, mantissa = code & 7;
    const float size = exponent ? std::ldexp(float(8 + mantissa), exponent - 10) : std::ldexp(float(mantissa), -9);
    const float value = (code & 127) == 127 ? std::numeric_limits<float>::quiet_NaN() : size;
    values[static_cast<std::size_t>(code)] = code & 128 ? -value : value;
  }
  return values;
}

inline std::array<float, 256> e8m0_values() {
  std::array<float, 256> values{};
  for (int code = 0; code < 255; ++code) values[static_cast<std::size_t>(code)] = std::ldexp(1.0f, code - 127);
  values[255] = std::numeric_limits<float>::quiet_NaN();
  return values;
}

inline float float_of_bits(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline float float_of_f16(std::uint16_t bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  const float size = exponent == 31  ? (mantissa ? std::numeric_limits<float>::quiet_NaN() : HUGE_VALF)
                     : exponent != 0 ? std::ldexp(float(1024 + mantissa), exponent - 25)
                                     : std::ldexp(float(mantissa), -24);
  return bits & 0x8000 ? -size : size;
}

// To the nearest bfloat16, ties to even; of a finite number.
inline std::uint16_t bf16_bits(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// A table of rows: E4M3 with an E8M0 multiplier per 32 columns, or BF16, F16 or F32 without.
class Table {
 public:
  static constexpr std::int64_t COLUMNS = 32;

  explicit Table(const Stored& data, const std::optional<Stored>& scale = std::nullopt, bool prefetch = true)
      : prefetch_(prefetch) {
    const bool scaled = data.type == Type::E4M3;
    bool fits = data.rows > 0 && data.width > 0 && data.width < INT32_MAX;
    fits = fits && data.type != Type::E8M0 && scaled == scale.has_value();
    if (fits && scaled) {
      fits = scale->type == Type::E8M0 && scale->rows == data.rows && data.width % COLUMNS == 0 &&
             scale->width == data.width / COLUMNS;
    }
    if (!fits) {
      throw Error("a tensor is not an Engram table", data.file,
                  "expected E4M3 [rows, width] with E8M0 [rows, width / 32], or BF16, F16 or F32 without");
    }
    data_ = std::make_unique<StoredRows>(data);
    if (scale) scale_ = std::make_unique<StoredRows>(*scale);
  }

  std::int64_t rows() const { return data_->stored().rows; }
  std::int64_t width() const { return data_->stored().width; }

  // Rows by their numbers [count], NO_ROW for zeros, to out [count, width]: float32, or the bits of bfloat16.
  void gather(const std::int64_t* rows, std::size_t count, float* out) const {
    gather_as(rows, count, out, std::numeric_limits<float>::max(), [](float value) { return value; });
  }
  void gather(const std::int64_t* rows, std::size_t count, std::uint16_t* out) const {
    gather_as(rows, count, out, float_of_bits(0x7f7f0000), bf16_bits);
  }

 private:
  template <typename Out, typename Store>
  void gather_as(const std::int64_t* rows, std::size_t count, Out* out, float limit, Store store) const {
    for (std::size_t i = 0; i < count; ++i) {
      if (rows[i] >= NO_ROW && rows[i] < this->rows()) continue;
      throw Error("rows are not in the Engram table",
                  std::to_string(rows[i]) + "; it has rows 0 to " + std::to_string(this->rows() - 1),
                  "take config.json, tokenizer.json and the tables from the same checkpoint");
    }
    for (const StoredRows* part : {data_.get(), scale_.get()}) {
      for (std::size_t i = 0; part && prefetch_ && i < count; ++i) {
        if (rows[i] != NO_ROW) part->ask_for(rows[i]);
      }
    }
    const std::size_t width = static_cast<std::size_t>(this->width());
    std::vector<std::uint8_t> codes(data_->stored().row_bytes()), scales(scale_ ? scale_->stored().row_bytes() : 0);
    for (std::size_t i = 0; i < count; ++i, out += width) {
      if (rows[i] != NO_ROW) {
        data_->read(rows[i], codes.data());
        if (scale_) scale_->read(rows[i], scales.data());
      }
      for (std::size_t column = 0; column < width; ++column) {
        const float value = rows[i] == NO_ROW ? 0.0f : decode(codes, scales, column);
        if (!(std::fabs(value) <= limit)) refuse(rows[i], column, value);
        out[column] = store(value);
      }
    }
  }

  float decode(const std::vector<std::uint8_t>& codes, const std::vector<std::uint8_t>& scales,
               std::size_t column) const {
    static const std::array<float, 256> e4m3 = e4m3_values(), e8m0 = e8m0_values();
    if (scale_) return e4m3[codes[column]] * e8m0[scales[column / COLUMNS]];
    if (data_->stored().type == Type::F32) {
      float value;
      std::memcpy(&value, &codes[4 * column], sizeof value);
      return value;
    }
    std::uint16_t bits;
    std::memcpy(&bits, &codes[2 * column], sizeof bits);
    return data_->stored().type == Type::F16 ? float_of_f16(bits) : float_of_bits(std::uint32_t(bits) << 16);
  }

  [[noreturn]] void refuse(std::int64_t row, std::size_t column, float value) const {
    const std::string number = std::isnan(value) ? "nan" : std::to_string(value);
    const std::string found = "row " + std::to_string(row) + ", column " + std::to_string(column) + " is " + number;
    if (!std::isfinite(value)) throw corrupt(data_->stored(), found);
    throw Error("a row of an Engram table is out of the range of its type", found, "take it as float32");
  }

  bool prefetch_;
  std::unique_ptr<StoredRows> data_, scale_;
};

}  // namespace v4export::engram
