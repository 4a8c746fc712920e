#include "cpu/isa.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "common/status.h"
#include "unike/unike.h"

namespace unike {
namespace {

struct Level {
  const char* name;
  bool (*is_here)();  // whether this machine has what its compile flags in setup.py ask for
  const Kernels* kernels;
};

#if defined(__x86_64__) && !defined(UNIKE_ONLY_BASELINE)
bool has_f16c() {  // clang has no name for it before 19
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
}
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c(); }
bool has_avxvnni() {
  unsigned a, b, c, d;
  return has_avx2() && __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a & 1u << 4) != 0;
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }
bool has_bf16() { return has_vnni() && __builtin_cpu_supports("avx512bf16"); }
// Linux keeps the tile registers of processes alone that ask for them.
bool has_amx() {
#if defined(__linux__)
  constexpr unsigned kTileAndInt8 = 1u << 24 | 1u << 25;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned a, b, c, d;
  return has_bf16() && __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d & kTileAndInt8) == kTileAndInt8 &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#elif defined(__aarch64__) && !defined(UNIKE_ONLY_BASELINE)
#if defined(__linux__)
bool has_dotprod() { return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0; }
bool has_i8mm() { return has_dotprod() && (getauxval(AT_HWCAP2) & HWCAP2_I8MM) != 0; }
#elif defined(__APPLE__)
bool has_feature(const char* name) {
  int value = 0;
  size_t size = sizeof value;
  return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value != 0;
}
bool has_dotprod() { return has_feature("hw.optional.arm.FEAT_DotProd"); }
bool has_i8mm() { return has_dotprod() && has_feature("hw.optional.arm.FEAT_I8MM"); }
#else
bool has_dotprod() { return false; }
bool has_i8mm() { return false; }
#endif
#endif

// Where a machine has several, the last one is taken. UNIKE_ONLY_BASELINE: a core without the others, for tests that
// have to compile it.
constexpr Level kLevels[] = {
    {"baseline", [] { return true; }, &kernels_baseline},
#if defined(UNIKE_ONLY_BASELINE)
#elif defined(__x86_64__)
    {"avx2", has_avx2, &kernels_avx2},
    {"avxvnni", has_avxvnni, &kernels_avxvnni},
    {"avx512", has_avx512, &kernels_avx512},
    {"avx512vnni", has_vnni, &kernels_avx512vnni},
    {"avx512bf16", has_bf16, &kernels_avx512bf16},
    {"amx", has_amx, &kernels_amx},
#elif defined(__aarch64__)
    {"neon", [] { return true; }, &kernels_neon},
    {"dotprod", has_dotprod, &kernels_dotprod},
    {"i8mm", has_i8mm, &kernels_i8mm},
#endif
};

// The level of this name; null: the default of the machine. `source` names the name in the message.
const Level& find(const char* source, const char* name) {
  const Level* last = nullptr;
  std::string known, here;
  for (const Level& level : kLevels) {
    known += (known.empty() ? "" : ", ") + std::string(level.name);
    if (!level.is_here()) continue;
    here += (here.empty() ? "" : ", ") + std::string(level.name);
    last = &level;
    if (name != nullptr && std::strcmp(name, level.name) == 0) return level;
  }
  if (name == nullptr) return *last;
  throw std::invalid_argument(std::string(source) + ": expected an instruction set that this CPU has (" + here +
                              ") of those that there are kernels for (" + known + "), got \"" +
                              std::string(name).substr(0, 32) + "\"");
}

const Level& of_environment() {
  const char* name = std::getenv("UNIKE_ISA");
  return find("UNIKE_ISA", name != nullptr && *name == '\0' ? nullptr : name);
}

std::atomic<const Level*> chosen{nullptr};  // null: nobody has asked yet

const Level& active() {
  const Level* level = chosen.load(std::memory_order_acquire);
  if (level != nullptr) return *level;
  const Level& found = of_environment();
  return chosen.compare_exchange_strong(level, &found) ? found : *level;
}

template <typename Set>
const Set& active_kernels(const Set* Kernels::* set) {
  const Kernels* kernels = active().kernels;
  while (kernels->*set == nullptr) kernels = kernels->fallback;
  return *(kernels->*set);
}

}  // namespace

const ScanKernels& scan_kernels() { return active_kernels(&Kernels::scan); }
const RowKernels& row_kernels() { return active_kernels(&Kernels::rows); }

}  // namespace unike

extern "C" const char* unike_cpu_isa(void) {
  try {
    return unike::active().name;
  } catch (const std::exception&) {
    return "invalid UNIKE_ISA";
  }
}

extern "C" const char* unike_available_isa(int index) {
  for (const unike::Level& level : unike::kLevels) {
    if (level.is_here() && index-- == 0) return level.name;
  }
  return nullptr;
}

extern "C" unike_status unike_set_isa(const char* name) {
  using namespace unike;
  return guarded([&] { chosen = &(name == nullptr ? of_environment() : find("isa", name)); });
}
