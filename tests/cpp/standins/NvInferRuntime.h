// A stand-in for TensorRT's header of the same name, for machines without the SDK: only what the C++ runner uses of it.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace nvinfer1 {

using AsciiChar = char;

enum class DataType : int32_t { kFLOAT = 0, kHALF = 1, kINT8 = 2, kINT32 = 3, kFP8 = 6, kBF16 = 7, kINT64 = 8 };
enum class TensorIOMode : int32_t { kNONE = 0, kINPUT = 1, kOUTPUT = 2 };
enum class OptProfileSelector : int32_t { kMIN = 0, kOPT = 1, kMAX = 2 };

struct Dims64 {
  static constexpr int32_t MAX_DIMS = 8;
  int32_t nbDims;
  int64_t d[MAX_DIMS];
};
using Dims = Dims64;

class ILogger {
 public:
  enum class Severity : int32_t { kINTERNAL_ERROR = 0, kERROR = 1, kWARNING = 2, kINFO = 3, kVERBOSE = 4 };
  virtual void log(Severity severity, AsciiChar const* msg) noexcept = 0;
  virtual ~ILogger() = default;
};

class IPluginRegistry {
 public:
  using PluginLibraryHandle = void*;
  PluginLibraryHandle loadLibrary(AsciiChar const* path) noexcept;
};

class IExecutionContext {
 public:
  bool setOptimizationProfileAsync(int32_t profile, cudaStream_t stream) noexcept;
  bool setInputShape(char const* name, Dims const& dims) noexcept;
  Dims getTensorShape(char const* name) const noexcept;
  bool setTensorAddress(char const* name, void* data) noexcept;
  bool enqueueV3(cudaStream_t stream) noexcept;
};

class ICudaEngine {
 public:
  IExecutionContext* createExecutionContext() noexcept;
  int32_t getNbIOTensors() const noexcept;
  char const* getIOTensorName(int32_t index) const noexcept;
  TensorIOMode getTensorIOMode(char const* name) const noexcept;
  DataType getTensorDataType(char const* name) const noexcept;
  int32_t getNbOptimizationProfiles() const noexcept;
  Dims getProfileShape(char const* name, int32_t profile, OptProfileSelector select) const noexcept;
};

class IRuntime {
 public:
  ICudaEngine* deserializeCudaEngine(void const* blob, std::size_t size) noexcept;
  IPluginRegistry& getPluginRegistry() noexcept;
};

IRuntime* createInferRuntime(ILogger& logger) noexcept;

}  // namespace nvinfer1

extern "C" int32_t getInferLibVersion() noexcept;
