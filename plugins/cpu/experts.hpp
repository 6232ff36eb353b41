// v4::MoeExperts: x [M, D] float32, weights [M, K] float32, indices [M, K] int64, E gates, E ups, E downs, then as many
// multipliers and as many of theirs where there are any -> [M, D] float32, rounded where the node's own type is.
#pragma once

#include "pointwise.hpp"

class MoeExperts {
 public:
  static constexpr const char* kName = "MoeExperts";
  static constexpr ort::Type kOutputs[] = {ort::kFloat};

  explicit MoeExperts(const ort::Info* info)
      : experts_(ort::attribute(info, "num_experts")), into_(info), back_(into_.transposed()),
        limit_(ort::real(info, "limit")), rounding_(rounding_of(ort::text(info, "activations"))) {}

  void compute(ort::Context* context) {
    const ort::Shape chosen(ort::input(context, 2));
    const int64_t tokens = chosen.dims[0], each = chosen.dims[1];
    float* y = ort::output<float>(context, 0, {tokens, into_.width});
    if (!tokens) return;
    const float* x = ort::data<float>(context, 0);
    Buffers& own = buffers<Buffers>();
    own.order.sort(ort::data<int64_t>(context, 2), tokens * each, experts_);
    own.from.resize(tokens * each);
    own.inner.resize(tokens * each);
    own.h.resize(tokens * each * into_.rows);
    own.z.resize(tokens * each * into_.width);
    for (int64_t i = 0; i < tokens * each; i++) {
      own.from[i] = x + own.order.slots[i] / each * into_.width;
      own.inner[i] = own.h.data() + i * into_.rows;
    }
    run(context, own, into_, own.from.data(), [&](const Visit& visit, const Vectors& vectors, int64_t first, int64_t last) {
      up(context, visit, vectors, first, last, own.h.data());
    });
    run(context, own, back_, own.inner.data(), [&](const Visit& visit, const Vectors& vectors, int64_t first, int64_t last) {
      const Stored down = matrix(context, back_, 2 * experts_ + visit.expert);
      multiply(down, first, last, vectors, own.z.data() + visit.begin * into_.width, into_.width);
    });
    mix(context, own.z.data(), own.order.places.data(), ort::data<float>(context, 1), tokens, each, y);
  }

 private:
  // The tokens that chose an expert, by their places among slots in order of expert.
  struct Visit {
    int64_t expert, begin, end;
  };

  // Slots, which are pairs of a token and one of its choices, in order of expert.
  struct Order {
    std::vector<Visit> visits;
    std::vector<int64_t> slots, places;  // slot by place in that order, place by slot
    std::vector<int64_t> begin;          // of an expert among them

    void sort(const int64_t* indices, int64_t count, int64_t experts) {
      visits.clear();
      slots.resize(count);
      places.resize(count);
      begin.assign(experts + 1, 0);
      for (int64_t i = 0; i < count; i++) {
        if (indices[i] < 0 || indices[i] >= experts) throw std::out_of_range("there is no expert of that number");
        begin[indices[i] + 1]++;
      }
      for (int64_t e = 0; e < experts; e++) {
        if (begin[e + 1]) visits.push_back({e, begin[e], begin[e] + begin[e + 1]});
        begin[e + 1] += begin[e];
      }
      for (int64_t i = 0; i < count; i++) {
        places[i] = begin[indices[i]]++;
        slots[places[i]] = i;
      }
    }
  };

  // Rows first <= n < last of the matrix of a visit, or one of the panels that its vectors are packed into.
  struct Task {
    size_t visit;
    int64_t first, last;
  };

  struct Buffers {
    Order order;
    std::vector<const float*> from, inner;  // the vectors of slots, and what comes of them
    std::vector<float> h, z;
    std::vector<Vectors> vectors;    // of a visit, and as AMX takes them
    std::vector<amx::Pairs> pairs;
    std::vector<Task> panels, tasks;
  };

