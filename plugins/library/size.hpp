//! Integer expressions of the inputs' dimensions, in postfix form: `i0.0 16 cdiv`.
#pragma once

#include "NvInferRuntime.h"

#include <algorithm>
#include <cstdint>
#include <map>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace v4
{

//! A launch that cannot be read, or does not fit the inputs.
class LaunchError : public std::runtime_error
{
public:
    using std::runtime_error::runtime_error;
};

//! A number written in digits alone.
inline int64_t parseNumber(std::string const& text)
{
    if (text.empty() || text.size() > 18 || text.find_first_not_of("0123456789") != std::string::npos)
    {
        throw LaunchError("not a number: '" + text + "'");
    }
    return std::stoll(text);
}

class Size
{
public:
    static Size parse(std::string const& text)
    {
        static std::map<std::string, nvinfer1::DimensionOperation> const operations{
            {"+", nvinfer1::DimensionOperation::kSUM},
            {"-", nvinfer1::DimensionOperation::kSUB},
            {"*", nvinfer1::DimensionOperation::kPROD},
            {"div", nvinfer1::DimensionOperation::kFLOOR_DIV},
            {"cdiv", nvinfer1::DimensionOperation::kCEIL_DIV},
            {"min", nvinfer1::DimensionOperation::kMIN},
            {"max", nvinfer1::DimensionOperation::kMAX},
        };
        Size size;
        std::istringstream words(text);
        int32_t depth = 0;
        for (std::string word; words >> word;)
        {
            auto const operation = operations.find(word);
            if (operation != operations.end())
            {
                size.mWords.push_back({Kind::kOPERATION, 0, 0, operation->second});
                // Evaluation relies on this: the stack never runs out.
                if (--depth < 1)
                {
                    throw LaunchError("'" + word + "' lacks an operand in '" + text + "'");
                }
                continue;
            }
            size.mWords.push_back(word[0] == 'i' ? dimension(word) : Word{Kind::kNUMBER, parseNumber(word), 0, {}});
            ++depth;
        }
        if (depth != 1)
        {
            throw LaunchError("not one value: '" + text + "'");
        }
        return size;
    }

    //! The value in an algebra, which has constant(number), dimension(input, axis) and operation(op, left, right).
    template <typename Algebra>
    typename Algebra::Value evaluate(Algebra& algebra) const
    {
        std::vector<typename Algebra::Value> stack;
        for (auto const& word : mWords)
        {
            switch (word.kind)
            {
            case Kind::kNUMBER: stack.push_back(algebra.constant(word.number)); break;
            case Kind::kDIMENSION: stack.push_back(algebra.dimension(word.number, word.axis)); break;
            case Kind::kOPERATION:
                auto const right = stack.back();
                stack.pop_back();
                stack.back() = algebra.operation(word.operation, stack.back(), right);
                break;
            }
        }
        return stack.back();
    }

private:
    enum class Kind
    {
        kNUMBER,
        kDIMENSION,
        kOPERATION,
    };

    struct Word
    {
        Kind kind;
        int64_t number; //!< Or the input that has the dimension.
        int64_t axis;
        nvinfer1::DimensionOperation operation;
    };

    static Word dimension(std::string const& word)
    {
        auto const point = word.find('.');
        if (point == std::string::npos)
        {
            throw LaunchError("not a dimension: '" + word + "'");
        }
        return {Kind::kDIMENSION, parseNumber(word.substr(1, point - 1)), parseNumber(word.substr(point + 1)), {}};
    }

    std::vector<Word> mWords;
};

//! The dimension of an input, in whatever type dimensions come (`nbDims` and `d`).
template <typename Dimensions>
auto dimensionOf(Dimensions const& dims, int64_t axis) -> std::decay_t<decltype(dims.d[0])>
{
    if (axis >= dims.nbDims)
    {
        throw LaunchError("axis " + std::to_string(axis) + " of an input with " + std::to_string(dims.nbDims));
    }
    return dims.d[axis];
}

inline void requireInput(int64_t input, int32_t count)
{
    if (input >= count)
    {
        throw LaunchError("a dimension of input " + std::to_string(input) + " of " + std::to_string(count));
    }
}

//! Numbers, at run time.
class Numbers
{
public:
    using Value = int64_t;

    Numbers(nvinfer1::PluginTensorDesc const* inputs, int32_t count)
        : mInputs(inputs)
        , mCount(count)
    {
    }

    Value constant(int64_t number) const
    {
        return number;
    }

    Value dimension(int64_t input, int64_t axis) const
    {
        requireInput(input, mCount);
        return dimensionOf(mInputs[input].dims, axis);
    }

    Value operation(nvinfer1::DimensionOperation op, Value left, Value right) const
    {
        using Op = nvinfer1::DimensionOperation;
        Value value = 0;
        bool overflows = false;
        switch (op)
        {
        case Op::kSUM: overflows = __builtin_add_overflow(left, right, &value); break;
        case Op::kSUB: overflows = __builtin_sub_overflow(left, right, &value); break;
        case Op::kPROD: overflows = __builtin_mul_overflow(left, right, &value); break;
        case Op::kMIN: value = std::min(left, right); break;
        case Op::kMAX: value = std::max(left, right); break;
        case Op::kFLOOR_DIV: value = divided(left, right) - (left % right < 0); break;
        case Op::kCEIL_DIV: value = divided(left, right) + (left % right > 0); break;
        default: throw LaunchError("an operation without a meaning");
        }
        if (overflows)
        {
            throw LaunchError("a size beyond 64 bits");
        }
        return value;
    }

private:
    static Value divided(Value left, Value right)
    {
        if (right <= 0)
        {
            throw LaunchError("a division by " + std::to_string(right));
        }
        return left / right;
    }

    nvinfer1::PluginTensorDesc const* mInputs;
    int32_t mCount;
};

//! TensorRT's expressions, when an engine is built.
class Expressions
{
public:
    using Value = nvinfer1::IDimensionExpr const*;

    Expressions(nvinfer1::DimsExprs const* inputs, int32_t count, nvinfer1::IExprBuilder& builder)
        : mInputs(inputs)
        , mCount(count)
        , mBuilder(builder)
    {
    }

    Value constant(int64_t number) const
    {
        return made(mBuilder.constant(number));
    }

    Value dimension(int64_t input, int64_t axis) const
    {
        requireInput(input, mCount);
        return dimensionOf(mInputs[input], axis);
    }

    Value operation(nvinfer1::DimensionOperation op, Value left, Value right) const
    {
        return made(mBuilder.operation(op, *left, *right));
    }

private:
    static Value made(Value value)
    {
        if (value == nullptr)
        {
            throw LaunchError("TensorRT made no expression of a size");
        }
        return value;
    }

    nvinfer1::DimsExprs const* mInputs;
    int32_t mCount;
    nvinfer1::IExprBuilder& mBuilder;
};

} // namespace v4
