//! Where messages go: the logger of whoever calls, if TensorRT has told how to find it, else standard error.
#pragma once

#include "NvInferRuntime.h"

#include <atomic>
#include <exception>
#include <iostream>
#include <string>

namespace v4
{

inline std::atomic<nvinfer1::ILoggerFinder*> loggerFinder{nullptr};

inline void logError(std::string const& message)
{
    auto* const finder = loggerFinder.load();
    auto* const logger = finder != nullptr ? finder->findLogger() : nullptr;
    if (logger != nullptr)
    {
        logger->log(nvinfer1::ILogger::Severity::kERROR, message.c_str());
        return;
    }
    std::cerr << message << std::endl;
}

//! What a function returns, or `failed` after its exception is logged: none may reach TensorRT.
template <typename Result, typename Function>
Result guarded(std::string const& name, Result failed, Function&& function) noexcept
{
    try
    {
        return function();
    }
    catch (std::exception const& error)
    {
        logError("v4::" + name + ": " + error.what());
    }
    return failed;
}

} // namespace v4
