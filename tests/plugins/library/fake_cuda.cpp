// A stand-in for libcuda.so.1 that prints what it is asked to do. FAKE_CUDA_PARAMETERS says what a kernel's parameters
// are, a letter each (p: a pointer, i: an int32), and FAKE_CUDA_FAILS which function fails.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace
{
int module, function;

int done(char const* name)
{
    char const* const fails = std::getenv("FAKE_CUDA_FAILS");
    return fails != nullptr && std::strcmp(fails, name) == 0 ? 700 : 0;
}
} // namespace

extern "C"
{
int cuGetErrorString(int, char const** text)
{
    *text = "an illegal address";
    return 0;
}

int cuModuleLoadData(void** loaded, void const* image)
{
    std::printf("load %s\n", static_cast<char const*>(image));
    *loaded = &module;
    return done("cuModuleLoadData");
}

int cuModuleUnload(void* loaded)
{
    std::printf("unload %d\n", loaded == &module);
    return 0;
}

int cuModuleGetFunction(void** found, void* loaded, char const* name)
{
    std::printf("function %s\n", loaded == &module ? name : "of another module");
    *found = &function;
    return done("cuModuleGetFunction");
}

int cuFuncSetAttribute(void* of, int attribute, int value)
{
    std::printf("attribute %d %d %d\n", of == &function, attribute, value);
    return done("cuFuncSetAttribute");
}

int cuLaunchKernel(void* of, unsigned gridX, unsigned gridY, unsigned gridZ, unsigned blockX, unsigned blockY,
    unsigned blockZ, unsigned shared, void* stream, void** parameters, void** extra)
{
    std::printf("launch %d %u %u %u %u %u %u %u %p %d\n", of == &function, gridX, gridY, gridZ, blockX, blockY, blockZ,
        shared, stream, extra != nullptr);
    std::printf("parameters");
    for (char const* kind = std::getenv("FAKE_CUDA_PARAMETERS"); *kind != 0; ++kind, ++parameters)
    {
        std::printf(" %lld", *kind == 'p' ? static_cast<long long>(*static_cast<intptr_t*>(*parameters))
                                          : static_cast<long long>(*static_cast<int32_t*>(*parameters)));
    }
    std::printf("\n");
    return done("cuLaunchKernel");
}
}
