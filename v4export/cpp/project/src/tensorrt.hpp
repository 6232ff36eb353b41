// A TensorRT engine of the bundle in onnxruntime's place, where the SDK was there to compile with.
#pragma once

#include <memory>
#include <string>

#include "tensor.hpp"

namespace v4export {

// Opens an engine, on the current CUDA device.
//   plugins: path of libv4_plugins.so for engines built with `--plugins library`, or empty.
// Throws Error, also where this was compiled without TensorRT.
std::unique_ptr<Graph> open_tensorrt(const std::string& engine, const std::string& plugins);

}  // namespace v4export
