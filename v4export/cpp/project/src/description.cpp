#include "description.hpp"

#include <filesystem>
#include <fstream>
#include <functional>
#include <sstream>

#include "v4export/error.hpp"

namespace v4export {
namespace {

namespace fs = std::filesystem;

// What does not fit, of the line being read.
struct Misfit {
  std::string what;
};

void demand(bool fits, const std::string& otherwise) {
  if (!fits) throw Misfit{otherwise};
}

std::string word(std::istream& line) {
  std::string found;
  demand(static_cast<bool>(line >> found), "a word is missing");
  return found;
}

std::int64_t number(std::istream& line, std::int64_t least) {
  std::int64_t found;
  demand(static_cast<bool>(line >> found), "a number is missing, or has more than 63 bits");
  demand(found >= least, std::to_string(found) + " is less than " + std::to_string(least));
  return found;
}

// Names of files, and reasons, may have spaces.
std::string rest(std::istream& line) {
  std::string found;
  std::getline(line >> std::ws, found);
  demand(!found.empty(), "a name is missing");
  return found;
}

Type type(std::istream& line) {
  const std::string name = word(line);
  for (const Type& one : TYPES) {
    if (name == one.name) return one;
  }
  throw Misfit{"there is no type " + name};
}

engram::Stored stored(std::istream& line) {
  static const std::map<std::string, engram::Type> types = {{"F8_E4M3", engram::Type::E4M3},
                                                            {"F8_E8M0", engram::Type::E8M0},
                                                            {"BF16", engram::Type::BF16},
                                                            {"F16", engram::Type::F16},
                                                            {"F32", engram::Type::F32}};
  const auto found = types.find(word(line));
  demand(found != types.end(), "tables do not have this type");
  engram::Stored place;
  place.type = found->second;
  place.offset = number(line, 0);
  place.rows = number(line, 1);
  place.width = number(line, 1);
  place.file = rest(line);
  return place;
}

Lookup& last_layer(Description& d) {
  demand(d.engram && !d.engram->layers.empty(), "there are no hashes before it");
  return d.engram->layers.back();
}

void read_hashes(Description& d, std::istream& line) {
  demand(d.engram.has_value(), "there is no engram before it");
  Lookup layer;
  layer.input = word(line);
  const std::int64_t order = number(line, 2);
  for (std::int64_t i = 0; i < order; ++i) layer.hashes.multipliers.push_back(number(line, 1));
  for (std::int64_t i = 0; i < (order - 1) * d.engram->heads; ++i) layer.hashes.primes.push_back(number(line, 2));
  d.engram->layers.push_back(layer);
}

void read_engram(Description& d, std::istream& line) {
  Engram e;
  e.heads = number(line, 1);
  e.pad = number(line, 0);
  e.compressed = number(line, 1);
  e.tokens = number(line, 1);
  e.map = rest(line);
  d.engram = e;
}

void read_state(Description& d, std::istream& line) {
  StateTensor t;
  t.type = type(line);
  t.width = number(line, 1);
  t.every = number(line, 1);
  t.ring = number(line, 0);
  t.reads_oldest = number(line, 0) != 0;
  t.reads = word(line);
  t.writes = word(line);
  d.state.push_back(t);
}

using Reader = std::function<void(Description&, std::istream&)>;

const std::map<std::string, Reader>& readers() {
  static const std::map<std::string, Reader> table = {
      {"graph",
       [](Description& d, std::istream& line) {
         const std::string home = word(line);
         demand(home == "here" || home == "bundle", "graphs are here or in the bundle");
         d.graph_here = home == "here";
         d.graph = rest(line);
       }},
      {"engine",
       [](Description& d, std::istream& line) {
         d.engine_bytes = number(line, 1);
         d.engine = rest(line);
       }},
      {"file",
       [](Description& d, std::istream& line) {
         const std::int64_t bytes = number(line, 0);
         d.files[rest(line)] = bytes;
       }},
      {"vocab", [](Description& d, std::istream& line) { d.vocab = number(line, 1); }},
      {"limit", [](Description& d, std::istream& line) { d.limit = number(line, 1); }},
      {"activations", [](Description& d, std::istream& line) { d.activations = type(line); }},
      {"stop", [](Description& d, std::istream& line) { d.stops.push_back(number(line, 0)); }},
      {"refuse",
       [](Description& d, std::istream& line) {
         const std::int64_t id = number(line, 0);
         d.refused[id] = rest(line);
       }},
      {"zeros", [](Description& d, std::istream& line) { d.zeros.push_back(word(line)); }},
      {"state", read_state},
      {"engram", read_engram},
      {"hashes", read_hashes},
      {"table", [](Description& d, std::istream& line) { last_layer(d).table = stored(line); }},
      {"scale", [](Description& d, std::istream& line) { last_layer(d).scale = stored(line); }},
  };
  return table;
}

fs::path there(const std::string& path) {
  std::error_code failed;
  const fs::path found = fs::canonical(path, failed);
  if (failed) throw Error(Exit::INPUT, "there is no folder", path + ": " + failed.message(), "give the path of one");
  return found;
}

// A name in a folder as a path that is there and inside.
std::string inside(const fs::path& home, const std::string& name) {
  std::error_code failed;
  const fs::path file = fs::canonical(home / name, failed);
  const std::string fix = "package the bundle that is to be run, and give its folder";
  if (failed) throw Error(Exit::INPUT, "a file is missing", name + ": " + failed.message(), fix);
  const fs::path relative = file.lexically_relative(home);
  if (fs::path(name).is_absolute() || relative.empty() || *relative.begin() == "..") {
    throw Error(Exit::INPUT, "a path leads out of its folder", name + " is " + file.string(), fix);
  }
  return file.string();
}

}  // namespace

Description Description::parse(std::istream& text) {
  Description found;
  std::string line;
  for (int count = 1; std::getline(text, line); ++count) {
    try {
      std::istringstream words(line);
      const std::string key = word(words);
      if (count == 1) {
        demand(key == "format" && number(words, 0) == 1, "this reads format 1");
      } else {
        const auto reader = readers().find(key);
        demand(reader != readers().end(), "nobody knows this word");
        reader->second(found, words);
      }
      demand((words >> std::ws).eof(), "there is more than is expected");
    } catch (const Misfit& misfit) {
      throw Error(Exit::INPUT, "model.txt is not understood",
                  "line " + std::to_string(count) + ", " + line.substr(0, 60) + ": " + misfit.what,
                  "package the bundle again with the v4export that this runner is from");
    }
  }
  if (!found.vocab || !found.limit || found.graph.empty()) {
    throw Error(Exit::INPUT, "model.txt is not whole", "vocab, limit or graph is missing", "package the bundle again");
  }
  return found;
}

Description Description::load(const std::string& here, const std::string& bundle, bool tensorrt) {
  const fs::path own = there(here), home = there(bundle);
  std::ifstream text(inside(own, "model.txt"));
  Description found = parse(text);
  if (tensorrt) {
    if (found.engine.empty()) {
      throw Error(Exit::INPUT, "the bundle has no engine", bundle, "build one with v4export engine, and package again");
    }
    found.files = {{found.engine, found.engine_bytes}};
    found.graph = found.engine;
    found.graph_here = false;
  }
  for (const auto& [name, bytes] : found.files) {
    const auto size = static_cast<std::int64_t>(fs::file_size(inside(home, name)));
    if (size != bytes) {
      throw Error(Exit::INPUT, bundle + " is not the bundle that was packaged",
                  name + " has " + std::to_string(size) + " bytes, expected " + std::to_string(bytes),
                  "package this bundle, and give the folder of its model.txt");
    }
  }
  found.folder = home.string();
  found.graph = inside(found.graph_here ? own : home, found.graph);
  if (!found.engram) return found;
  found.engram->map = inside(home, found.engram->map);
  for (Lookup& layer : found.engram->layers) {
    for (auto* part : {&layer.table, &layer.scale}) {
      if (*part) (*part)->file = inside(home, (*part)->file);
    }
  }
  return found;
}

}  // namespace v4export
