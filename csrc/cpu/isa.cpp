#include "cpu/isa.h"

#include <cstdlib>
#include <cstring>

#if COMPRESSED_FORMAT_X86 && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace compressed_format {
namespace {

constexpr const char* names[] = {"portable", "avx2", "avx512", "amx"};

#if COMPRESSED_FORMAT_X86

// Linux hands out the tile registers, 8 KB to a thread, only to a process that asks for them.
bool may_use_tiles() {
#if defined(__linux__)
  constexpr long request_permission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr long tile_data = 18;               // XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}

// __builtin_cpu_supports also asks whether the operating system keeps the wide registers.
Isa highest() {
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c");
  if (!avx2) return Isa::portable;
  // What Zen 4, Sapphire Rapids and all after them have. Their predecessors lack bf16, or byte permutations.
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16") &&
                      __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2");
  if (!avx512) return Isa::avx2;
  const bool amx = __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
                   __builtin_cpu_supports("amx-int8") && may_use_tiles();
  return amx ? Isa::amx : Isa::avx512;
}

#else

Isa highest() { return Isa::portable; }

#endif

Isa choose() {
  const Isa found = highest();
  const char* const wanted = std::getenv("COMPRESSED_FORMAT_ISA");
  if (wanted == nullptr) return found;
  for (int level = 0; level <= static_cast<int>(found); ++level) {
    if (std::strcmp(wanted, names[level]) == 0) return static_cast<Isa>(level);
  }
  return found;  // the Python side has refused what is not in the list
}

}  // namespace

Isa isa() {
  static const Isa chosen = choose();
  return chosen;
}

const char* isa_name(Isa level) { return names[static_cast<int>(level)]; }

}  // namespace compressed_format
