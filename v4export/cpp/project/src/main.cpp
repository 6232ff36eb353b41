// v4export_run BUNDLE --ids 1,2,3: token ids in, token ids out.

#include <sys/resource.h>

#include <chrono>
#include <cstdio>
#include <functional>
#include <iostream>
#include <map>
#include <sstream>

#include "v4export/model.hpp"

namespace {

using v4export::Error;
using v4export::Exit;

constexpr const char* USAGE =
    "usage: v4export_run BUNDLE --ids 1,2,3|- [-n 128] [--threads 0] [--ignore-eos] [--stats]\n"
    "                    [--library LIBONNXRUNTIME] [--model FOLDER]\n"
    "                    [--tensorrt] [--plugins LIBV4_PLUGINS]\n";

struct Arguments {
  std::string bundle;
  std::vector<std::int64_t> ids;
  v4export::Options options;
  v4export::Generating how;
  bool stats = false, help = false;
};

Error misused(const std::string& values) {
  return Error(Exit::INPUT, "the command line is not understood", values, USAGE);
}

std::int64_t number(const std::string& text, std::int64_t least, std::int64_t most) {
  std::istringstream words(text);
  std::int64_t found;
  const bool whole = words >> found && (words >> std::ws).eof();
  if (!whole || found < least || found > most) throw misused(text + " is not a number for it");
  return found;
}

// Ids between commas, of which the system takes some 128 KiB on a command line.
std::vector<std::int64_t> listed(std::istream& words) {
  std::vector<std::int64_t> ids;
  for (std::string word; std::getline(words, word, ',');) ids.push_back(number(word, 0, INT64_MAX));
  return ids;
}

Arguments read(int count, char** given) {
  Arguments a;
  const std::map<std::string, std::function<void(const std::string&)>> values = {
      {"--ids",
       [&](const std::string& v) {
         std::istringstream words(v);
         a.ids = listed(v == "-" ? std::cin : words);
       }},
      {"-n", [&](const std::string& v) { a.how.max_new_tokens = number(v, 1, INT64_MAX); }},
      {"--threads", [&](const std::string& v) { a.options.threads = static_cast<int>(number(v, 0, 4096)); }},
      {"--library", [&](const std::string& v) { a.options.library = v; }},
      {"--plugins", [&](const std::string& v) { a.options.plugins = v; }},
      {"--model", [&](const std::string& v) { a.options.description = v; }},
  };
  const std::map<std::string, bool*> flags = {
      {"--ignore-eos", &a.how.ignore_eos}, {"--tensorrt", &a.options.tensorrt}, {"--stats", &a.stats},
      {"--help", &a.help},                 {"-h", &a.help}};
  for (int i = 1; i < count; ++i) {
    const std::string word = given[i];
    if (const auto flag = flags.find(word); flag != flags.end()) {
      *flag->second = true;
    } else if (const auto value = values.find(word); value != values.end()) {
      if (++i == count) throw misused(word + " needs a value");
      value->second(given[i]);
    } else if (word.rfind("-", 0) == 0 || !a.bundle.empty()) {
      throw misused(word);
    } else {
      a.bundle = word;
    }
  }
  if (!a.help && (a.bundle.empty() || a.ids.empty())) throw misused("a bundle and --ids are needed");
  return a;
}

// Peak resident memory in MiB; the system counts KiB, Apple's bytes.
double peak_mib() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
#ifdef __APPLE__
  return static_cast<double>(usage.ru_maxrss) / (1 << 20);
#else
  return static_cast<double>(usage.ru_maxrss) / (1 << 10);
#endif
}

void run(const Arguments& a) {
  const auto begin = std::chrono::steady_clock::now();
  v4export::Model model(a.bundle, a.options);
  const std::chrono::duration<double> opened = std::chrono::steady_clock::now() - begin;
  const auto made = model.generate(a.ids, a.how);
  for (std::size_t i = 0; i < made.tokens.size(); ++i) std::cout << (i ? "," : "") << made.tokens[i];
  std::cout << std::endl;
  if (!a.stats) return;
  const double decoded = static_cast<double>(made.tokens.size() - 1);
  std::fprintf(stderr, "%s; opened in %.3f s; %zu prompt tokens in %.3f s, %zu new ones in %.3f s (%.1f/s)\n",
               model.runtime().c_str(), opened.count(), a.ids.size(), made.prefill_s, made.tokens.size(), made.decode_s,
               made.decode_s > 0 ? decoded / made.decode_s : 0.0);
  std::fprintf(stderr, "%s; state %.2f MiB; peak memory %.0f MiB\n", made.stopped ? "stop" : "length",
               static_cast<double>(model.state_bytes()) / (1 << 20), peak_mib());
}

int failed(const std::exception& error, Exit code) {
  std::cerr << "error: " << error.what() << std::endl;
  return static_cast<int>(code);
}

}  // namespace

int main(int count, char** given) {
  try {
    const Arguments arguments = read(count, given);
    if (arguments.help) {
      std::cout << USAGE;
    } else {
      run(arguments);
    }
    return 0;
  } catch (const Error& error) {
    return failed(error, error.code());
  } catch (const std::bad_alloc& error) {
    return failed(error, Exit::RESOURCES);
  } catch (const std::exception& error) {
    return failed(error, Exit::INPUT);
  }
}
