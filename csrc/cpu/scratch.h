// Memory that kernels work in: kept by each thread from call to call, so that none is allocated in the hot path.
#pragma once

#include <cstddef>

namespace compressed_format {

// What the memory is for. A thread that has made something for all threads of a call goes on to work itself, and must
// not write over it.
enum class Scratch { for_all_threads, for_this_thread };

// At least `bytes` bytes at a multiple of 64, whose content is anything. They are valid until the same thread asks for
// the same purpose again. Throws std::bad_alloc.
void* scratch(Scratch purpose, size_t bytes);

}  // namespace compressed_format
