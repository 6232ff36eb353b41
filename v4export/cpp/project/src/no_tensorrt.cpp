// What there is of tensorrt.hpp without the SDK.
#include "tensorrt.hpp"
#include "v4export/error.hpp"

namespace v4export {

std::unique_ptr<Graph> open_tensorrt(const std::string& engine, const std::string&) {
  throw Error(Exit::UNSUPPORTED, "this program was compiled without TensorRT", engine,
              "compile it where TENSORRT_ROOT and CUDA_HOME name the SDKs, or run the graph by onnxruntime");
}

}  // namespace v4export
