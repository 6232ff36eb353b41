#include "tensorrt.hpp"

#include <NvInferRuntime.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <fstream>
#include <iterator>
#include <map>
#include <utility>

#include "v4export/error.hpp"

namespace v4export {
namespace {

namespace trt = nvinfer1;

Error failed(const std::string& what, const std::string& values) {
  return Error(Exit::UNSUPPORTED, what, values, "build the engine again for this GPU, with this TensorRT");
}

void check(cudaError_t status) {
  if (status != cudaSuccess) throw failed("CUDA refuses", cudaGetErrorString(status));
}

// Keeps TensorRT's last error, which its functions do not return.
class Log : public trt::ILogger {
 public:
  void log(Severity severity, char const* message) noexcept override {
    if (severity <= Severity::kERROR) last = message;
  }
  std::string last;
};

// Memory of the device, which grows as it has to.
class Device {
 public:
  Device() = default;
  Device(Device&& other) noexcept : data_(std::exchange(other.data_, nullptr)), bytes_(other.bytes_) {}
  Device& operator=(Device&&) = delete;
  ~Device() { cudaFree(data_); }

  // What it held is lost when it grows.
  void* reserve(std::size_t bytes) {
    if (bytes > bytes_ || !data_) {
      check(cudaFree(std::exchange(data_, nullptr)));
      check(cudaMalloc(&data_, std::max<std::size_t>(bytes, 1)));
      bytes_ = bytes;
    }
    return data_;
  }

