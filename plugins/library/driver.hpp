//! Kernels through CUDA's driver, which is looked up when the first one is needed: building engines needs no GPU.
#pragma once

#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace v4
{

class CudaError : public std::runtime_error
{
public:
    using std::runtime_error::runtime_error;
};

//! The functions of libcuda that are used here. Types are spelled out, since cuda.h comes with CUDA's compiler.
struct Driver
{
    using Result = int;

    Result (*getErrorString)(Result, char const**);
    Result (*moduleLoadData)(void** module, void const* image);
    Result (*moduleUnload)(void* module);
    Result (*moduleGetFunction)(void** function, void* module, char const* name);
    Result (*funcSetAttribute)(void* function, int attribute, int value);
    Result (*launchKernel)(void* function, unsigned gridX, unsigned gridY, unsigned gridZ, unsigned blockX,
        unsigned blockY, unsigned blockZ, unsigned sharedBytes, cudaStream_t stream, void** parameters, void** extra);

    static Driver const& get()
    {
        static Driver const driver;
        return driver;
    }

    void check(Result result, std::string const& what) const
    {
        if (result != 0)
        {
            char const* text = nullptr;
            getErrorString(result, &text);
            throw CudaError(what + ": " + (text != nullptr ? text : "CUDA error " + std::to_string(result)));
        }
    }

private:
    Driver()
    {
        void* const library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
        if (library == nullptr)
        {
            throw CudaError(std::string("CUDA's driver is not there: ") + dlerror());
        }
        find(library, "cuGetErrorString", getErrorString);
        find(library, "cuModuleLoadData", moduleLoadData);
        find(library, "cuModuleUnload", moduleUnload);
        find(library, "cuModuleGetFunction", moduleGetFunction);
        find(library, "cuFuncSetAttribute", funcSetAttribute);
        find(library, "cuLaunchKernel", launchKernel);
    }

    template <typename Function>
    static void find(void* library, char const* name, Function& function)
    {
        function = reinterpret_cast<Function>(dlsym(library, name));
        if (function == nullptr)
        {
            throw CudaError(std::string("CUDA's driver lacks ") + name);
        }
    }
};

//! A function of a module that is loaded into the context which is current then.
class Kernel
{
public:
    Kernel(std::string const& code, std::string const& entry, uint32_t shared)
    {
        auto const& driver = Driver::get();
        driver.check(driver.moduleLoadData(&mModule, code.c_str()), entry + " does not load");
        try
        {
            driver.check(driver.moduleGetFunction(&mFunction, mModule, entry.c_str()), entry + " is not in its code");
            if (shared > kPLAIN_SHARED)
            {
                driver.check(driver.funcSetAttribute(mFunction, kMAX_DYNAMIC_SHARED, static_cast<int>(shared)),
                    entry + " asks for " + std::to_string(shared) + " bytes of shared memory");
            }
        }
        catch (...)
        {
            driver.moduleUnload(mModule);
            throw;
        }
    }

    Kernel(Kernel const&) = delete;
    Kernel& operator=(Kernel const&) = delete;

    ~Kernel()
    {
        // The context may be gone before the plugin, and the module with it.
        Driver::get().moduleUnload(mModule);
    }

    void* function() const
    {
        return mFunction;
    }

private:
    static constexpr uint32_t kPLAIN_SHARED = 48U << 10; //!< What a launch may have without asking.
    static constexpr int kMAX_DYNAMIC_SHARED = 8;        //!< CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES

    void* mModule = nullptr;
    void* mFunction = nullptr;
};

} // namespace v4
