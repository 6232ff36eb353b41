//! A creator for each kernel, and the two ways by which TensorRT comes to know them.
#include "plugin.hpp"

#include "registries.hpp"


#define V4_EXPORT extern "C" __attribute__((visibility("default")))

namespace v4
{
namespace
{

class KernelCreator final : public nvinfer1::IPluginCreatorV3One
{
public:
    KernelCreator(char const* name)
        : mName(name)
    {
    }

    nvinfer1::IPluginV3* createPlugin(char const*, nvinfer1::PluginFieldCollection const* fields,
        nvinfer1::TensorRTPhase) noexcept override
    {
        return guarded<nvinfer1::IPluginV3*>(
            mName, nullptr, [&] { return new KernelPlugin(mName, text(*fields, "ptx"), text(*fields, "launch")); });
    }

    nvinfer1::PluginFieldCollection const* getFieldNames() noexcept override
    {
        return &mCollection;
    }

    char const* getPluginName() const noexcept override
    {
        return mName;
    }

    char const* getPluginVersion() const noexcept override
    {
        return kVERSION;
    }

    char const* getPluginNamespace() const noexcept override
    {
        return kNAMESPACE;
    }

private:
    //! A field without the zero bytes that its length may count.
    static std::string text(nvinfer1::PluginFieldCollection const& fields, std::string const& name)
    {
        for (int32_t i = 0; i < fields.nbFields; ++i)
        {
            auto const& field = fields.fields[i];
            if (name == field.name && field.data != nullptr && field.length > 0)
            {
                std::string value(static_cast<char const*>(field.data), static_cast<size_t>(field.length));
                value.erase(value.find_last_not_of('\0') + 1);
                return value;
            }
        }
        throw LaunchError("the attribute " + name + " is missing");
    }

    char const* mName;
    nvinfer1::PluginField mFields[2] = {
        {"ptx", nullptr, nvinfer1::PluginFieldType::kCHAR, 0},
        {"launch", nullptr, nvinfer1::PluginFieldType::kCHAR, 0},
    };
    nvinfer1::PluginFieldCollection mCollection{2, mFields};
};

#define KERNEL(name) {#name},
KernelCreator creators[] = {
#include "kernels.inc"
};
#undef KERNEL

} // namespace
} // namespace v4

namespace v4
{
namespace
{

//! Registers at loading, for hosts that load plugins with dlopen alone.
struct Registration
{
    Registration()
    {
        for (auto* const registry : registries())
        {
            for (auto& creator : creators)
            {
                registry->registerCreator(creator, kNAMESPACE);
            }
        }
    }
} const registration;

} // namespace
} // namespace v4

V4_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder)
{
    v4::loggerFinder = finder;
}

//! Called by IPluginRegistry::loadLibrary, which registers the creators itself and fails if they are there already: so
//! what loading registered is taken back.
V4_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count)
{
    static std::vector<nvinfer1::IPluginCreatorInterface*> const list = [] {
        std::vector<nvinfer1::IPluginCreatorInterface*> all;
        for (auto& creator : v4::creators)
        {
            all.push_back(&creator);
        }
        return all;
    }();
    for (auto* const registry : v4::registries())
    {
        for (auto* const creator : list)
        {
            registry->deregisterCreator(*creator);
        }
    }
    count = static_cast<int32_t>(list.size());
    return list.data();
}
