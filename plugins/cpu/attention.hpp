// Softmax attention in one pass over the rows that a query sees, which are keys and values at once and lie where the caller
// has them. See ../segments.py for the equations.
#pragma once

#include <cmath>

#include "stored.hpp"
#include "sums.hpp"

// Rows at equal distances.
struct Span {
  Format format;
  const uint8_t* first;
  int64_t stride, count;
};

// A segment [B, n, W] of rows.
struct Segment {
  Format format;
  const uint8_t* data;
  int64_t count, stride;

  explicit Segment(const ort::Value* value) : data(ort::bytes(value)) {
    const ort::Shape shape(value);
    format = format_of(shape.type);
    count = shape.dims[1];
    stride = shape.dims[2] * with_plain(format, [](auto f) { return decltype(f)::bytes(1); });
  }

  // Rows first <= i < last of sequence b, if there are any.
  void take(std::vector<Span>& spans, int64_t b, int64_t first, int64_t last) const {
    if (first < last) spans.push_back({format, data + (b * count + first) * stride, stride, last - first});
  }
};

namespace attention {

constexpr int64_t kSplit = 256;  // rows worth a task of their own
constexpr int64_t kGroup = 8;    // tokens whose rows are prepared for AMX together
constexpr int64_t kColumns = 64; // of values that are paired and summed while they are in the first-level cache

// Query heads, of one token or of several.
struct Queries {
  int64_t width, value_width;
  float scale;
  bool tiles;  // whether AMX multiplies them
  std::vector<const float*> each;
  std::vector<int64_t> seen;  // of each, how many rows it sees, which are the first ones
  amx::Pairs pairs;           // the same for AMX

  int64_t count() const { return each.size(); }
};

// Sums of some rows, not yet divided: z[h] of `stride` columns, and each head's greatest score and sum of exponentials.
struct Partial {
  int64_t stride = 0;
  std::vector<float> z, greatest, total;

  void clear(const Queries& queries) {
    stride = amx::spread(queries.value_width, amx::kSide);
    z.assign(amx::whole(queries.count(), amx::kSide) * stride, 0);
    greatest.assign(queries.count(), -INFINITY);
    total.assign(queries.count(), 0);
  }

  // Scores p[h * kTile + row] of `count` rows from number `first` on become their exponentials, and zeros where a head sees
  // no row.
  void take(float* p, int64_t first, int64_t count, const Queries& queries) {
    for (int64_t h = 0; h < queries.count(); h++, p += kTile) {
      const int64_t some = std::clamp<int64_t>(queries.seen[h] - first, 0, count);
      std::fill(p + some, p + kTile, -INFINITY);
      if (some) take_head(h, p, some, queries.scale);
      std::fill(p + some, p + kTile, 0.0f);
    }
  }