 private:
  void* data_ = nullptr;
  std::size_t bytes_ = 0;
};

struct Stream {
  Stream() { check(cudaStreamCreate(&handle)); }
  ~Stream() { cudaStreamDestroy(handle); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  cudaStream_t handle = nullptr;
};

trt::Dims dims(const std::vector<std::int64_t>& shape) {
  trt::Dims found{};
  found.nbDims = static_cast<std::int32_t>(shape.size());
  std::copy(shape.begin(), shape.end(), found.d);
  return found;
}

const Type& type_of(trt::DataType type) {
  static const std::map<trt::DataType, const Type*> types = {{trt::DataType::kFLOAT, &TYPES[0]},
                                                             {trt::DataType::kINT64, &TYPES[1]},
                                                             {trt::DataType::kHALF, &TYPES[2]},
                                                             {trt::DataType::kBF16, &TYPES[3]},
                                                             {trt::DataType::kFP8, &TYPES[4]}};
  const auto found = types.find(type);
  if (found == types.end()) throw failed("the engine has a tensor of another type", std::to_string(int(type)));
  return *found->second;
}

class TensorRt : public Graph {
 public:
  TensorRt(const std::string& path, const std::string& plugins) : runtime_(trt::createInferRuntime(log_)) {
    if (!runtime_) throw failed("TensorRT cannot be started", log_.last);
    if (!plugins.empty() && !runtime_->getPluginRegistry().loadLibrary(plugins.c_str())) {
      throw failed("plugins cannot be loaded", plugins + ": " + log_.last);
    }
    std::ifstream file(path, std::ios::binary);
    const std::string bytes((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
    engine_.reset(runtime_->deserializeCudaEngine(bytes.data(), bytes.size()));
    if (!engine_) throw failed("the engine cannot be loaded", path + ": " + log_.last);
    context_.reset(engine_->createExecutionContext());
    if (!context_) throw failed("the engine cannot be run", path + ": " + log_.last);
    for (std::int32_t i = 0; i < engine_->getNbIOTensors(); ++i) {
      const std::string name = engine_->getIOTensorName(i);
      const bool input = engine_->getTensorIOMode(name.c_str()) == trt::TensorIOMode::kINPUT;
      (input ? reads_ : writes_).emplace(name, type_of(engine_->getTensorDataType(name.c_str())));
    }
  }

  void run(const std::vector<Tensor>& inputs, const std::vector<Tensor>& outputs) override {
    choose_profile(inputs);
    for (const Tensor& t : inputs) {
      if (!reads_.count(t.name)) continue;  // TensorRT leaves inputs out that nothing depends on
      demand(context_->setInputShape(t.name.c_str(), dims(t.shape)), t.name);
      check(cudaMemcpyAsync(place(t.name, t.bytes()), t.data, t.bytes(), cudaMemcpyHostToDevice, stream_.handle));
    }
    for (const auto& [name, type] : writes_) {
      const trt::Dims shape = context_->getTensorShape(name.c_str());
      std::size_t bytes = type.bytes;
      for (std::int32_t i = 0; i < shape.nbDims; ++i) bytes *= static_cast<std::size_t>(shape.d[i]);
      place(name, bytes);
      const auto same = [&](const Tensor& t) { return t.name == name && t.type.onnx == type.onnx; };
      const auto wanted = std::find_if(outputs.begin(), outputs.end(), same);
      if (wanted != outputs.end() && wanted->bytes() != bytes) throw failed("an output has another size", name);
    }
    demand(context_->enqueueV3(stream_.handle), "a step");
    for (const Tensor& t : outputs) {
      const auto found = writes_.find(t.name);
      if (found == writes_.end() || found->second.onnx != t.type.onnx) throw failed("the engine has no output", t.name);
      void* data = buffers_.at(t.name).reserve(0);
      check(cudaMemcpyAsync(t.data, data, t.bytes(), cudaMemcpyDeviceToHost, stream_.handle));
    }
    check(cudaStreamSynchronize(stream_.handle));
  }

  const std::string& runtime() const override { return name_; }

  std::int64_t most_tokens() const override {
    std::int64_t most = 1;
    for (std::int32_t p = 0; p < engine_->getNbOptimizationProfiles(); ++p) {
      most = std::max<std::int64_t>(most, engine_->getProfileShape("input_ids", p, trt::OptProfileSelector::kMAX).d[1]);
    }
    return most;
  }

  std::int64_t least_logits() const override { return 1; }  // what all profiles are made for

 private:
  void demand(bool true_, const std::string& of) const {
    if (!true_) throw failed("TensorRT refuses", of + ": " + log_.last);
  }

  void* place(const std::string& name, std::size_t bytes) {
    void* data = buffers_[name].reserve(bytes);
    demand(context_->setTensorAddress(name.c_str(), data), name);
    return data;
  }

  // The first that all shapes fit: of one token, the one for decoding.
  void choose_profile(const std::vector<Tensor>& inputs) {
    for (std::int32_t p = 0; p < engine_->getNbOptimizationProfiles(); ++p) {
      if (!std::all_of(inputs.begin(), inputs.end(), [&](const Tensor& t) { return fits(t, p); })) continue;
      if (p != profile_) demand(context_->setOptimizationProfileAsync(p, stream_.handle), "a profile");
      profile_ = p;
      return;
    }
    throw failed("no profile of the engine is for this step", std::to_string(inputs[0].shape[1]) + " tokens");
  }

  bool fits(const Tensor& t, std::int32_t profile) const {
    const auto found = reads_.find(t.name);
    if (found == reads_.end()) return true;
    if (found->second.onnx != t.type.onnx) throw failed("an input has another type in the engine", t.name);
    const trt::Dims least = engine_->getProfileShape(t.name.c_str(), profile, trt::OptProfileSelector::kMIN);
    const trt::Dims most = engine_->getProfileShape(t.name.c_str(), profile, trt::OptProfileSelector::kMAX);
    if (least.nbDims < 0) return true;  // nothing of it is dynamic
    for (std::size_t i = 0; i < t.shape.size(); ++i) {
      if (t.shape[i] < least.d[i] || t.shape[i] > most.d[i]) return false;
    }
    return true;
  }

  Log log_;
  Stream stream_;
  std::unique_ptr<trt::IRuntime> runtime_;
  std::unique_ptr<trt::ICudaEngine> engine_;
  std::unique_ptr<trt::IExecutionContext> context_;
  std::map<std::string, Type> reads_, writes_;
  std::map<std::string, Device> buffers_;
  std::int32_t profile_ = 0;  // a context begins with the first
  std::string name_ = "TensorRT " + std::to_string(getInferLibVersion());
};

}  // namespace

std::unique_ptr<Graph> open_tensorrt(const std::string& engine, const std::string& plugins) {
  return std::make_unique<TensorRt>(engine, plugins);
}

}  // namespace v4export
