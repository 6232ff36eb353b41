// Which keys a query attends to: the best by sums over heads of what is positive of q_h . k. See ../index_select/op.py.
#pragma once

#include <cmath>
#include <numeric>

#include "attention.hpp"

namespace indexing {

constexpr int64_t kLine = 1024;  // keys of a task

// Scores of the keys that a token sees, by number; -INFINITY for those that are left out.
struct Seen {
  float* scores;
  int64_t count;
};

// Those of all tokens, until this thread's next.
class Scores {
 public:
  // `blocks` are those whose keys are scored, [M, each]; all keys where `each` is negative.
  Scores(ort::Context* context, size_t position, int64_t ratio, float scale, const int64_t* blocks = nullptr,
         int64_t each = -1, int64_t block_size = 1)
      : fresh(ort::input(context, 2)), held(ort::input(context, 3)), own_(buffers<Buffers>()) {
    const ort::Shape q(ort::input(context, 0));
    tokens = q.dims[0];
    const int64_t heads = q.dims[1], width = q.dims[2], batch = ort::Shape(ort::input(context, 2)).dims[0];
    const int64_t steps = tokens ? tokens / batch : 0;
    keys = held.count + fresh.count;
    const int64_t* at = ort::data<int64_t>(context, position);
    const float *queries = ort::data<float>(context, 0), *weights = ort::data<float>(context, 1);
    own_.begin.assign(1, 0);
    own_.tasks.clear();
    for (int64_t m = 0; m < tokens; m++) {
      const int64_t seen = (at[m / steps] + m % steps + 1) / ratio;
      own_.begin.push_back(own_.begin.back() + seen);
      for (int64_t first = 0; first < seen; first += kLine) own_.tasks.push_back({m, first, std::min(first + kLine, seen)});
    }
    own_.scores.resize(own_.begin.back());
    std::fill(own_.scores.begin(), own_.scores.end(), -INFINITY);
    ort::parallel(context, own_.tasks.size(), [&](size_t i) {
      const Task& task = own_.tasks[i];
      const int64_t b = task.token / steps, before = at[b] / ratio;
      char wanted[kLine];
      std::fill_n(wanted, task.last - task.first, each < 0);
      for (int64_t j = 0; j < each; j++) {
        const int64_t block = blocks[task.token * each + j];
        if (block < 0) continue;
        const int64_t from = std::max(block * block_size, task.first), to = std::min((block + 1) * block_size, task.last);
        for (int64_t n = from; n < to; n++) wanted[n - task.first] = 1;
      }
      thread_local std::vector<const float*> q_rows;
      q_rows.resize(heads);
      for (int64_t h = 0; h < heads; h++) q_rows[h] = queries + (task.token * heads + h) * width;
      for (bool is_held : {true, false}) {
        const int64_t from = is_held ? task.first : std::max(task.first, before);
        const int64_t to = is_held ? std::min({task.last, before, held.count}) : task.last;
        const Segment& segment = is_held ? held : fresh;
        const uint8_t* rows[kTile];
        int64_t numbers[kTile], count = 0;
        auto flush = [&] {
          if (count) score(segment.format, rows, numbers, count, q_rows, width, weights + task.token * heads, scale, task.token);
          count = 0;
        };
        for (int64_t n = from; n < to; n++) {
          if (!wanted[n - task.first]) continue;
          numbers[count] = n;
          rows[count++] = segment.data + (b * segment.count + n - (is_held ? 0 : before)) * segment.stride;
          if (count == kTile) flush();
        }
        flush();
      }
    });
  }

  Seen operator[](int64_t token) const {
    return {own_.scores.data() + own_.begin[token], own_.begin[token + 1] - own_.begin[token]};
  }

  int64_t tokens, keys;

 private:
  // Of the keys that a token sees.
  struct Task {
    int64_t token, first, last;
  };

  struct Buffers {
    std::vector<int64_t> begin;  // of each token's scores, and the last one's end
    std::vector<float> scores;
    std::vector<Task> tasks;
  };

  void score(Format format, const uint8_t* const* rows, const int64_t* numbers, int64_t count,
             const std::vector<const float*>& queries, int64_t width, const float* weights, float scale, int64_t token) {
    thread_local std::vector<float> dots;
    const int64_t heads = static_cast<int64_t>(queries.size());
    dots.resize(heads * kTile);
    Matrix keys;
    keys.rows = rows;
    keys.width = width;
    with_plain(format, [&](auto f) {
      products<decltype(f)>(keys, 0, count, queries.data(), heads, dots.data(), kTile);
    });
    for (int64_t t = 0; t < count; t++) {
      float total = 0;
      for (int64_t h = 0; h < heads; h++) total += weights[h] * std::max(dots[h * kTile + t], 0.0f);
      (*this)[token].scores[numbers[t]] = total * scale;
    }
  }