 private:
  void take_head(int64_t h, float* p, int64_t count, float scale) {
    Floats highest = all(greatest[h]), sums{};
    for (int64_t t = 0; t < count; t += kLanes) {
      store(p + t, load(p + t) * scale);
      highest = most(highest, load(p + t));
    }
    const float now = *std::max_element(&highest[0], &highest[0] + kLanes);
    for (int64_t t = 0; t < count; t += kLanes) {
      const Floats e = exp(load(p + t) - now);  // of what is not seen, too small to count
      store(p + t, e);
      sums += e;
    }
    if (now > greatest[h]) {
      const float fade = std::exp(greatest[h] - now);
      total[h] *= fade;
      for (int64_t v = 0; v < stride; v++) z[h * stride + v] *= fade;
      greatest[h] = now;
    }
    total[h] += sum(sums);
  }
};

// How many numbers rows are apart, if AMX can take a whole tile of them as they lie; else 0.
template <class F>
int64_t as_lines(const uint8_t* const* rows, int64_t count, int64_t width) {
  if (!std::is_same_v<F, Bfloat16> || count < kTile || width % amx::kDepth) return 0;
  const int64_t apart = rows[1] - rows[0];
  for (int64_t t = 1; t < count; t++)
    if (rows[t] - rows[t - 1] != apart) return 0;
  return apart % 2 ? 0 : apart / 2;
}

// At most a tile of rows of one format, of which the first has number `first`, taken up by every head.
template <class F>
void add_tile(const uint8_t* const* rows, int64_t first, int64_t count, const Queries& queries, Partial& to) {
  thread_local std::vector<float> scores;
  scores.resize(queries.count() * kTile);
  Matrix keys;
  keys.rows = rows;
  keys.width = queries.width;
  if (!queries.tiles) {
    products<F>(keys, 0, count, queries.each.data(), queries.count(), scores.data(), kTile);
    to.take(scores.data(), first, count, queries);
    return add_columns<F>(rows, count, 0, queries.value_width, scores.data(), to.z.data(), to.stride, queries.count());
  }
  // Exponentials go in as they are, in parts.
  thread_local amx::Lines copies, shares;
  thread_local amx::Pairs values;
  shares.resize(amx::whole(queries.count(), amx::kSide), count, amx::kParts);
  amx::Left lines{};
  amx::Ahead ahead;
  if (const int64_t stride = as_lines<F>(rows, count, queries.width)) {
    lines = {reinterpret_cast<const uint16_t*>(rows[0]), stride, queries.width};
    const int64_t bytes = 2 * stride * kTile;
    ahead = {rows[0] + bytes, bytes, amx::whole(2 * bytes * kColumns / (queries.value_width * kTile), 64)};
  } else {
    copies.resize(amx::whole(count, amx::kBlock), queries.width);
    for (int64_t t = 0; t < count; t++) amx::widen<F>(keys, t, copies[t], copies.depth);
    lines = copies;
  }
  const amx::Tiles tiles;
  amx::products(lines, count, queries.pairs, scores.data(), kTile);
  to.take(scores.data(), first, count, queries);
  for (int64_t h = 0; h < queries.count(); h++)
    amx::narrow(scores.data() + h * kTile, shares.depth, shares[h], shares.depth, amx::kParts);
  for (int64_t c = 0; c < queries.value_width; c += kColumns, lines.first += kColumns) {
    amx::across(values, lines, count, std::min(kColumns, queries.value_width - c), &ahead);
    amx::add(shares, queries.count(), values, to.z.data() + c, to.stride);
  }
}

// Rows first <= i < last of all that the spans have.
inline void add_rows(const std::vector<Span>& spans, int64_t first, int64_t last, const Queries& queries, Partial& to) {
  const uint8_t* rows[kTile];
  int64_t count = 0, next = first, begin = 0;
  Format format = Format::kFloat32;
  auto flush = [&] {
    if (count) with_plain(format, [&](auto f) { add_tile<decltype(f)>(rows, next, count, queries, to); });
    next += count;
    count = 0;
  };
  for (const Span& span : spans) {
    const int64_t from = std::max(first - begin, int64_t{0}), end = std::min(last - begin, span.count);
    if (from < end && span.format != format) {
      flush();
      format = span.format;
    }
    for (int64_t i = from; i < end; i++) {
      rows[count++] = span.first + i * span.stride;
      if (count == kTile) flush();
    }
    begin += span.count;
  }
  flush();
}

inline int64_t rows_of(const std::vector<Span>& spans) {
  int64_t count = 0;
  for (const Span& span : spans) count += span.count;
  return count;
}

}  // namespace attention

// What an operator has to say: which rows a query sees, whether each token sees those of the one before and one more
// (kGrowing), and where its sinks are.
template <class Rows>
class Attention {
 public:
  static constexpr const char* kName = Rows::kName;
  static constexpr ort::Type kOutputs[] = {ort::kFloat};

  explicit Attention(const ort::Info* info) : rows_(info), scale_(ort::real(info, "scale")), rounding_(rounding_of(ort::text(info, "activations"))) {}

