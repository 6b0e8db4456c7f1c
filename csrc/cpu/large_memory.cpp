#include "cpu/large_memory.h"

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace compressed_format {

void expect_writes(void* memory, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  // A few large pages of 2 MB: below that the memory is likely to have been in use before.
  constexpr size_t worth_asking = size_t{8} << 20;
  if (bytes < worth_asking) return;
  static const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  // Only pages that belong to this memory alone.
  const auto first = (reinterpret_cast<uintptr_t>(memory) + page - 1) / page * page;
  const auto last = (reinterpret_cast<uintptr_t>(memory) + bytes) / page * page;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  static_cast<void>(memory);
  static_cast<void>(bytes);
#endif
}

}  // namespace compressed_format
