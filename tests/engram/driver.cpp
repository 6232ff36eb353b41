// Reads a memory, tables and steps as numbers from standard input; writes rows, histories and gathered rows as bytes.
#include <cstdio>
#include <iostream>

#include "engram.hpp"

using namespace v4export::engram;

template <typename T>
T number() {
  T value{};
  if (!(std::cin >> value)) throw std::runtime_error("the input ends too early");
  return value;
}

template <typename T>
std::vector<T> numbers() {
  std::vector<T> values(number<std::size_t>());
  for (T& value : values) value = number<T>();
  return values;
}

template <typename T>
void put(const std::vector<T>& values) {
  if (!values.empty()) std::fwrite(values.data(), sizeof(T), values.size(), stdout);
}

Stored stored() {
  Stored s;
  s.file = number<std::string>();
  s.offset = number<std::int64_t>();
  s.rows = number<std::int64_t>();
  s.width = number<std::int64_t>();
  s.type = static_cast<Type>(number<int>());
  return s;
}

// A bool of its own for each flag: std::vector<bool> has no data().
std::unique_ptr<bool[]> flags() {
  const auto values = numbers<int>();
  auto out = std::make_unique<bool[]>(values.size() + 1);
  for (std::size_t i = 0; i < values.size(); ++i) out[i] = values[i] != 0;
  return values.empty() ? nullptr : std::move(out);
}

void run() {
  Layout layout;
  layout.heads = number<std::size_t>();
  layout.pad = number<std::int64_t>();
  layout.compressed_vocab = number<std::int64_t>();
  layout.token_map = numbers<std::int32_t>();
  layout.layers.resize(number<std::size_t>());
  std::vector<std::unique_ptr<Table>> tables;
  for (auto& layer : layout.layers) {
    layer.multipliers = numbers<std::int64_t>();
    layer.primes = numbers<std::int64_t>();
    const Stored data = stored();
    const bool scaled = number<int>() != 0;
    tables.push_back(std::make_unique<Table>(data, scaled ? std::optional<Stored>(stored()) : std::nullopt));
  }
  const Hasher hasher(layout);
  const auto batch = number<std::size_t>(), chunks = number<std::size_t>();
  auto history = hasher.empty_history(batch);
  for (std::size_t chunk = 0; chunk < chunks; ++chunk) {
    const auto steps = number<std::size_t>();
    const auto tokens = numbers<std::int64_t>();
    const auto lengths = numbers<std::int64_t>();
    const auto masked = flags(), starts = flags();
    std::vector<std::vector<std::int64_t>> rows(tables.size());
    std::vector<std::int64_t*> places;
    for (auto& layer : rows) places.push_back((layer.resize(batch * steps * hasher.hashes()), layer.data()));
    hasher.rows(tokens.data(), batch, steps, history.data(), places, lengths.empty() ? nullptr : lengths.data(),
                masked.get(), starts.get());
    put(history);
    for (std::size_t i = 0; i < tables.size(); ++i) {
      const auto size = rows[i].size() * static_cast<std::size_t>(tables[i]->width());
      std::vector<float> floats(size);
      std::vector<std::uint16_t> halves(size);
      tables[i]->gather(rows[i].data(), rows[i].size(), floats.data());
      tables[i]->gather(rows[i].data(), rows[i].size(), halves.data());
      put(rows[i]);
      put(floats);
      put(halves);
    }
  }
}

int main() {
  try {
    run();
  } catch (const Error& error) {
    std::cerr << error.what();
    return 2;
  }
  return 0;
}
