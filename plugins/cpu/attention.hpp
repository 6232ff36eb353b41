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

// Sums of some rows, not yet divided: z[h] of `stride` columns, and each head's greatest score and sum of exponentials.
struct Partial {
  int64_t stride;
  std::vector<float> z, greatest, total;

  Partial(int64_t heads, int64_t width)
      : stride((width + kLanes - 1) / kLanes * kLanes), z(heads * stride), greatest(heads, -INFINITY), total(heads) {}
};

// Rows of one format, at most a tile of them, taken up by every head.
template <class F>
void add_tile(const uint8_t* const* rows, int64_t count, const float* const* queries, int64_t heads, int64_t width,
              int64_t value_width, Partial& to) {
  thread_local std::vector<float> scores;
  scores.assign(heads * kTile, -INFINITY);
  Matrix keys;
  keys.rows = rows;
  keys.width = width;
  products<F>(keys, 0, count, queries, heads, scores.data(), kTile);
  for (int64_t h = 0; h < heads; h++) {
    float* p = scores.data() + h * kTile;
    const float before = to.greatest[h], now = std::max(before, *std::max_element(p, p + count));
    Floats total{};
    for (int64_t t = 0; t < count; t += kLanes) {
      Floats e = exp(load(p + t) - now);
      for (int64_t lane = count - t; lane < kLanes; lane++) e[lane] = 0;
      store(p + t, e);
      total += e;
    }
    if (now > before) {
      const float fade = std::exp(before - now);
      to.total[h] *= fade;
      for (int64_t v = 0; v < to.stride; v++) to.z[h * to.stride + v] *= fade;
      to.greatest[h] = now;
    }
    to.total[h] += sum(total);
  }
  add_columns<F>(rows, count, 0, value_width, scores.data(), to.z.data(), to.stride, heads);
}

// Rows first <= i < last of all that the spans have.
inline void add_rows(const std::vector<Span>& spans, int64_t first, int64_t last, const float* const* queries, int64_t heads,
                     int64_t width, int64_t value_width, Partial& to) {
  const uint8_t* rows[kTile];
  int64_t count = 0, begin = 0;
  Format format = Format::kFloat32;
  auto flush = [&] {
    if (count)
      with_plain(format, [&](auto f) { add_tile<decltype(f)>(rows, count, queries, heads, width, value_width, to); });
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

}  // namespace attention

// What an operator has to say: which rows a query sees, and where its sinks are.
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
    std::vector<float> scaled(tokens * heads * width);
    const float* from = reinterpret_cast<const float*>(ort::bytes(q));
    for (size_t i = 0; i < scaled.size(); i++) scaled[i] = from[i] * scale_;

    // Tokens are tasks; where they are few, so are parts of what they see.
    const int64_t batch = bound.batch, steps = tokens / batch, most = tokens < 8 ? kSplit : INT64_MAX;
    struct Task {
      int64_t token, first, last;
    };
    std::vector<std::vector<Span>> seen(tokens);
    std::vector<Task> tasks;
    for (int64_t m = 0; m < tokens; m++) {
      bound.spans(seen[m], m / steps, m % steps);
      int64_t count = 0;
      for (const Span& span : seen[m]) count += span.count;
      for (int64_t first = 0; first == 0 || first < count; first += most) {
        tasks.push_back({m, first, most < count - first ? first + most : count});
        if (most >= count - first) break;
      }
    }
    std::vector<Partial> partials;
    partials.reserve(tasks.size());
    for (size_t i = 0; i < tasks.size(); i++) partials.emplace_back(heads, value_width);
    ort::parallel(context, tasks.size(), [&](size_t i) {
      thread_local std::vector<const float*> queries;
      queries.resize(heads);
      for (int64_t h = 0; h < heads; h++) queries[h] = scaled.data() + (tasks[i].token * heads + h) * width;
      add_rows(seen[tasks[i].token], tasks[i].first, tasks[i].last, queries.data(), heads, width, value_width, partials[i]);
    });
    for (size_t i = 0, end = 0; i < tasks.size(); i = end) {
      for (end = i; end < tasks.size() && tasks[end].token == tasks[i].token; end++) continue;
      join(partials, i, end, bound.sinks, heads, value_width, z + tasks[i].token * heads * value_width);
    }
  }

 private:
  void join(const std::vector<attention::Partial>& partials, size_t first, size_t last, const float* sinks, int64_t heads,
            int64_t width, float* z) const {
    for (int64_t h = 0; h < heads; h++) {
      float greatest = sinks ? sinks[h] : -INFINITY;
      for (size_t i = first; i < last; i++) greatest = std::max(greatest, partials[i].greatest[h]);
      float total = sinks ? std::exp(sinks[h] - greatest) : 0;
      for (size_t i = first; i < last; i++)
        if (partials[i].total[h] > 0) total += partials[i].total[h] * std::exp(partials[i].greatest[h] - greatest);
      float* to = z + h * width;
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
