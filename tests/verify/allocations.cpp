// Loaded before a process's libraries: counts what code of one of them, named by $COUNTED, allocates while it is asked to.
#include <dlfcn.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

namespace {

bool counting = false;
size_t counted = 0;

void* allocate(size_t size, size_t alignment, void* caller) {
  Dl_info found;
  if (counting && dladdr(caller, &found) && !std::strcmp(found.dli_fname, std::getenv("COUNTED"))) counted++;
  void* memory = std::aligned_alloc(alignment, (size + alignment - 1) / alignment * alignment);
  if (!memory) throw std::bad_alloc();
  return memory;
}

}  // namespace

extern "C" void count_allocations(bool on) { counting = on; }
extern "C" size_t counted_allocations() { return counted; }

void* operator new(size_t size) { return allocate(size, 16, __builtin_return_address(0)); }
void* operator new[](size_t size) { return allocate(size, 16, __builtin_return_address(0)); }
void* operator new(size_t size, std::align_val_t of) { return allocate(size, size_t(of), __builtin_return_address(0)); }
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, size_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::align_val_t) noexcept { std::free(memory); }
void operator delete(void* memory, size_t, std::align_val_t) noexcept { std::free(memory); }
