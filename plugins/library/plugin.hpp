//! The one plugin class: any node that carries its kernel (`ptx`) and how to launch it (`launch`).
#pragma once

#include "driver.hpp"
#include "launch.hpp"
#include "log.hpp"

#include <memory>
#include <utility>

namespace v4
{

inline constexpr char const* kVERSION = "1";
inline constexpr char const* kNAMESPACE = "v4_kernels";

class KernelPlugin final : public nvinfer1::IPluginV3,
                           public nvinfer1::IPluginV3OneCore,
                           public nvinfer1::IPluginV3OneBuild,
                           public nvinfer1::IPluginV3OneRuntime
{
public:
    KernelPlugin(std::string name, std::string ptx, std::string launch)
        : mName(std::move(name))
        , mPtx(std::move(ptx))
        , mText(std::move(launch))
        , mLaunch(Launch::parse(mText))
    {
    }

    nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override
    {
        switch (type)
        {
        case nvinfer1::PluginCapabilityType::kCORE: return static_cast<nvinfer1::IPluginV3OneCore*>(this);
        case nvinfer1::PluginCapabilityType::kBUILD: return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
        case nvinfer1::PluginCapabilityType::kRUNTIME: return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
        }
        return nullptr;
    }

    nvinfer1::IPluginV3* clone() noexcept override
    {
        return guarded<nvinfer1::IPluginV3*>(mName, nullptr, [&] { return new KernelPlugin(mName, mPtx, mText); });
    }

    char const* getPluginName() const noexcept override
    {
        return mName.c_str();
    }

    char const* getPluginVersion() const noexcept override
    {
        return kVERSION;
    }

    char const* getPluginNamespace() const noexcept override
    {
        return kNAMESPACE;
    }

    int32_t getNbOutputs() const noexcept override
    {
        return static_cast<int32_t>(mLaunch.outputs.size());
    }

    int32_t configurePlugin(nvinfer1::DynamicPluginTensorDesc const*, int32_t, nvinfer1::DynamicPluginTensorDesc const*,
        int32_t) noexcept override
    {
        return 0;
    }

    //! Inputs come in the types of the network, which is strongly typed: the kernel was compiled for those.
    bool supportsFormatCombination(int32_t pos, nvinfer1::DynamicPluginTensorDesc const* inOut, int32_t nbInputs,
        int32_t nbOutputs) noexcept override
    {
        auto const& desc = inOut[pos].desc;
        bool const typed = pos < nbInputs
            || (nbOutputs == getNbOutputs() && desc.type == mLaunch.outputs[static_cast<size_t>(pos - nbInputs)].type);
        return typed && desc.format == nvinfer1::TensorFormat::kLINEAR;
    }

    int32_t getOutputDataTypes(nvinfer1::DataType* outputTypes, int32_t nbOutputs, nvinfer1::DataType const*,
        int32_t) const noexcept override
    {
        return guarded(mName, 1, [&] {
            requireOutputs(nbOutputs);
            for (auto const& output : mLaunch.outputs)
            {
                *outputTypes++ = output.type;
            }
            return 0;
        });
    }

    int32_t getOutputShapes(nvinfer1::DimsExprs const* inputs, int32_t nbInputs, nvinfer1::DimsExprs const*, int32_t,
        nvinfer1::DimsExprs* outputs, int32_t nbOutputs, nvinfer1::IExprBuilder& exprBuilder) noexcept override
    {
        return guarded(mName, 1, [&] {
            requireOutputs(nbOutputs);
            Expressions expressions(inputs, nbInputs, exprBuilder);
            for (auto const& output : mLaunch.outputs)
            {
                outputs->nbDims = static_cast<int32_t>(output.dims.size());
                for (size_t axis = 0; axis < output.dims.size(); ++axis)
                {
                    outputs->d[axis] = output.dims[axis].evaluate(expressions);
                }
                ++outputs;
            }
            return 0;
        });
    }

    //! Loads the kernel, which a launch that is captured into a graph could not.
    int32_t onShapeChange(nvinfer1::PluginTensorDesc const*, int32_t nbInputs, nvinfer1::PluginTensorDesc const*,
        int32_t) noexcept override
    {
        return guarded(mName, 1, [&] {
            mInputs = nbInputs;
            kernel();
            return 0;
        });
    }

    int32_t enqueue(nvinfer1::PluginTensorDesc const* inputDesc, nvinfer1::PluginTensorDesc const*,
        void const* const* inputs, void* const* outputs, void*, cudaStream_t stream) noexcept override
    {
        return guarded(mName, 1, [&] {
            auto call = counted(mLaunch, inputDesc, mInputs);
            if (!call.empty())
            {
                launch(call, inputs, outputs, stream);
            }
            return 0;
        });
    }

    nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext*) noexcept override
    {
        return clone();
    }

    //! The code is part of the engine.
    nvinfer1::PluginFieldCollection const* getFieldsToSerialize() noexcept override
    {
        mFields = {text("ptx", mPtx), text("launch", mText)};
        mCollection = {static_cast<int32_t>(mFields.size()), mFields.data()};
        return &mCollection;
    }

private:
    static nvinfer1::PluginField text(char const* name, std::string const& value)
    {
        return {name, value.data(), nvinfer1::PluginFieldType::kCHAR, static_cast<int32_t>(value.size())};
    }

    void requireOutputs(int32_t count) const
    {
        if (count != getNbOutputs())
        {
            throw LaunchError(std::to_string(count) + " outputs, not " + std::to_string(getNbOutputs()));
        }
    }

    //! Loaded once: TensorRT clones a plugin for each execution context, and destroys the clone with it.
    Kernel const& kernel()
    {
        if (!mKernel)
        {
            mKernel = std::make_unique<Kernel>(mPtx, mLaunch.entry, mLaunch.shared);
        }
        return *mKernel;
    }

    void launch(Counted& call, void const* const* inputs, void* const* outputs, cudaStream_t stream)
    {
        // Pointers to the parameters' values, which cuLaunchKernel copies.
        std::vector<void*> parameters;
        for (int32_t i = 0; i < mInputs; ++i)
        {
            parameters.push_back(const_cast<void const**>(&inputs[i]));
        }
        for (auto& scalar : call.scalars)
        {
            parameters.push_back(&scalar);
        }
        for (int32_t i = 0; i < getNbOutputs(); ++i)
        {
            parameters.push_back(const_cast<void**>(&outputs[i]));
        }
        auto const& driver = Driver::get();
        auto const result = driver.launchKernel(kernel().function(), call.grid[0], call.grid[1], call.grid[2],
            mLaunch.threads, 1, 1, mLaunch.shared, stream, parameters.data(), nullptr);
        driver.check(result, mLaunch.entry + " is not launched");
    }

    std::string mName;
    std::string mPtx;
    std::string mText;
    Launch mLaunch;
    int32_t mInputs = 0; //!< enqueue is not told how many there are.
    std::unique_ptr<Kernel> mKernel;
    std::vector<nvinfer1::PluginField> mFields;
    nvinfer1::PluginFieldCollection mCollection{};
};

} // namespace v4
