#include "lookup.hpp"

#include <algorithm>
#include <fstream>

#include "v4export/error.hpp"

namespace v4export {
namespace {

// Compressed ids of all tokens, four bytes each, the lowest first.
std::vector<std::int32_t> token_map(const Engram& engram) {
  const auto tokens = static_cast<std::size_t>(engram.tokens);
  std::ifstream file(engram.map, std::ios::binary);
  std::vector<std::uint8_t> bytes((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  if (bytes.size() != 4 * tokens) {
    throw Error(Exit::INPUT, "the token map of Engram is not whole",
                engram.map + ": " + std::to_string(bytes.size()) + " bytes", "build the bundle again");
  }
  std::vector<std::int32_t> ids(tokens);
  for (std::size_t i = 0; i < tokens; ++i) {
    std::uint32_t id = 0;
    for (std::size_t b = 0; b < 4; ++b) id |= std::uint32_t(bytes[4 * i + b]) << 8 * b;
    ids[i] = static_cast<std::int32_t>(id);
  }
  return ids;
}

}  // namespace

Lookups::Lookups(const Engram& engram, Type activations) : activations_(activations) {
  engram::Layout layout;
  layout.heads = static_cast<std::size_t>(engram.heads);
  layout.pad = engram.pad;
  layout.compressed_vocab = engram.compressed;
  layout.token_map = token_map(engram);
  for (const Lookup& lookup : engram.layers) layout.layers.push_back(lookup.hashes);
  hasher_ = std::make_unique<engram::Hasher>(std::move(layout));
  for (const Lookup& lookup : engram.layers) {
    auto table = lookup.table ? std::make_unique<engram::Table>(*lookup.table, lookup.scale) : nullptr;
    layers_.push_back({&lookup, std::move(table), {}, {}});
  }
}

void Lookups::rows(const std::vector<std::int64_t>& tokens, std::vector<std::int64_t>& history,
                   std::vector<Tensor>& inputs) {
  const std::size_t hashes = hasher_->hashes(), count = tokens.size() * hashes;
  std::vector<std::int64_t*> numbers;
  for (Layer& layer : layers_) {
    layer.numbers.resize(count);
    numbers.push_back(layer.numbers.data());
  }
  hasher_->rows(tokens.data(), 1, tokens.size(), history.data(), numbers);
  const auto steps = static_cast<std::int64_t>(tokens.size()), each = static_cast<std::int64_t>(hashes);
  for (Layer& layer : layers_) {
    const std::string& name = layer.lookup->input;
    if (!layer.table) {
      inputs.push_back({name, INT64, {1, steps, each}, layer.numbers.data()});
      continue;
    }
    const std::int64_t width = layer.table->width();
    layer.found.resize(count * static_cast<std::size_t>(width) * activations_.bytes);
    if (activations_.onnx == FLOAT32.onnx) {
      layer.table->gather(layer.numbers.data(), count, reinterpret_cast<float*>(layer.found.data()));
    } else {
      layer.table->gather(layer.numbers.data(), count, reinterpret_cast<std::uint16_t*>(layer.found.data()));
    }
    inputs.push_back({name, activations_, {1, steps, each * width}, layer.found.data()});
  }
}

}  // namespace v4export
