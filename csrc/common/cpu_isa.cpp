#include "common/cpu_isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "unike/unike.h"

namespace unike {
namespace {

constexpr const char* kNames[] = {"baseline", "avx2", "avx512", "avx512vnni", "avx512bf16"};

// The features of a level are exactly the compile flags of its folder in setup.py.
Isa detect() {
#if defined(__x86_64__) && !defined(UNIKE_ONLY_BASELINE)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
  if (vnni && __builtin_cpu_supports("avx512bf16")) return Isa::kAvx512Bf16;
  if (vnni) return Isa::kAvx512Vnni;
  if (avx512) return Isa::kAvx512;
  if (avx2) return Isa::kAvx2;
#endif
  return Isa::kBaseline;
}

}  // namespace

Isa active_isa() {
  static const Isa best = detect();
  const char* wanted = std::getenv("UNIKE_ISA");
  if (wanted == nullptr || *wanted == '\0') return best;
  for (const Isa isa : {Isa::kBaseline, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Vnni, Isa::kAvx512Bf16}) {
    if (std::string(wanted) != kNames[static_cast<int>(isa)]) continue;
    if (isa > best) throw std::invalid_argument("UNIKE_ISA names an instruction set that this CPU lacks");
    return isa;
  }
  throw std::invalid_argument("UNIKE_ISA must be baseline, avx2, avx512, avx512vnni or avx512bf16");
}

}  // namespace unike

extern "C" const char* unike_cpu_isa(void) {
  try {
    return unike::kNames[static_cast<int>(unike::active_isa())];
  } catch (const std::exception&) {
    return "invalid UNIKE_ISA";
  }
}