  void compute(ort::Context* context) {
    using namespace attention;
    const ort::Value* q = ort::input(context, 0);
    const ort::Shape shape(q);
    const int64_t tokens = shape.dims[0], heads = shape.dims[1], width = shape.dims[2];
    const int64_t value_width = rows_.value_width(width);
    const typename Rows::Bound bound(rows_, context);
    float* z = ort::output<float>(context, 0, {tokens, heads, value_width});
    if (!tokens) return;
    const float* from = reinterpret_cast<const float*>(ort::bytes(q));
    const bool tiles = amx::parts(rounding_, heads) == 1;
    const int64_t steps = tokens / bound.batch, group = tiles && Rows::kGrowing ? kGroup : 1;

    // Tokens are tasks; where they are few, so are parts of what they see.
    Buffers& mine = buffers<Buffers>();
    std::vector<Task>& tasks = mine.tasks;
    std::vector<Partial>& partials = mine.partials;
    tasks.clear();
    for (int64_t m = 0; m < tokens; m += tasks.back().count) {
      const int64_t count = std::min(group, steps - m % steps);
      tasks.push_back({m, count, 0, INT64_MAX});
      if (tokens >= kGroup) continue;
      mine.spans.clear();
      bound.spans(mine.spans, m / steps, m % steps + count - 1);
      for (int64_t rest = rows_of(mine.spans) - kSplit; rest > 0; rest -= kSplit) {
        const int64_t first = tasks.back().first + kSplit;
        tasks.back().last = first;
        tasks.push_back({m, count, first, INT64_MAX});
      }
    }
    const bool split = tokens < kGroup;
    if (split) at_least(partials, tasks.size());
    ort::parallel(context, tasks.size(), [&](size_t i) {
      const Task& task = tasks[i];
      thread_local Queries queries;
      thread_local std::vector<Span> spans;
      thread_local std::vector<Partial> own(1);
      spans.clear();
      bound.spans(spans, task.token / steps, task.token % steps + task.count - 1);
      const int64_t last = rows_of(spans);
      queries.width = width;
      queries.value_width = value_width;
      queries.scale = scale_;
      queries.tiles = tiles;
      queries.each.clear();
      queries.seen.clear();
      for (int64_t h = 0; h < task.count * heads; h++) {
        queries.each.push_back(from + (task.token * heads + h) * width);
        queries.seen.push_back(last - (task.count - 1 - h / heads));
      }
      if (tiles) amx::pack(queries.pairs, queries.each, width);
      Partial& partial = split ? partials[i] : own[0];
      partial.clear(queries);
      add_rows(spans, task.first, std::min(task.last, last), queries, partial);
      if (!split) join(own, 0, 1, bound.sinks, heads, task, value_width, z);
    });
    for (size_t i = 0, end = 0; split && i < tasks.size(); i = end) {
      for (end = i; end < tasks.size() && tasks[end].token == tasks[i].token; end++) continue;
      join(partials, i, end, bound.sinks, heads, tasks[i], value_width, z);
    }
  }

 private:
  // Of the rows that the last of `count` tokens sees.
  struct Task {
    int64_t token, count, first, last;
  };

  struct Buffers {
    std::vector<Task> tasks;
    std::vector<Span> spans;
    std::vector<attention::Partial> partials;
  };

  void join(const std::vector<attention::Partial>& partials, size_t first, size_t last, const float* sinks, int64_t heads,
            const Task& task, int64_t width, float* z) const {
    for (int64_t h = 0; h < task.count * heads; h++) {
      float greatest = sinks ? sinks[h % heads] : -INFINITY;
      for (size_t i = first; i < last; i++) greatest = std::max(greatest, partials[i].greatest[h]);
      float total = sinks ? std::exp(sinks[h % heads] - greatest) : 0;
      for (size_t i = first; i < last; i++)
        if (partials[i].total[h] > 0) total += partials[i].total[h] * std::exp(partials[i].greatest[h] - greatest);
      float* to = z + (task.token * heads + h) * width;
      std::fill(to, to + width, 0.0f);
      for (size_t i = first; i < last; i++) {
        if (!(partials[i].total[h] > 0)) continue;
        const float share = std::exp(partials[i].greatest[h] - greatest) / total;
        const float* part = partials[i].z.data() + h * partials[i].stride;
        for (int64_t v = 0; v < width; v++) to[v] += share * part[v];
      }
      for (int64_t v = 0; rounding_ != Rounding::kNone && v < width; v += kLanes) {
        const int some = static_cast<int>(std::min<int64_t>(kLanes, width - v));
        store_first(to + v, rounded(load_first(to + v, some), rounding_), some);
      }
    }
  }

  Rows rows_;
  float scale_;
  Rounding rounding_;
};

// What the nodes have in common once they are bound to inputs.
struct BoundRows {
  int64_t batch;
  const int64_t* position;
  const float* sinks = nullptr;
  Segment fresh, held;

  BoundRows(ort::Context* context, size_t position)
      : batch(ort::Shape(ort::input(context, 1)).dims[0]), position(ort::data<int64_t>(context, position)),
        fresh(ort::input(context, 1)), held(ort::input(context, 2)) {}
};

struct LatentRows {
  static constexpr const char* kName = "LatentAttention";
  static constexpr bool kGrowing = true;
  int64_t latent;

  explicit LatentRows(const ort::Info* info) : latent(ort::attribute(info, "latent_width")) {}
  int64_t value_width(int64_t) const { return latent; }

  struct Bound : BoundRows {
    Bound(const LatentRows&, ort::Context* context) : BoundRows(context, 3) {}
    void spans(std::vector<Span>& to, int64_t b, int64_t s) const {
      held.take(to, b, 0, std::min(position[b], held.count));
      fresh.take(to, b, 0, s + 1);
    }
  };
};

