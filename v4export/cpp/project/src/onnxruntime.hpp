// onnxruntime by its C API, loaded when a model is opened: nothing is linked, so one program runs with any version that
// knows the functions used here.
#pragma once

#include <memory>
#include <string>

#include "tensor.hpp"

namespace v4export {

// Opens a graph for the CPU, with the settings of `v4export run`.
//   graph: its file.
//   folder: that its weights are in.
//   library: path of libonnxruntime, or empty for V4EXPORT_ONNXRUNTIME of the environment, or the usual names.
//   threads: 0 lets onnxruntime choose.
// Throws Error.
std::unique_ptr<Graph> open_onnxruntime(const std::string& graph, const std::string& folder,
                                        const std::string& library, int threads);

}  // namespace v4export
