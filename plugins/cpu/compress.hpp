// Entries pooled from the rows of their tokens. See ../compress_tokens/op.py.
#pragma once

#include <cmath>

#include "stored.hpp"

// v4::CompressTokens: rows float32 [B, S, P], ring float32 [B, R, P], bias float32 [ratio, P / 2], position int64 [B] ->
// entries [B, U, W]
class CompressTokens {
 public:
  static constexpr const char* kName = "CompressTokens";
  static constexpr ort::Type kOutputs[] = {ort::kFloat};
  static constexpr int64_t kColumns = 64;  // of a task

  explicit CompressTokens(const ort::Info* info) : ratio_(ort::attribute(info, "ratio")), halves_(ort::attribute(info, "halves")) {}

  void compute(ort::Context* context) {
    const ort::Shape shape(ort::input(context, 0)), of_ring(ort::input(context, 1));
    const int64_t batch = shape.dims[0], steps = shape.dims[1], planes = shape.dims[2], kept = halves_ * ratio_;
    const int64_t width = planes / (2 * halves_), entries = (steps + ratio_ - 1) / ratio_, columns = (width + kColumns - 1) / kColumns;
    if (of_ring.dims != ort::Dims{batch, kept, planes}) throw std::invalid_argument("a ring of other sizes than the rows'");
    const float *rows = ort::data<float>(context, 0), *ring = ort::data<float>(context, 1), *bias = ort::data<float>(context, 2);
    const int64_t* position = ort::data<int64_t>(context, 3);
    float* to = ort::output<float>(context, 0, {batch, entries, width});
    ort::parallel(context, batch * entries * columns, [&](size_t task) {
      const int64_t entry = task / columns, b = entry / entries, first = task % columns * kColumns;
      const int64_t start = position[b], owner = start / ratio_ + entry % entries;
      thread_local std::vector<Row> found;
      found.clear();
      for (int64_t slot = 0; slot < kept; slot++) {
        const int64_t half = slot / ratio_, place = slot % ratio_, token = (owner + half - (halves_ - 1)) * ratio_ + place;
        if (token < 0 || token >= start + steps) continue;
        const float* row = token < start ? ring + (b * kept + token % kept) * planes : rows + (b * steps + token - start) * planes;
        found.push_back({row + half * width, row + (halves_ + half) * width, bias + (place * halves_ + half) * width});
      }
      for (int64_t w = first; w < std::min(first + kColumns, width); w += kLanes)
        pool(found, w, static_cast<int>(std::min<int64_t>(kLanes, width - w)), to + entry * width + w);
    });
  }

 private:
  // A token's part in an entry.
  struct Row {
    const float *key, *gate, *bias;
  };

  // Of some channels: keys by the softmax of their gates.
  static void pool(const std::vector<Row>& rows, int64_t w, int some, float* to) {
    const auto score = [&](const Row& row) { return load_first(row.gate + w, some) + load_first(row.bias + w, some); };
    Floats highest = all(-INFINITY), total{}, sums{};
    for (const Row& row : rows) highest = most(highest, score(row));
    for (const Row& row : rows) {
      const Floats share = exp(score(row) - highest);
      total += share;
      sums += share * load_first(row.key + w, some);
    }
    store_first(to, sums / total, some);
  }

  int64_t ratio_, halves_;
};
