// onnxruntime's C ABI, as far as an operator on a CPU needs it: a table of functions that only grows, so that places in it
// stay. The names are the ABI's, in words; places and types are those of its version 17.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <initializer_list>
#include <iterator>
#include <mutex>
#include <stdexcept>
#include <string>

namespace ort {

constexpr uint32_t kVersion = 17;
enum Type : int { kUndefined = 0, kFloat = 1, kUint8 = 2, kInt64 = 7, kFloat16 = 10, kBfloat16 = 16, kFloat8E4M3FN = 17 };
enum Characteristic : int { kRequired = 0, kOptional = 1, kVariadic = 2 };

struct Status;
struct Info;
struct Context;
struct Value;
struct ShapeInfo;
struct Domain;
struct SessionOptions;

struct Api {
  void* places[278];
};

struct ApiBase {
  const Api* (*get_api)(uint32_t version);
  const char* (*get_version)();
};

extern const Api* api;

template <class Result, class... Arguments>
Result call(int place, Arguments... arguments) {
  return reinterpret_cast<Result (*)(Arguments...)>(api->places[place])(arguments...);
}

// An error that onnxruntime has told, on its way back to it.
struct Failed {
  Status* status;
};

inline void check(Status* status) {
  if (status) throw Failed{status};
}

inline Status* status(const char* message) { return call<Status*>(0, 1, message); }

inline int64_t attribute(const Info* info, const char* name) {
  int64_t found = 0;
  check(call<Status*>(86, info, name, &found));
  return found;
}

inline float real(const Info* info, const char* name) {
  float found = 0;
  check(call<Status*>(85, info, name, &found));
  return found;
}

inline std::string text(const Info* info, const char* name) {
  char found[64];
  size_t size = sizeof found;
  check(call<Status*>(87, info, name, &found[0], &size));
  return found;
}

inline size_t inputs(const Context* context) {
  size_t count = 0;
  check(call<Status*>(88, context, &count));
  return count;
}

inline const Value* input(const Context* context, size_t index) {
  const Value* found = nullptr;
  check(call<Status*>(90, context, index, &found));
  return found;
}

inline const uint8_t* bytes(const Value* value) {
  void* found = nullptr;
  check(call<Status*>(51, value, &found));
  return static_cast<const uint8_t*>(found);
}

template <class T>
const T* data(const Context* context, size_t index) {
  return reinterpret_cast<const T*>(bytes(input(context, index)));
}

// A tensor's sizes, where they are.
class Dims {
 public:
  static constexpr size_t kMost = 8;

  Dims() = default;
  Dims(std::initializer_list<int64_t> dims) {
    resize(dims.size());
    std::copy(dims.begin(), dims.end(), all_);
  }

  void resize(size_t rank) {
    if (rank > kMost) throw std::invalid_argument("a tensor of more than " + std::to_string(kMost) + " sizes");
    rank_ = rank;
  }
  size_t size() const { return rank_; }
  int64_t* data() { return all_; }
  const int64_t* data() const { return all_; }
  const int64_t* begin() const { return all_; }
  const int64_t* end() const { return all_ + rank_; }
  int64_t operator[](size_t index) const { return all_[index]; }
  int64_t back() const { return all_[rank_ - 1]; }
  bool operator==(const Dims& other) const { return std::equal(begin(), end(), other.begin(), other.end()); }
  bool operator!=(const Dims& other) const { return !(*this == other); }

 private:
  size_t rank_ = 0;
  int64_t all_[kMost] = {};
};

struct Shape {
  Type type = kUndefined;
  Dims dims;

