#include "v4export/model.hpp"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <limits>
#include <optional>

#include "description.hpp"
#include "lookup.hpp"
#include "onnxruntime.hpp"
#include "state.hpp"
#include "tensorrt.hpp"

namespace v4export {
namespace {

using Clock = std::chrono::steady_clock;

double seconds(Clock::time_point from, Clock::time_point to) {
  return std::chrono::duration<double>(to - from).count();
}

Description described(const std::string& bundle, const Options& options) {
  const std::string folder = options.description.empty() ? V4EXPORT_DESCRIPTION : options.description;
  return Description::load(folder, bundle, options.tensorrt);
}

std::unique_ptr<Graph> opened(const Description& model, const Options& options) {
  if (options.tensorrt) return open_tensorrt(model.graph, options.plugins);
  return open_onnxruntime(model.graph, model.folder, options.library, options.threads);
}

}  // namespace

struct Model::Parts {
  const Description model;
  std::unique_ptr<Graph> graph;
  std::optional<Lookups> lookups;
  State state;
  std::vector<std::int64_t> history;
  std::vector<float> logits;

  Parts(const std::string& bundle, const Options& options)
      : model(described(bundle, options)),
        graph(opened(model, options)),
        state(model.state, model.limit),
        // Never empty: onnxruntime refuses a null address even of a tensor without elements.
        logits(static_cast<std::size_t>(model.vocab)) {
    if (model.engram) lookups.emplace(*model.engram, model.activations);
    reset();
  }

  void reset() {
    state = State(model.state, model.limit);
    if (lookups) history = lookups->empty_history();
  }

  // Before anything is run, so that a refused prompt leaves the sequence as it was.
  void check(const std::vector<std::int64_t>& ids) const {
    if (ids.empty()) throw Error(Exit::INPUT, "a prompt is empty", "0 tokens", "give at least one token");
    for (std::int64_t id : ids) {
      if (id < 0 || id >= model.vocab) {
        throw Error(Exit::INPUT, "a token is not in the vocabulary",
                    std::to_string(id) + "; they are 0 to " + std::to_string(model.vocab - 1),
                    "use the tokenizer of this model");
      }
      const auto refused = model.refused.find(id);
      if (refused != model.refused.end()) {
        throw Error(Exit::UNSUPPORTED, "the prompt has a token that is not supported",
                    "token " + std::to_string(id) + ": " + refused->second, "leave it out");
      }
    }
    if (state.length() + static_cast<std::int64_t>(ids.size()) > model.limit) {
      throw Error(Exit::INPUT, "a prompt is longer than the model was built for",
                  std::to_string(ids.size()) + " tokens after " + std::to_string(state.length()) + ", at most " +
                      std::to_string(model.limit),
                  "shorten the prompt, or build with a larger --max-seq-len");
    }
  }

  // Runs new tokens [S]; logits after the last of them, if they are wanted.
  void feed(const std::vector<std::int64_t>& tokens, bool wanted) {
    const auto steps = static_cast<std::int64_t>(tokens.size());
    state.reserve(steps);
    std::int64_t position = state.length(), last = steps - 1, zero = 0;
    const std::int64_t count = wanted ? 1 : graph->least_logits();
    std::vector<std::int64_t> ids = tokens, after = history;
    std::vector<Tensor> inputs = {{"input_ids", INT64, {1, steps}, ids.data()},
                                  {"position", INT64, {1}, &position},
                                  {"logits_at", INT64, {1, count}, &last}};
    std::vector<Tensor> outputs = {{"logits", FLOAT32, {1, count, model.vocab}, logits.data()}};
    for (const std::string& name : model.zeros) inputs.push_back({name, INT64, {1}, &zero});
    if (lookups) lookups->rows(ids, after, inputs);
    state.held(inputs);
    state.room(outputs);
    graph->run(inputs, outputs);
    state.commit();
    history = after;
  }

  void feed_all(const std::vector<std::int64_t>& ids) {
    check(ids);
    const auto end = static_cast<std::int64_t>(ids.size()), chunk = graph->most_tokens();
    for (std::int64_t start = 0; start < end; start += chunk) {
      const std::int64_t stop = std::min(start + chunk, end);
      feed({ids.begin() + start, ids.begin() + stop}, stop == end);
    }
  }
};

Model::Model(const std::string& bundle, const Options& options) : parts_(std::make_unique<Parts>(bundle, options)) {}
Model::~Model() = default;
Model::Model(Model&&) noexcept = default;
Model& Model::operator=(Model&&) noexcept = default;

std::int64_t Model::vocab_size() const { return parts_->model.vocab; }
std::int64_t Model::max_seq_len() const { return parts_->model.limit; }
std::int64_t Model::length() const { return parts_->state.length(); }
std::size_t Model::state_bytes() const { return parts_->state.bytes(); }
const std::string& Model::runtime() const { return parts_->graph->runtime(); }
void Model::reset() { parts_->reset(); }

const std::vector<float>& Model::prefill(const std::vector<std::int64_t>& ids) {
  parts_->feed_all(ids);
  return parts_->logits;
}

const std::vector<float>& Model::step(std::int64_t id) { return prefill({id}); }

Generation Model::generate(const std::vector<std::int64_t>& ids, const Generating& how) {
  if (how.max_new_tokens < 1) {
    throw Error(Exit::INPUT, "max_new_tokens is too small", std::to_string(how.max_new_tokens),
                "it has to be 1 or more");
  }
  reset();
  Generation made;
  const auto begin = Clock::now();
  std::int64_t picked = likeliest(prefill(ids));
  const auto first = Clock::now();
  made.prefill_s = seconds(begin, first);
  // The last token is never fed, and takes no room.
  const std::int64_t most = std::min(how.max_new_tokens, max_seq_len() - length() + 1);
  const auto& stops = parts_->model.stops;
  while (true) {
    made.tokens.push_back(picked);
    if (how.on_token) how.on_token(picked);
    made.stopped = !how.ignore_eos && std::find(stops.begin(), stops.end(), picked) != stops.end();
    if (made.stopped || static_cast<std::int64_t>(made.tokens.size()) == most) break;
    parts_->feed({picked}, true);  // unchecked: what it may say itself need not be allowed in prompts
    picked = likeliest(parts_->logits);
  }
  made.decode_s = seconds(first, Clock::now());
  return made;
}

std::int64_t likeliest(const std::vector<float>& logits) {
  std::size_t best = 0, wrong = 0;
  for (std::size_t i = 0; i < logits.size(); ++i) {
    wrong += std::isnan(logits[i]) || logits[i] == std::numeric_limits<float>::infinity();
    if (logits[i] > logits[best]) best = i;
  }
  if (wrong || logits.empty() || std::isinf(logits[best])) {
    throw Error(Exit::NUMBERS, "the logits are not numbers to pick a token from",
                std::to_string(wrong) + " of " + std::to_string(logits.size()) + " are NaN or infinite",
                "find the layer with `v4export verify`; bfloat16 holds what float16 overflows");
  }
  return static_cast<std::int64_t>(best);
}

}  // namespace v4export
