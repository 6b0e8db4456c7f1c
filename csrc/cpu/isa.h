// Which vector instructions kernels may use on this machine.
#pragma once

namespace compressed_format {

// Each level includes those before it. What a level needs is listed in isa.cpp.
enum class Isa { portable, avx2, avx512, amx };

// The highest level that this processor and its operating system run, or the lower one that the environment variable
// COMPRESSED_FORMAT_ISA names. Found once; it never changes while a process runs.
Isa isa();

// "portable", "avx2", "avx512" or "amx".
const char* isa_name(Isa level);

// One and the same kernel for each level; null where a level has none of its own and runs that of the one below.
template <typename Function>
struct ByIsa {
  Function* portable = nullptr;
  Function* avx2 = nullptr;
  Function* avx512 = nullptr;
  Function* amx = nullptr;

  // The kernel to call on this machine; null where there is none at all.
  Function* get() const {
    Function* found = portable;
    if (isa() >= Isa::avx2 && avx2 != nullptr) found = avx2;
    if (isa() >= Isa::avx512 && avx512 != nullptr) found = avx512;
    if (isa() >= Isa::amx && amx != nullptr) found = amx;
    return found;
  }
};

}  // namespace compressed_format

// Kernels for x86-64 are compiled by compilers that know its vector types and flags; elsewhere there are only the
// portable ones, and the others must not be named.
#if (defined(__x86_64__) && defined(__GNUC__))
#define COMPRESSED_FORMAT_X86 1
#define COMPRESSED_FORMAT_BY_ISA(name) \
  { name##_portable, name##_avx2, name##_avx512, nullptr }
#define COMPRESSED_FORMAT_BY_ISA_WITH_AMX(name) \
  { name##_portable, name##_avx2, name##_avx512, name##_amx }
#else
#define COMPRESSED_FORMAT_X86 0
#define COMPRESSED_FORMAT_BY_ISA(name) \
  { name##_portable, nullptr, nullptr, nullptr }
#define COMPRESSED_FORMAT_BY_ISA_WITH_AMX(name) COMPRESSED_FORMAT_BY_ISA(name)
#endif
