// TensorRT and CUDA for the C++ runner's test: an engine of a toy model, over memory that only copies may touch.
//
// The toy keeps every token in a row, `latent` [1, T, 1], and in a ring of three, and likes the token best that is the
// sum of all tokens so far and of those in the ring before the step, modulo 32. It has two profiles, of one token and of
// up to four, and wants a logit of every step.

#include "NvInferRuntime.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <set>
#include <string>
#include <vector>

namespace {

constexpr int64_t VOCAB = 32, RING = 3, LIMIT = 40, CHUNK = 4;
std::set<const void*> on_device;
nvinfer1::ILogger* logger = nullptr;
int32_t profile = 0;
std::map<std::string, nvinfer1::Dims> shapes;
std::map<std::string, void*> places;

struct Io {
  const char* name;
  bool input;
  nvinfer1::DataType type;
  std::vector<int64_t> least, most[2];
};
const auto LONG = nvinfer1::DataType::kINT64, FLOAT = nvinfer1::DataType::kFLOAT;
// `decoder_start` is left out, as TensorRT leaves out what nothing depends on.
const std::vector<Io> ALL = {
    {"input_ids", true, LONG, {1, 1}, {{1, 1}, {1, CHUNK}}},
    {"position", true, LONG, {1}, {{1}, {1}}},
    {"logits_at", true, LONG, {1, 1}, {{1, 1}, {1, CHUNK}}},
    {"state.0.latent", true, FLOAT, {1, 1, 1}, {{1, LIMIT, 1}, {1, LIMIT, 1}}},
    {"state.0.window", true, FLOAT, {1, RING, 1}, {{1, RING, 1}, {1, RING, 1}}},
    {"logits", false, FLOAT, {}, {}},
    {"trunk", false, FLOAT, {}, {}},
    {"new_state.0.latent", false, FLOAT, {}, {}},
    {"new_state.0.window", false, FLOAT, {}, {}},
};

const Io& io(const char* name) {
  for (const Io& one : ALL) {
    if (!std::strcmp(one.name, name)) return one;
  }
  std::abort();  // the runner asks for what is not there
}

nvinfer1::Dims dims(const std::vector<int64_t>& sizes) {
  nvinfer1::Dims found{};
  found.nbDims = static_cast<int32_t>(sizes.size());
  for (std::size_t i = 0; i < sizes.size(); ++i) found.d[i] = sizes[i];
  return found;
}

bool refuse(const std::string& why) {
  logger->log(nvinfer1::ILogger::Severity::kERROR, why.c_str());
  return false;
}

template <typename T>
T* at(const char* name) {
  if (!on_device.count(places[name])) std::abort();
  return static_cast<T*>(places[name]);
}

}  // namespace

cudaError_t cudaMalloc(void** data, std::size_t bytes) {
  on_device.insert(*data = std::malloc(bytes));
  return cudaSuccess;
}
cudaError_t cudaFree(void* data) {
  if (data && !on_device.erase(data)) return cudaErrorInvalidValue;
  std::free(data);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind, cudaStream_t) {
  const bool down = kind == cudaMemcpyDeviceToHost;
  if (on_device.count(from) != down || on_device.count(to) == down) return cudaErrorInvalidValue;
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  *stream = nullptr;
  return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "invalid value"; }

namespace nvinfer1 {

IRuntime* createInferRuntime(ILogger& given) noexcept {
  logger = &given;
  return new IRuntime;
}
IPluginRegistry& IRuntime::getPluginRegistry() noexcept {
  static IPluginRegistry registry;
  return registry;
}
IPluginRegistry::PluginLibraryHandle IPluginRegistry::loadLibrary(AsciiChar const* path) noexcept {
  refuse("there is no such library");
  return std::strcmp(path, "there") ? nullptr : this;
}
ICudaEngine* IRuntime::deserializeCudaEngine(void const* blob, std::size_t size) noexcept {
  if (std::string(static_cast<const char*>(blob), size) == "toy") return new ICudaEngine;
  refuse("this is no engine");
  return nullptr;
}
IExecutionContext* ICudaEngine::createExecutionContext() noexcept { return new IExecutionContext; }
int32_t ICudaEngine::getNbIOTensors() const noexcept { return static_cast<int32_t>(ALL.size()); }
char const* ICudaEngine::getIOTensorName(int32_t i) const noexcept { return ALL[static_cast<std::size_t>(i)].name; }
TensorIOMode ICudaEngine::getTensorIOMode(char const* name) const noexcept {
  return io(name).input ? TensorIOMode::kINPUT : TensorIOMode::kOUTPUT;
}
DataType ICudaEngine::getTensorDataType(char const* name) const noexcept { return io(name).type; }
int32_t ICudaEngine::getNbOptimizationProfiles() const noexcept { return 2; }
Dims ICudaEngine::getProfileShape(char const* name, int32_t p, OptProfileSelector select) const noexcept {
  return dims(select == OptProfileSelector::kMIN ? io(name).least : io(name).most[p]);
}

bool IExecutionContext::setOptimizationProfileAsync(int32_t p, cudaStream_t) noexcept {
  std::fprintf(stderr, "profile %d\n", profile = p);
  shapes.clear();
  return true;
}
bool IExecutionContext::setInputShape(char const* name, Dims const& given) noexcept {
  const Io& one = io(name);
  for (int32_t i = 0; i < given.nbDims; ++i) {
    const auto n = static_cast<std::size_t>(i);
    if (given.d[i] < one.least[n] || given.d[i] > one.most[profile][n]) return refuse("a shape is out of the profile");
  }
  shapes[name] = given;
  return true;
}
Dims IExecutionContext::getTensorShape(char const* name) const noexcept {
  const int64_t steps = shapes.at("input_ids").d[1], wanted = shapes.at("logits_at").d[1];
  const std::string asked = name;
  if (asked == "logits") return dims({1, wanted, VOCAB});
  return dims({1, asked == "trunk" ? wanted : steps, 1});
}
bool IExecutionContext::setTensorAddress(char const* name, void* data) noexcept {
  places[name] = data;
  return true;
}
bool IExecutionContext::enqueueV3(cudaStream_t) noexcept {
  for (const Io& one : ALL) at<void>(one.name);
  const int64_t steps = shapes.at("input_ids").d[1], position = *at<int64_t>("position");
  std::vector<float> seen(at<float>("state.0.latent"), at<float>("state.0.latent") + position);
  for (int64_t s = 0; s < steps; ++s) seen.push_back(static_cast<float>(at<int64_t>("input_ids")[s]));
  for (int64_t s = 0; s < steps; ++s) {
    const float row = seen[static_cast<std::size_t>(position + s)];
    at<float>("new_state.0.latent")[s] = at<float>("new_state.0.window")[s] = row;
  }
  const int64_t last = position + *at<int64_t>("logits_at");
  float sum = 0;
  for (int64_t n = 0; n <= last; ++n) sum += seen[static_cast<std::size_t>(n)];
  for (int64_t n = std::max<int64_t>(0, position - RING); n < position; ++n) {
    sum += at<float>("state.0.window")[n % RING];
  }
  std::memset(at<float>("logits"), 0, VOCAB * sizeof(float));
  at<float>("logits")[static_cast<int64_t>(sum) % VOCAB] = 1;
  return true;
}

}  // namespace nvinfer1

int32_t getInferLibVersion() noexcept { return 110000; }
