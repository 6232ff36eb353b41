// Which experts tokens take, and with what weights. See ../moe_route/op.py and ../hash_route/op.py.
#pragma once

#include <cfloat>
#include <cmath>
#include <numeric>

#include "onnxruntime.hpp"
#include "vectors.hpp"

namespace routing {

constexpr size_t kTokens = 16;  // of a task

// Scores of a token's experts, and weights of those that are chosen.
class Scoring {
 public:
  explicit Scoring(const ort::Info* info)
      : name_(ort::text(info, "scoring")), norm_(ort::attribute(info, "norm")), scale_(ort::real(info, "scale")) {}

  void scores(const float* logits, int64_t experts, float* to) const {
    const float highest = name_ == "softmax" ? *std::max_element(logits, logits + experts) : 0;
    for (int64_t e = 0; e < experts; e += kLanes) {
      const int some = static_cast<int>(std::min<int64_t>(kLanes, experts - e));
      store_first(to + e, score(load_first(logits + e, some), highest), some);
    }
    if (name_ != "softmax") return;
    const float total = std::accumulate(to, to + experts, 0.0f);
    for (int64_t e = 0; e < experts; e++) to[e] /= total;
  }

  void weights(const float* scores, const int64_t* chosen, int64_t count, float* to) const {
    float total = 1e-20f;
    for (int64_t k = 0; k < count; k++) total += to[k] = scores[chosen[k]];
    for (int64_t k = 0; k < count; k++) to[k] = (norm_ ? to[k] / total : to[k]) * scale_;
  }

 private:
  Floats score(Floats x, float highest) const {
    if (name_ == "softmax") return exp(x - highest);
    if (name_ == "sigmoid") return 1.0f / (1.0f + exp(-x));
    for (int lane = 0; lane < kLanes; lane++)  // the root of log(1 + e^x)
      x[lane] = std::sqrt(std::max(x[lane], 0.0f) + std::log1p(std::exp(-std::abs(x[lane]))));
    return x;
  }

  std::string name_;
  bool norm_;
  float scale_;
};

// Places of the greatest of `count` numbers in falling order, of equal ones the lower first.
inline void greatest(const float* numbers, int64_t count, int64_t most, int64_t* to) {
  thread_local std::vector<int64_t> places;
  places.resize(count);
  std::iota(places.begin(), places.end(), 0);
  std::partial_sort(places.begin(), places.begin() + most, places.end(), [&](int64_t a, int64_t b) {
    return numbers[a] != numbers[b] ? numbers[a] > numbers[b] : a < b;
  });
  std::copy(places.begin(), places.begin() + most, to);
}

}  // namespace routing

// v4::MoeRoute: logits [M, E], bias [E] -> weights float32 [M, K], experts int64 [M, K]
class MoeRoute {
 public:
  static constexpr const char* kName = "MoeRoute";
  static constexpr ort::Type kOutputs[] = {ort::kFloat, ort::kInt64};

  explicit MoeRoute(const ort::Info* info)
      : scoring_(info), top_k_(ort::attribute(info, "top_k")), groups_(ort::attribute(info, "num_groups")),
        open_(ort::attribute(info, "topk_groups")), best_(ort::text(info, "group_score") == "max" ? 1 : 2) {}

  void compute(ort::Context* context) {
    const ort::Shape shape(ort::input(context, 0));
    const int64_t tokens = shape.dims[0], experts = shape.dims[1];
    const float *logits = ort::data<float>(context, 0), *bias = ort::data<float>(context, 1);
    float* weights = ort::output<float>(context, 0, {tokens, top_k_});
    int64_t* chosen = ort::output<int64_t>(context, 1, {tokens, top_k_});
    ort::parallel_in_groups(context, tokens, routing::kTokens, [&](int64_t m) {
      thread_local std::vector<float> scores, choice;
      scores.resize(experts);
      choice.resize(experts);
      scoring_.scores(logits + m * experts, experts, scores.data());
      for (int64_t e = 0; e < experts; e++) choice[e] = scores[e] + bias[e];
      if (open_ < groups_) close_groups(choice);
      routing::greatest(choice.data(), experts, top_k_, chosen + m * top_k_);
      scoring_.weights(scores.data(), chosen + m * top_k_, top_k_, weights + m * top_k_);
    });
  }

 private:
  // Experts of all but the best groups get the lowest score there is.
  void close_groups(std::vector<float>& choice) const {
    const int64_t each = choice.size() / groups_;
    thread_local std::vector<float> totals;
    thread_local std::vector<int64_t> best, opened;
    totals.assign(groups_, 0);
    best.resize(best_);
    opened.resize(open_);
    for (int64_t g = 0; g < groups_; g++) {
      routing::greatest(choice.data() + g * each, each, best_, best.data());
      for (int64_t place : best) totals[g] += choice[g * each + place];
    }
    routing::greatest(totals.data(), groups_, open_, opened.data());
    for (int64_t g = 0; g < groups_; g++)
      if (std::find(opened.begin(), opened.end(), g) == opened.end())
        std::fill(choice.begin() + g * each, choice.begin() + (g + 1) * each, -FLT_MAX);
  }

  routing::Scoring scoring_;
  int64_t top_k_, groups_, open_, best_;  // of a group's experts, those whose scores are its own
};

// v4::HashRoute: logits [M, E], table int64 [V, K], ids int64 [M] -> weights float32 [M, K], experts int64 [M, K]
class HashRoute {
 public:
  static constexpr const char* kName = "HashRoute";
  static constexpr ort::Type kOutputs[] = {ort::kFloat, ort::kInt64};

  explicit HashRoute(const ort::Info* info) : scoring_(info) {}

  void compute(ort::Context* context) {
    const ort::Shape shape(ort::input(context, 0)), of_table(ort::input(context, 1));
    const int64_t tokens = shape.dims[0], experts = shape.dims[1], each = of_table.dims[1];
    const float* logits = ort::data<float>(context, 0);
    const int64_t *table = ort::data<int64_t>(context, 1), *ids = ort::data<int64_t>(context, 2);
    float* weights = ort::output<float>(context, 0, {tokens, each});
    int64_t* chosen = ort::output<int64_t>(context, 1, {tokens, each});
    ort::parallel_in_groups(context, tokens, routing::kTokens, [&](int64_t m) {
      thread_local std::vector<float> scores;
      scores.resize(experts);
      if (ids[m] < 0 || ids[m] >= of_table.dims[0]) throw std::out_of_range("there is no token of that number");
      std::copy_n(table + ids[m] * each, each, chosen + m * each);
      for (int64_t k = 0; k < each; k++)
        if (chosen[m * each + k] < 0 || chosen[m * each + k] >= experts) throw std::out_of_range("there is no expert of that number");
      scoring_.scores(logits + m * experts, experts, scores.data());
      scoring_.weights(scores.data(), chosen + m * each, each, weights + m * each);
    });
  }

 private:
  routing::Scoring scoring_;
};