struct SparseLatentRows : LatentRows {
  static constexpr const char* kName = "SparseLatentAttention";
  static constexpr bool kGrowing = false;
  using LatentRows::LatentRows;

  struct Bound : BoundRows {
    const int64_t* selected;
    int64_t each;

    Bound(const SparseLatentRows&, ort::Context* context)
        : BoundRows(context, 4), selected(ort::data<int64_t>(context, 3)), each(ort::Shape(ort::input(context, 3)).dims[1]) {}
    void spans(std::vector<Span>& to, int64_t b, int64_t s) const {
      take_selected(to, b, selected + (b * fresh.count + s) * each, each, position[b], fresh, held);
    }
  };

  // Rows by number: those below `before` are held.
  static void take_selected(std::vector<Span>& to, int64_t b, const int64_t* numbers, int64_t count, int64_t before,
                            const Segment& fresh, const Segment& held) {
    for (int pass = 0; pass < 2; pass++)  // spans of one format after those of the other
      for (int64_t i = 0; i < count; i++) {
        const int64_t n = numbers[i];
        if (n < 0 || (n < before) == pass) continue;
        const Segment& segment = n < before ? held : fresh;
        const int64_t at = n < before ? n : n - before;
        if (at >= segment.count) throw std::out_of_range("there is no row of a selected number");
        segment.take(to, b, at, at + 1);
      }
  }
};

// The newest tokens, by a ring and the step's own rows.
struct WindowRows {
  static constexpr const char* kName = "WindowAttention";
  static constexpr bool kGrowing = false;

  explicit WindowRows(const ort::Info*) {}
  int64_t value_width(int64_t width) const { return width; }

  struct Bound : BoundRows {
    const int64_t* since;

    Bound(const WindowRows&, ort::Context* context) : Bound(context, 3) {}
    // Sinks and `since` follow the position.
    Bound(ort::Context* context, size_t position) : BoundRows(context, position) {
      sinks = ort::data<float>(context, position + 1);
      since = ort::inputs(context) > position + 2 ? ort::data<int64_t>(context, position + 2) : nullptr;
    }
    void spans(std::vector<Span>& to, int64_t b, int64_t s) const {
      const int64_t ring = held.count, now = position[b];
      const int64_t first = std::max({since ? since[b] : 0, now + s - ring + 1, now - ring, int64_t{0}});
      if (first < now) {
        const int64_t from = first % ring, count = now - first;
        held.take(to, b, from, std::min(from + count, ring));
        held.take(to, b, 0, from + count - ring);
      }
      fresh.take(to, b, std::max<int64_t>(0, s - ring + 1), s + 1);
    }
  };
};

struct EntryRows : WindowRows {
  int64_t ratio;

  explicit EntryRows(const ort::Info* info) : WindowRows(info), ratio(ort::attribute(info, "ratio")) {}
};

struct CompressedRows : EntryRows {
  static constexpr const char* kName = "CompressedAttention";
  using EntryRows::EntryRows;

  struct Bound : WindowRows::Bound {
    int64_t ratio;
    Segment fresh_entries, entries;

    Bound(const CompressedRows& rows, ort::Context* context)
        : WindowRows::Bound(context, 5), ratio(rows.ratio), fresh_entries(ort::input(context, 3)),
          entries(ort::input(context, 4)) {}
    void spans(std::vector<Span>& to, int64_t b, int64_t s) const {
      const int64_t before = position[b] / ratio, complete = (position[b] + s + 1) / ratio;
      WindowRows::Bound::spans(to, b, s);
      entries.take(to, b, 0, std::min(before, entries.count));
      fresh_entries.take(to, b, 0, complete - before);
    }
  };
};

struct SparseRows : EntryRows {
  static constexpr const char* kName = "SparseAttention";
  using EntryRows::EntryRows;

  struct Bound : WindowRows::Bound {
    int64_t ratio, each;
    const int64_t* selected;
    Segment fresh_entries, entries;

    Bound(const SparseRows& rows, ort::Context* context)
        : WindowRows::Bound(context, 6), ratio(rows.ratio), each(ort::Shape(ort::input(context, 5)).dims[1]),
          selected(ort::data<int64_t>(context, 5)), fresh_entries(ort::input(context, 3)), entries(ort::input(context, 4)) {}
    void spans(std::vector<Span>& to, int64_t b, int64_t s) const {
      WindowRows::Bound::spans(to, b, s);
      SparseLatentRows::take_selected(to, b, selected + (b * fresh.count + s) * each, each, position[b] / ratio,
                                      fresh_entries, entries);
    }
  };
};
