// What TensorRT does with a plugin, in short: host LIBRARY PTX_FILE LAUNCH_FILE INPUT..., an input's dimensions as 2x3.
// Prints what it is told.
#include "NvInferRuntime.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <deque>
#include <fstream>
#include <iterator>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

using namespace nvinfer1;

namespace
{
class Value final : public IDimensionExpr, public apiv::VDimensionExpr
{
public:
    explicit Value(int64_t value)
        : mValue(value)
    {
        mImpl = this;
    }
    bool isConstant() const override
    {
        return true;
    }
    int64_t getConstantValue() const override
    {
        return mValue;
    }
    bool isSizeTensor() const override
    {
        return false;
    }

private:
    int64_t mValue;
};

class Builder final : public IExprBuilder, public apiv::VExprBuilder
{
public:
    Builder()
    {
        mImpl = this;
    }
    IDimensionExpr const* constant(int64_t value) override
    {
        return &mValues.emplace_back(value);
    }
    IDimensionExpr const* operation(
        DimensionOperation op, IDimensionExpr const& first, IDimensionExpr const& second) override
    {
        int64_t const a = first.getConstantValue();
        int64_t const b = second.getConstantValue();
        switch (op)
        {
        case DimensionOperation::kSUM: return constant(a + b);
        case DimensionOperation::kSUB: return constant(a - b);
        case DimensionOperation::kPROD: return constant(a * b);
        case DimensionOperation::kMIN: return constant(std::min(a, b));
        case DimensionOperation::kMAX: return constant(std::max(a, b));
        case DimensionOperation::kFLOOR_DIV: return constant(a / b);
        case DimensionOperation::kCEIL_DIV: return constant((a + b - 1) / b);
        default: return nullptr;
        }
    }
    IDimensionExpr const* declareSizeTensor(int32_t, IDimensionExpr const&, IDimensionExpr const&) override
    {
        return nullptr;
    }

private:
    std::deque<Value> mValues;
};

template <typename Capability>
Capability& as(IPluginV3& plugin, PluginCapabilityType type)
{
    return *static_cast<Capability*>(plugin.getCapabilityInterface(type));
}

std::string read(char const* path)
{
    std::ifstream file(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), {}};
}

std::vector<int64_t> dimensions(std::string const& text)
{
    std::vector<int64_t> dims;
    std::istringstream words(text);
    for (std::string word; std::getline(words, word, 'x');)
    {
        dims.push_back(std::stoll(word));
    }
    return dims;
}

//! Fields as they come out of an engine: in memory of its own.
std::vector<std::string> copied(PluginFieldCollection const& fields)
{
    std::vector<std::string> values;
    for (int32_t i = 0; i < fields.nbFields; ++i)
    {
        auto const& field = fields.fields[i];
        values.emplace_back(static_cast<char const*>(field.data), static_cast<size_t>(field.length));
        std::printf("field %s %d %zu\n", field.name, field.type == PluginFieldType::kCHAR, values.back().size());
    }
    return values;
}

IPluginV3* create(IPluginCreatorV3One& creator, std::string const& ptx, std::string const& launch, TensorRTPhase phase)
{
    PluginField const fields[] = {
        {"ptx", ptx.data(), PluginFieldType::kCHAR, static_cast<int32_t>(ptx.size())},
        {"launch", launch.data(), PluginFieldType::kCHAR, static_cast<int32_t>(launch.size())}};
    PluginFieldCollection const collection{2, fields};
    return creator.createPlugin("node", &collection, phase);
}

void askTypes(IPluginV3& plugin, int32_t inputs)
{
    auto& build = as<IPluginV3OneBuild>(plugin, PluginCapabilityType::kBUILD);
    int32_t const outputs = build.getNbOutputs();
    std::vector<DataType> in(static_cast<size_t>(inputs), DataType::kFLOAT);
    std::vector<DataType> types(static_cast<size_t>(outputs));
    std::printf("types %d", build.getOutputDataTypes(types.data(), outputs, in.data(), inputs));
    std::vector<DynamicPluginTensorDesc> descs(static_cast<size_t>(inputs + outputs));
    for (int32_t i = 0; i < outputs; ++i)
    {
        std::printf(" %d", static_cast<int>(types[static_cast<size_t>(i)]));
        descs[static_cast<size_t>(inputs + i)].desc.type = types[static_cast<size_t>(i)];
    }
    std::printf("\nformats");
    auto const ask = [&](int32_t pos, TensorFormat format, DataType type) {
        descs[static_cast<size_t>(pos)].desc.format = format;
        descs[static_cast<size_t>(pos)].desc.type = type;
        std::printf(" %d", build.supportsFormatCombination(pos, descs.data(), inputs, outputs));
    };
    ask(0, TensorFormat::kLINEAR, DataType::kHALF);
    ask(0, TensorFormat::kCHW2, DataType::kHALF);
    ask(inputs, TensorFormat::kLINEAR, types[0]);
    ask(inputs, TensorFormat::kCHW2, types[0]);
    ask(inputs, TensorFormat::kLINEAR, DataType::kBOOL);
    std::printf("\n");
}

