// What is known of a model before it runs: model.txt, which `v4export package` writes, a line a fact.
//
//   format 1                                          the first line
//   graph HOME FILE                                   what onnxruntime runs: bundle, or here, which is beside model.txt
//   engine BYTES FILE                                 what TensorRT runs, in the bundle, and its size
//   file BYTES FILE                                   a file of the bundle that is read, and its size
//   vocab V / limit TOKENS                            sizes of the vocabulary and of the longest sequence
//   activations TYPE                                  of looked-up rows
//   stop ID                                           an id that ends a text
//   refuse ID WHY                                     an id that a prompt may not have
//   zeros NAME                                        an int64 [1] input that is 0 here
//   state TYPE WIDTH EVERY RING OLDEST READ WRITTEN   a state tensor; see StateTensor
//   engram HEADS PAD IDS TOKENS FILE                  look-ups: pad's compressed id, how many ids, the map's length
//   hashes INPUT N MULTIPLIERS.. PRIMES..             of one layer, N multipliers and (N-1) * HEADS primes
//   table TYPE OFFSET ROWS WIDTH FILE                 of the layer of the line before; without one, it is inside
//   scale TYPE OFFSET ROWS WIDTH FILE                 multipliers of that table
#pragma once

#include <istream>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "engram.hpp"
#include "tensor.hpp"

namespace v4export {

// A list of rows of a layer's state, [1, rows, width]. A row stands for `every` tokens and is complete once the last of
// them has come. Row n is at index n, or at n modulo `ring` where only the last are kept.
struct StateTensor {
  Type type;
  std::int64_t width;
  std::int64_t every;
  std::int64_t ring;   // 0 keeps all
  bool reads_oldest;   // a step reads the row whose place its own first row takes
  std::string reads;   // names of the graph's input and output
  std::string writes;

  std::size_t row_bytes() const { return static_cast<std::size_t>(width) * type.bytes; }
  std::int64_t complete(std::int64_t tokens) const { return tokens / every; }
  std::int64_t returned(std::int64_t steps) const { return (steps + every - 1) / every; }
};

struct Lookup {
  std::string input;
  engram::LayerHash hashes;
  std::optional<engram::Stored> table, scale;
};

struct Engram {
  std::int64_t heads, pad, compressed, tokens;
  std::string map;
  std::vector<Lookup> layers;
};

struct Description {
  std::string folder;  // of the bundle
  std::string graph;
  bool graph_here = false;
  std::string engine;  // empty if there is none
  std::int64_t engine_bytes = 0;
  std::map<std::string, std::int64_t> files;
  std::int64_t vocab = 0, limit = 0;
  Type activations = FLOAT32;
  std::vector<std::int64_t> stops;
  std::map<std::int64_t, std::string> refused;
  std::vector<std::string> zeros;
  std::vector<StateTensor> state;
  std::optional<Engram> engram;

  // Throws Error: a line is not understood, or numbers cannot be.
  static Description parse(std::istream& text);

  // Reads model.txt of a folder, looks for the files of the bundle, and makes their names paths.
  // Throws Error: a file is missing, is not as long as it was when the model was packaged, or leads out of its folder,
  // itself or by links.
  //   tensorrt: let `graph` be the engine, and look for no other files than that and Engram's.
  static Description load(const std::string& here, const std::string& bundle, bool tensorrt);
};

}  // namespace v4export