  explicit Shape(const Value* value) {
    ShapeInfo* info = nullptr;
    check(call<Status*>(65, value, &info));
    size_t rank = 0;
    check(call<Status*>(60, info, &type));
    check(call<Status*>(61, info, &rank));
    dims.resize(rank);
    check(call<Status*>(62, info, dims.data(), rank));
    call<void>(99, info);
  }
};

template <class T>
T* output(Context* context, size_t index, const Dims& dims) {
  Value* found = nullptr;
  check(call<Status*>(91, context, index, dims.data(), dims.size(), &found));
  return reinterpret_cast<T*>(const_cast<uint8_t*>(bytes(found)));
}

// Runs task(0) .. task(count - 1) by the session's threads. What a task throws is thrown here, when all have ended.
template <class Task>
void parallel(const Context* context, size_t count, const Task& task) {
  if (count < 2) return count ? task(0) : void();
  struct All {
    const Task& task;
    std::mutex mutex;
    std::exception_ptr error;
  } all{task, {}, {}};
  void (*run)(void*, size_t) = [](void* given, size_t index) {
    All& all = *static_cast<All*>(given);
    try {
      all.task(index);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(all.mutex);
      all.error = std::current_exception();
    }
  };
  check(call<Status*>(274, context, run, count, size_t{0}, static_cast<void*>(&all)));
  if (all.error) std::rethrow_exception(all.error);
}

// Runs task(0) .. task(count - 1), so many of them one after the other as are worth starting a thread for.
template <class Task>
void parallel_in_groups(const Context* context, int64_t count, int64_t group, const Task& task) {
  parallel(context, (count + group - 1) / group, [&](size_t part) {
    const int64_t begin = part * group, end = begin + group < count ? begin + group : count;
    for (int64_t i = begin; i < end; i++) task(i);
  });
}

struct CustomOp {
  uint32_t version;
  void* (*create)(const CustomOp*, const Api*, const Info*);
  const char* (*name)(const CustomOp*);
  const char* (*provider)(const CustomOp*);
  Type (*input_type)(const CustomOp*, size_t);
  size_t (*input_count)(const CustomOp*);
  Type (*output_type)(const CustomOp*, size_t);
  size_t (*output_count)(const CustomOp*);
  void (*compute)(void*, Context*);
  void (*destroy)(void*);
  Characteristic (*input_characteristic)(const CustomOp*, size_t);
  Characteristic (*output_characteristic)(const CustomOp*, size_t);
  int (*input_memory)(const CustomOp*, size_t);
  int (*variadic_inputs)(const CustomOp*);
  int (*variadic_inputs_alike)(const CustomOp*);
  int (*variadic_outputs)(const CustomOp*);
  int (*variadic_outputs_alike)(const CustomOp*);
  Status* (*create_checked)(const CustomOp*, const Api*, const Info*, void**);
  Status* (*compute_checked)(void*, Context*);
  Status* (*infer_shape)(const CustomOp*, void*);
  int (*first_version)(const CustomOp*);
  int (*last_version)(const CustomOp*);
  size_t (*may_inplace)(int**, int**);
  void (*release_may_inplace)(int*, int*);
  size_t (*alias)(int**, int**);
  void (*release_alias)(int*, int*);
};

// What happens inside is told to onnxruntime, through which no exception may pass.
template <class Action>
Status* guarded(const Action& action) {
  try {
    action();
    return nullptr;
  } catch (const Failed& failed) {
    return failed.status;
  } catch (const std::exception& error) {
    return status(error.what());
  }
}

// A class with kName, kOutputs, a constructor of Info and compute(Context*), as an operator. Inputs are one list of any
// types: a node's are put together by this project.
template <class Kernel>
const CustomOp* op() {
  static const CustomOp made = [] {
    CustomOp op{};
    op.version = kVersion;
    op.name = [](const CustomOp*) { return Kernel::kName; };
    op.provider = [](const CustomOp*) -> const char* { return nullptr; };
    op.input_count = [](const CustomOp*) { return size_t{1}; };
    op.input_type = [](const CustomOp*, size_t) { return kUndefined; };
    op.input_characteristic = [](const CustomOp*, size_t) { return kVariadic; };
    op.input_memory = [](const CustomOp*, size_t) { return 0; };
    op.variadic_inputs = [](const CustomOp*) { return 1; };
    op.variadic_inputs_alike = [](const CustomOp*) { return 0; };
    op.output_count = [](const CustomOp*) { return std::size(Kernel::kOutputs); };
    op.output_type = [](const CustomOp*, size_t index) { return Kernel::kOutputs[index]; };
    op.output_characteristic = [](const CustomOp*, size_t) { return kRequired; };
    op.variadic_outputs = [](const CustomOp*) { return 1; };
    op.variadic_outputs_alike = [](const CustomOp*) { return 1; };
    op.create_checked = [](const CustomOp*, const Api*, const Info* info, void** made) {
      return guarded([&] { *made = new Kernel(info); });
    };
    op.compute_checked = [](void* kernel, Context* context) {
      return guarded([&] { static_cast<Kernel*>(kernel)->compute(context); });
    };
    op.destroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
    op.first_version = [](const CustomOp*) { return 1; };
    op.last_version = [](const CustomOp*) { return INT32_MAX; };
    return op;
  }();
  return &made;
}

inline Status* add(Domain* domain, const CustomOp* op) { return call<Status*>(27, domain, op); }

}  // namespace ort