void askShapes(IPluginV3& plugin, std::vector<std::vector<int64_t>> const& inputs)
{
    auto& build = as<IPluginV3OneBuild>(plugin, PluginCapabilityType::kBUILD);
    Builder builder;
    std::vector<DimsExprs> in(inputs.size());
    for (size_t i = 0; i < inputs.size(); ++i)
    {
        in[i].nbDims = static_cast<int32_t>(inputs[i].size());
        for (size_t axis = 0; axis < inputs[i].size(); ++axis)
        {
            in[i].d[axis] = builder.constant(inputs[i][axis]);
        }
    }
    std::vector<DimsExprs> out(static_cast<size_t>(build.getNbOutputs()));
    IExprBuilder& given = builder;
    int32_t const failed = build.getOutputShapes(
        in.data(), static_cast<int32_t>(in.size()), nullptr, 0, out.data(), build.getNbOutputs(), given);
    std::printf("shapes %d\n", failed);
    for (size_t i = 0; failed == 0 && i < out.size(); ++i)
    {
        std::printf("shape");
        for (int32_t axis = 0; axis < out[i].nbDims; ++axis)
        {
            std::printf(" %lld", static_cast<long long>(out[i].d[axis]->getConstantValue()));
        }
        std::printf("\n");
    }
}

void execute(IPluginV3& engines, std::vector<std::vector<int64_t>> const& inputs, int32_t outputs)
{
    std::unique_ptr<IPluginV3> const plugin(
        as<IPluginV3OneRuntime>(engines, PluginCapabilityType::kRUNTIME).attachToContext(nullptr));
    auto& runtime = as<IPluginV3OneRuntime>(*plugin, PluginCapabilityType::kRUNTIME);
    std::vector<PluginTensorDesc> in(inputs.size());
    std::vector<PluginTensorDesc> out(static_cast<size_t>(outputs));
    std::vector<void const*> from;
    std::vector<void*> to;
    for (size_t i = 0; i < inputs.size(); ++i)
    {
        in[i].dims.nbDims = static_cast<int32_t>(inputs[i].size());
        std::copy(inputs[i].begin(), inputs[i].end(), in[i].dims.d);
        from.push_back(reinterpret_cast<void const*>(4096 * (i + 1)));
    }
    for (size_t i = 0; i < out.size(); ++i)
    {
        to.push_back(reinterpret_cast<void*>(65536 * (i + 1)));
    }
    std::printf("changed %d\n", runtime.onShapeChange(in.data(), static_cast<int32_t>(in.size()), out.data(), outputs));
    auto const stream = reinterpret_cast<cudaStream_t>(0x77);
    for (int call = 0; call < 2; ++call)
    {
        int32_t const failed = runtime.enqueue(in.data(), out.data(), from.data(), to.data(), nullptr, stream);
        std::printf("enqueued %d\n", failed);
    }
}
} // namespace

int main(int argc, char** argv)
{
    void* const library = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr)
    {
        std::printf("%s\n", dlerror());
        return 1;
    }
    int32_t count = 0;
    using GetCreators = IPluginCreatorInterface* const* (*) (int32_t&);
    auto* const creators = reinterpret_cast<GetCreators>(dlsym(library, "getCreators"))(count);
    auto const named = [](IPluginCreatorInterface* each) {
        return std::string("MoeRoute") == static_cast<IPluginCreatorV3One*>(each)->getPluginName();
    };
    auto& creator = *static_cast<IPluginCreatorV3One*>(*std::find_if(creators, creators + count, named));
    std::printf("creators %d %s %s\n", count, creator.getPluginVersion(), creator.getPluginNamespace());

    std::unique_ptr<IPluginV3> const built(create(creator, read(argv[2]), read(argv[3]), TensorRTPhase::kBUILD));
    if (!built)
    {
        std::printf("refused\n");
        return 0;
    }
    std::vector<std::vector<int64_t>> inputs;
    std::transform(argv + 4, argv + argc, std::back_inserter(inputs), dimensions);
    std::unique_ptr<IPluginV3> const cloned(built->clone());
    askTypes(*cloned, static_cast<int32_t>(inputs.size()));
    askShapes(*cloned, inputs);

    auto& runtime = as<IPluginV3OneRuntime>(*built, PluginCapabilityType::kRUNTIME);
    auto const fields = copied(*runtime.getFieldsToSerialize());
    std::unique_ptr<IPluginV3> const loaded(create(creator, fields[0], fields[1], TensorRTPhase::kRUNTIME));
    int32_t const outputs = as<IPluginV3OneBuild>(*built, PluginCapabilityType::kBUILD).getNbOutputs();
    execute(*loaded, inputs, outputs);
    return 0;
}
