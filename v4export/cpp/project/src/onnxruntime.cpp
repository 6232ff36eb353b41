#include "onnxruntime.hpp"

#include <dlfcn.h>
#include <onnxruntime_c_api.h>

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <iterator>
#include <optional>
#include <utility>

#include "v4export/error.hpp"

namespace v4export {
namespace {

constexpr const char* VARIABLE = "V4EXPORT_ONNXRUNTIME";
// Headers from this one on know FP8 tensors, and libraries from that one on what is in the graphs. Later versions of
// the API add functions behind those of earlier ones.
constexpr int OLDEST_HEADERS = 16, OLDEST_LIBRARY = 23;
static_assert(ORT_API_VERSION >= OLDEST_HEADERS, "onnxruntime's headers are older than 1.16");

struct Library {
  const OrtApi* api;
  std::string name;
};

std::vector<std::string> names(const std::string& given) {
  if (!given.empty()) return {given};
  if (const char* set = std::getenv(VARIABLE); set && *set) return {set};
  return {"libonnxruntime.so", "libonnxruntime.so.1", "libonnxruntime.dylib"};
}

// The functions, in the latest version that both the headers and the library know. The library is never unloaded: its
// threads may outlive what uses it.
Library load(const std::string& given) {
  std::string reasons;
  void* handle = nullptr;
  for (const std::string& name : names(given)) {
    handle = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (handle) break;
    reasons += (reasons.empty() ? "" : "; ") + std::string(dlerror());
  }
  const std::string fix = std::string("give the path of libonnxruntime, or set ") + VARIABLE;
  if (!handle) throw Error(Exit::UNSUPPORTED, "onnxruntime cannot be loaded", reasons, fix);
  using Base = const OrtApiBase*(ORT_API_CALL*)();
  const auto base = reinterpret_cast<Base>(dlsym(handle, "OrtGetApiBase"));
  if (!base) throw Error(Exit::UNSUPPORTED, "a library is not onnxruntime", "it has no OrtGetApiBase", fix);
  // 1.23.0 knows versions up to 23; asked for a later one, it would complain on stderr.
  const std::string version = base()->GetVersionString();
  const int minor = version.rfind("1.", 0) == 0 ? std::atoi(version.c_str() + 2) : 0;
  const int wanted = std::min(minor, int{ORT_API_VERSION});
  const OrtApi* api = minor < OLDEST_LIBRARY ? nullptr : base()->GetApi(static_cast<std::uint32_t>(wanted));
  if (!api) {
    throw Error(Exit::UNSUPPORTED, "this version of onnxruntime does not do",
                version + ", expected 1." + std::to_string(OLDEST_LIBRARY) + " or a later 1.x", fix);
  }
  return {api, "onnxruntime " + version};
}

std::string read(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::string bytes((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  if (!file || bytes.empty()) throw Error(Exit::INPUT, "a graph cannot be read", path, "package the bundle again");
  return bytes;
}

// onnxruntime's objects are released by functions of its table.
template <typename T>
using Owned = std::unique_ptr<T, std::function<void(T*)>>;

// As long as it lives, sessions are made whose experts take activations as they are, which onnxruntime can be told by
// the environment alone.
class ExactExperts {
 public:
  ExactExperts() {
    if (const char* set = std::getenv(NAME)) before_ = set;
    setenv(NAME, "fp32", 1);
  }
  ~ExactExperts() { before_ ? setenv(NAME, before_->c_str(), 1) : unsetenv(NAME); }
  ExactExperts(const ExactExperts&) = delete;
  ExactExperts& operator=(const ExactExperts&) = delete;

 private:
  static constexpr const char* NAME = "ORT_QMOE_CPU_QNBIT_GEMM";
  std::optional<std::string> before_;
};

class OnnxRuntime : public Graph {
 public:
  OnnxRuntime(const std::string& graph, const std::string& folder, const std::string& library, int threads)
      : library_(load(library)) {
    const OrtApi& api = *library_.api;
    env_ = made<OrtEnv>(api.ReleaseEnv, [&](OrtEnv** out) {
      return api.CreateEnv(ORT_LOGGING_LEVEL_ERROR, "v4export", out);
    });
    const auto options = made<OrtSessionOptions>(
        api.ReleaseSessionOptions, [&](OrtSessionOptions** out) { return api.CreateSessionOptions(out); });
    check(api.SetSessionLogSeverityLevel(options.get(), ORT_LOGGING_LEVEL_ERROR));
    check(api.SetIntraOpNumThreads(options.get(), threads));
    // Otherwise dequantise-and-multiply becomes products with activations of eight bits.
    check(api.AddSessionConfigEntry(options.get(), "session.qdq_matmulnbits_accuracy_level", "0"));
    const ExactExperts exact;
    // A graph from memory has its weights in a folder that is named, and need not lie there itself.
    check(api.AddSessionConfigEntry(options.get(), "session.model_external_initializers_file_folder_path",
                                    folder.c_str()));
    const std::string bytes = read(graph);
    session_ = made<OrtSession>(api.ReleaseSession, [&](OrtSession** out) {
      return api.CreateSessionFromArray(env_.get(), bytes.data(), bytes.size(), options.get(), out);
    });
    memory_ = made<OrtMemoryInfo>(api.ReleaseMemoryInfo, [&](OrtMemoryInfo** out) {
      return api.CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, out);
    });
  }

  void run(const std::vector<Tensor>& inputs, const std::vector<Tensor>& outputs) override {
    const Bound in(*this, inputs), out(*this, outputs);
    std::vector<OrtValue*> written = out.values;
    check(library_.api->Run(session_.get(), nullptr, in.names.data(), in.values.data(), in.names.size(),
                            out.names.data(), out.names.size(), written.data()));
  }

  const std::string& runtime() const override { return library_.name; }

 private:
  // Tensors as onnxruntime takes them, as long as this lives.
  struct Bound {
    std::vector<const char*> names;
    std::vector<OrtValue*> values;
    std::vector<Owned<OrtValue>> owned;

    Bound(const OnnxRuntime& graph, const std::vector<Tensor>& tensors) {
      const OrtApi& api = *graph.library_.api;
      for (const Tensor& t : tensors) {
        owned.push_back(graph.made<OrtValue>(api.ReleaseValue, [&](OrtValue** value) {
          return api.CreateTensorWithDataAsOrtValue(graph.memory_.get(), t.data, t.bytes(), t.shape.data(),
                                                    t.shape.size(),
                                                    static_cast<ONNXTensorElementDataType>(t.type.onnx), value);
        }));
        names.push_back(t.name.c_str());
        values.push_back(owned.back().get());
      }
    }
  };

  template <typename T, typename Make>
  Owned<T> made(void(ORT_API_CALL* release)(T*), Make make) const {
    T* found = nullptr;
    check(make(&found));
    return Owned<T>(found, release);
  }

  void check(OrtStatus* status) const {
    if (!status) return;
    const Owned<OrtStatus> owned(status, library_.api->ReleaseStatus);
    const std::string text = library_.api->GetErrorMessage(status);
    const bool memory = text.find("alloc") != std::string::npos;
    throw Error(memory ? Exit::RESOURCES : Exit::UNSUPPORTED,
                memory ? "not enough memory to run the graph" : library_.name + " cannot run the graph",
                text.substr(0, text.find('\n')), memory ? "use a machine with more" : "take a later onnxruntime");
  }

  Library library_;
  Owned<OrtEnv> env_;
  Owned<OrtSession> session_;
  Owned<OrtMemoryInfo> memory_;
};

}  // namespace

std::unique_ptr<Graph> open_onnxruntime(const std::string& graph, const std::string& folder,
                                        const std::string& library, int threads) {
  return std::make_unique<OnnxRuntime>(graph, folder, library, threads);
}

}  // namespace v4export
