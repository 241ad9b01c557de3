// Memory of CPU tensors, from malloc instead of posix_memalign: see tensor_memory.py for why.
//
// A block is 64 bytes longer than was asked for; the tensor begins at the first multiple of 64 in
// it, and the word before the tensor is the address of the block.

#include <c10/core/CPUAllocator.h>

#include <cstdint>
#include <cstdlib>

namespace {

constexpr size_t kAlignment = 64;  // as torch aligns its own

void release(void* tensor) {
  if (!tensor) return;
  c10::profiledCPUMemoryReporter().Delete(tensor);
  std::free(static_cast<void**>(tensor)[-1]);
}

void* aligned(size_t bytes) {
  void* block = bytes > PTRDIFF_MAX - kAlignment ? nullptr : std::malloc(bytes + kAlignment);
  TORCH_CHECK(block, "can't allocate memory: you tried to allocate ", bytes, " bytes");
  uintptr_t start = (reinterpret_cast<uintptr_t>(block) / kAlignment + 1) * kAlignment;
  void* tensor = reinterpret_cast<void*>(start);  // 16 bytes or more behind the block's start
  static_cast<void**>(tensor)[-1] = block;
  c10::profiledCPUMemoryReporter().New(tensor, bytes);
  return tensor;
}

struct FromMalloc final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* tensor = bytes ? aligned(bytes) : nullptr;
    return {tensor, tensor, &release, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
};

}  // namespace

extern "C" void use_malloc() {
  static FromMalloc* from_malloc = new FromMalloc;  // never destroyed: the last tensors outlive statics
  c10::SetCPUAllocator(from_malloc, /*priority=*/1);
}
