// What the system should know about memory that is about to be written.
#pragma once

#include <cstddef>

namespace compressed_format {

// Memory that is new, or may be, and will be written whole: where it is large, the system is asked for large pages. It
// hands out new memory page by page as it is touched, and that takes several times as long as writing it if pages are
// small. Nothing else changes; a system that knows no such pages ignores it.
void expect_writes(void* memory, size_t bytes);

}  // namespace compressed_format