  Segment fresh, held;
  Buffers& own_;
};

// At most `most` places by falling score, of equal ones the lower first; -1 where there are fewer.
inline void best(const Seen& seen, int64_t most, int64_t* to) {
  thread_local std::vector<int64_t> places;
  places.clear();
  const float* scores = seen.scores;
  for (int64_t n = 0; n < seen.count; n++)
    if (scores[n] != -INFINITY) places.push_back(n);
  const auto better = [&](int64_t a, int64_t b) { return scores[a] != scores[b] ? scores[a] > scores[b] : a < b; };
  const int64_t some = std::min<int64_t>(most, places.size());
  if (some < int64_t(places.size())) std::nth_element(places.begin(), places.begin() + some, places.end(), better);
  std::sort(places.begin(), places.begin() + some, better);
  std::copy(places.begin(), places.begin() + some, to);
  std::fill(to + some, to + most, -1);
}

inline void choose_keys(ort::Context* context, const Scores& found, int64_t top_k) {
  const int64_t most = std::min(top_k, found.keys);
  int64_t* to = ort::output<int64_t>(context, 0, {found.tokens, most});
  if (found.tokens) ort::parallel(context, found.tokens, [&](size_t m) { best(found[m], most, to + m * most); });
}

}  // namespace indexing

// Inputs of all three: q [M, H, I], weights [M, H], new keys [B, U, I], keys held [B, C, I], and what follows.
class IndexSelect {
 public:
  static constexpr const char* kName = "IndexSelect";
  static constexpr ort::Type kOutputs[] = {ort::kInt64};

  explicit IndexSelect(const ort::Info* info)
      : top_k_(ort::attribute(info, "top_k")), ratio_(ort::attribute(info, "ratio")), scale_(ort::real(info, "scale")) {}

  void compute(ort::Context* context) { indexing::choose_keys(context, indexing::Scores(context, 4, ratio_, scale_), top_k_); }

 private:
  int64_t top_k_, ratio_;
  float scale_;
};

class CandidateSelect {
 public:
  static constexpr const char* kName = "CandidateSelect";
  static constexpr ort::Type kOutputs[] = {ort::kInt64, ort::kInt64};

  explicit CandidateSelect(const ort::Info* info)
      : top_k_(ort::attribute(info, "top_k")), ratio_(ort::attribute(info, "ratio")),
        top_blocks_(ort::attribute(info, "top_blocks")), block_size_(ort::attribute(info, "block_size")),
        scale_(ort::real(info, "scale")) {}

  void compute(ort::Context* context) {
    const indexing::Scores found(context, 4, ratio_, scale_);
    indexing::choose_keys(context, found, top_k_);
    const int64_t most = std::min(top_blocks_, (found.keys + block_size_ - 1) / block_size_);
    int64_t* to = ort::output<int64_t>(context, 1, {found.tokens, most});
    for (int64_t m = 0; m < found.tokens; m++) {
      const indexing::Seen seen = found[m];
      thread_local std::vector<float> blocks;
      blocks.resize((seen.count + block_size_ - 1) / block_size_);
      std::fill(blocks.begin(), blocks.end(), -INFINITY);
      for (int64_t n = 0; n < seen.count; n++) blocks[n / block_size_] = std::max(blocks[n / block_size_], seen.scores[n]);
      if (!blocks.empty()) blocks.back() = INFINITY;  // that of the newest key is always taken
      indexing::best({blocks.data(), int64_t(blocks.size())}, most, to + m * most);
    }
  }

 private:
  int64_t top_k_, ratio_, top_blocks_, block_size_;
  float scale_;
};

class IndexReselect {
 public:
  static constexpr const char* kName = "IndexReselect";
  static constexpr ort::Type kOutputs[] = {ort::kInt64};

  explicit IndexReselect(const ort::Info* info)
      : top_k_(ort::attribute(info, "top_k")), ratio_(ort::attribute(info, "ratio")),
        block_size_(ort::attribute(info, "block_size")), scale_(ort::real(info, "scale")) {}

  void compute(ort::Context* context) {
    const int64_t each = ort::Shape(ort::input(context, 4)).dims[1];
    const int64_t* blocks = ort::data<int64_t>(context, 4);
    indexing::choose_keys(context, indexing::Scores(context, 5, ratio_, scale_, blocks, each, block_size_), top_k_);
  }

 private:
  int64_t top_k_, ratio_, block_size_;
  float scale_;
};