  Stored matrix(const ort::Context* context, const Form& form, int64_t number) const {
    const int64_t all = 3 * experts_, given = static_cast<int64_t>(ort::inputs(context));
    auto of = [&](int64_t part) { return 3 + part * all < given ? ort::input(context, 3 + part * all + number) : nullptr; };
    return Stored(form, of(0), of(1), of(2));
  }

  // Shares the rows of every visited expert's matrix out, to be multiplied by the vectors of its slots.
  template <class Action>
  void run(ort::Context* context, Buffers& own, const Form& form, const float* const* slots, const Action& action) const {
    const std::vector<Visit>& visits = own.order.visits;
    std::vector<Vectors>& vectors = own.vectors;
    std::vector<amx::Pairs>& pairs = own.pairs;
    std::vector<Task> &panels = own.panels, &tasks = own.tasks;
    vectors.clear();
    at_least(pairs, visits.size());
    panels.clear();
    tasks.clear();
    for (size_t v = 0; v < visits.size(); v++) {
      vectors.push_back({slots + visits[v].begin, visits[v].end - visits[v].begin});
      if (const int parts = amx::parts(rounding_, vectors[v].count)) {
        pairs[v].resize(vectors[v].count, form.width, parts);
        vectors[v].pairs = &pairs[v];
        for (int64_t panel = 0; panel < pairs[v].panels(); panel++) panels.push_back({v, panel, panel + 1});
      }
      const int64_t rows = share(form.rows, form.width, vectors[v]);
      for (int64_t first = 0; first < form.rows; first += rows) tasks.push_back({v, first, std::min(first + rows, form.rows)});
    }
    ort::parallel(context, panels.size(), [&](size_t i) {
      amx::pack(pairs[panels[i].visit], vectors[panels[i].visit].each, form.width, panels[i].first);
    });
    ort::parallel(context, tasks.size(), [&](size_t i) {
      action(visits[tasks[i].visit], vectors[tasks[i].visit], tasks[i].first, tasks[i].last);
    });
  }

  // h[i][n] = silu(gate_n . x_i) * (up_n . x_i)
  void up(ort::Context* context, const Visit& visit, const Vectors& vectors, int64_t first, int64_t last, float* h) const {
    thread_local std::vector<float> sums;
    const int64_t count = vectors.count, rows = last - first;
    sums.resize(2 * count * rows);
    float *gate = sums.data() - first, *up = gate + count * rows;
    multiply(matrix(context, into_, visit.expert), first, last, vectors, gate, rows);
    multiply(matrix(context, into_, experts_ + visit.expert), first, last, vectors, up, rows);
    for (int64_t c = 0; c < count; c++) {
      float* to = h + (visit.begin + c) * into_.rows;
      for (int64_t n = first; n < last; n += kLanes) {
        const int some = static_cast<int>(std::min<int64_t>(kLanes, last - n));
        const Floats value = hidden(load_first(gate + c * rows + n, some), load_first(up + c * rows + n, some));
        store_first(to + n, value, some);
      }
    }
  }

  Floats hidden(Floats gate, Floats up) const {
    return rounded(swiglu(rounded(gate, rounding_), rounded(up, rounding_), limit_), rounding_);
  }

  // y[m] = sum over k of w[m, k] z[m, k]
  void mix(ort::Context* context, const float* z, const int64_t* places, const float* weights, int64_t tokens, int64_t each,
           float* y) const {
    ort::parallel(context, tokens, [&](size_t m) {
      for (int64_t d = 0; d < into_.width; d += kLanes) {
        const int some = static_cast<int>(std::min<int64_t>(kLanes, into_.width - d));
        Floats total{};
        for (int64_t i = m * each; i < int64_t(m + 1) * each; i++)
          total += weights[i] * rounded(load_first(z + places[i] * into_.width + d, some), rounding_);
        store_first(y + m * into_.width + d, rounded(total, rounding_), some);
      }
    });
  }

  int64_t experts_;
  Form into_, back_;  // of gates and ups, of downs
  float limit_;
  Rounding rounding_;
};
