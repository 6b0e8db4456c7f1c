#include "cpu/scratch.h"

#include <memory>
#include <new>

namespace compressed_format {
namespace {

constexpr std::align_val_t alignment{64};

struct Release {
  void operator()(void* memory) const { ::operator delete(memory, alignment); }
};

struct Buffer {
  std::unique_ptr<void, Release> memory;
  size_t size = 0;
};

}  // namespace

void* scratch(Scratch purpose, size_t bytes) {
  thread_local Buffer buffers[2];
  Buffer& buffer = buffers[static_cast<int>(purpose)];
  if (buffer.size < bytes || buffer.memory == nullptr) {
    buffer.memory.reset();  // first, so that both are never held at once
    buffer.size = 0;
    buffer.memory.reset(::operator new(bytes + (bytes == 0), alignment));
    buffer.size = bytes;
  }
  return buffer.memory.get();
}

}  // namespace compressed_format
