//! The plugin registries of whichever TensorRT the process has loaded: this library links none.
#pragma once

#include "NvInferRuntime.h"

#include <dlfcn.h>
#include <link.h>

#include <set>
#include <string>
#include <vector>

namespace v4
{

inline std::vector<std::string> loadedLibraries()
{
    std::vector<std::string> names;
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void* found) {
            static_cast<std::vector<std::string>*>(found)->emplace_back(info->dlpi_name);
            return 0;
        },
        &names);
    return names;
}

//! The version of the headers. A registry of another version, or of TensorRT where this is TensorRT-RTX, has other
//! functions in other places, which C++ does not notice.
#ifdef TRT_MAJOR_RTX
inline constexpr int32_t kMAJOR = TRT_MAJOR_RTX;
#else
inline constexpr int32_t kMAJOR = NV_TENSORRT_MAJOR;
#endif

//! A host may have loaded TensorRT (or TensorRT-RTX: the function is named alike) out of the sight of others, as Python
//! and Triton do. So each library is asked, and not only the process.
inline std::set<nvinfer1::IPluginRegistry*> registries()
{
    std::set<nvinfer1::IPluginRegistry*> found;
    auto const ask = [&](void* library) {
        auto const version = reinterpret_cast<int32_t (*)()>(dlsym(library, "getInferLibVersion"));
        auto const registry = reinterpret_cast<nvinfer1::IPluginRegistry* (*)()>(dlsym(library, "getPluginRegistry"));
        if (version != nullptr && registry != nullptr && version() / 10000 == kMAJOR)
        {
            found.insert(registry());
        }
    };
    ask(RTLD_DEFAULT);
    for (auto const& name : loadedLibraries())
    {
        if (void* const library = name.empty() ? nullptr : dlopen(name.c_str(), RTLD_LAZY | RTLD_NOLOAD))
        {
            ask(library);
            dlclose(library);
        }
    }
    found.erase(nullptr);
    return found;
}

} // namespace v4
