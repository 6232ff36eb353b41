//! How a kernel is launched: what a node's attribute `launch` says, one line a fact.
#pragma once

#include "size.hpp"

#include <array>
#include <limits>

namespace v4
{

struct Output
{
    nvinfer1::DataType type;
    std::vector<Size> dims;
};

struct Launch
{
    std::string entry;
    uint32_t threads;
    uint32_t shared; //!< Bytes of dynamic shared memory.
    std::vector<Size> scalars;
    std::vector<Size> grid; //!< Three.
    std::vector<Output> outputs;

    static Launch parse(std::string const& text);
};

//! A launch with the numbers of one call.
struct Counted
{
    std::array<uint32_t, 3> grid;
    std::vector<int32_t> scalars;

    bool empty() const
    {
        return grid[0] == 0 || grid[1] == 0 || grid[2] == 0;
    }
};

inline nvinfer1::DataType parseType(std::string const& name)
{
    static std::map<std::string, nvinfer1::DataType> const types{
        {"float32", nvinfer1::DataType::kFLOAT},
        {"float16", nvinfer1::DataType::kHALF},
        {"bfloat16", nvinfer1::DataType::kBF16},
        {"int64", nvinfer1::DataType::kINT64},
        {"int32", nvinfer1::DataType::kINT32},
        {"uint8", nvinfer1::DataType::kUINT8},
        {"float8_e4m3fn", nvinfer1::DataType::kFP8},
    };
    auto const found = types.find(name);
    if (found == types.end())
    {
        throw LaunchError("not a type of outputs: '" + name + "'");
    }
    return found->second;
}

//! From `float32: i0.0, 8`.
inline Output parseOutput(std::string const& text)
{
    auto const colon = text.find(": ");
    if (colon == std::string::npos)
    {
        throw LaunchError("an output without dimensions: '" + text + "'");
    }
    Output output{parseType(text.substr(0, colon)), {}};
    for (auto begin = colon + 2; begin != std::string::npos;)
    {
        auto const comma = text.find(", ", begin);
        output.dims.push_back(Size::parse(text.substr(begin, comma == std::string::npos ? comma : comma - begin)));
        begin = comma == std::string::npos ? comma : comma + 2;
    }
    if (output.dims.size() > static_cast<size_t>(nvinfer1::Dims::MAX_DIMS))
    {
        throw LaunchError("an output of too many dimensions: '" + text + "'");
    }
    return output;
}

//! A number of at most that much.
inline uint32_t parseCount(std::string const& text, int64_t most)
{
    auto const number = parseNumber(text);
    if (number > most)
    {
        throw LaunchError(text + " is more than " + std::to_string(most));
    }
    return static_cast<uint32_t>(number);
}

inline Launch Launch::parse(std::string const& text)
{
    Launch launch{};
    std::map<std::string, std::string> once;
    std::istringstream lines(text);
    for (std::string line; std::getline(lines, line);)
    {
        auto const space = line.find(' ');
        auto const key = line.substr(0, space);
        auto const value = space == std::string::npos ? std::string{} : line.substr(space + 1);
        if (key == "scalar")
        {
            launch.scalars.push_back(Size::parse(value));
        }
        else if (key == "grid")
        {
            launch.grid.push_back(Size::parse(value));
        }
        else if (key == "output")
        {
            launch.outputs.push_back(parseOutput(value));
        }
        else if ((key != "entry" && key != "threads" && key != "shared") || value.empty()
            || !once.emplace(key, value).second)
        {
            throw LaunchError("a line out of place: '" + line + "'");
        }
    }
    if (once.size() != 3 || launch.grid.size() != 3 || launch.outputs.empty())
    {
        throw LaunchError("not an entry, threads, shared, three of grid and outputs");
    }
    launch.entry = once["entry"];
    launch.threads = parseCount(once["threads"], 1024);
    launch.shared = parseCount(once["shared"], std::numeric_limits<int32_t>::max());
    if (launch.threads == 0)
    {
        throw LaunchError("a block without threads");
    }
    return launch;
}

//! The value, if it is at least that much and fits 32 bits.
inline int64_t within(int64_t value, int64_t least, char const* what)
{
    if (value < least || value > std::numeric_limits<int32_t>::max())
    {
        throw LaunchError(std::string(what) + " of " + std::to_string(value));
    }
    return value;
}

inline Counted counted(Launch const& launch, nvinfer1::PluginTensorDesc const* inputs, int32_t count)
{
    Numbers numbers(inputs, count);
    Counted result{};
    for (size_t i = 0; i < result.grid.size(); ++i)
    {
        result.grid[i] = static_cast<uint32_t>(within(launch.grid[i].evaluate(numbers), 0, "a grid"));
    }
    for (auto const& scalar : launch.scalars)
    {
        auto const value = within(scalar.evaluate(numbers), std::numeric_limits<int32_t>::min(), "an int32 parameter");
        result.scalars.push_back(static_cast<int32_t>(value));
    }
    return result;
}

} // namespace v4
