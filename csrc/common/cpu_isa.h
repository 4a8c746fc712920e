// Which kernels this process runs.
#pragma once

namespace unike {

enum class Isa { kBaseline, kAvx2, kAvx512, kAvx512Vnni, kAvx512Bf16 };

// The best that this CPU has, or what the environment variable UNIKE_ISA names ("baseline", "avx2", "avx512", "avx512vnni",
// "avx512bf16", each with all that come before), read at each call. Throws std::invalid_argument for an unknown name or one
// that this CPU lacks.
Isa active_isa();

}  // namespace unike

// The kernel `name` of the active ISA; UNIKE_PICK_NARROW for those that have one for narrow products too.
// UNIKE_ONLY_BASELINE: a core without the others, for tests that have to compile it.
#if defined(__x86_64__) && !defined(UNIKE_ONLY_BASELINE)
#define UNIKE_PICK(name)                                          \
  (::unike::active_isa() >= ::unike::Isa::kAvx512 ? name##_avx512 \
   : ::unike::active_isa() == ::unike::Isa::kAvx2 ? name##_avx2   \
                                                  : name##_baseline)
#define UNIKE_PICK_NARROW(name)                                             \
  (::unike::active_isa() == ::unike::Isa::kAvx512Bf16   ? name##_avx512bf16 \
   : ::unike::active_isa() == ::unike::Isa::kAvx512Vnni ? name##_avx512vnni \
                                                        : UNIKE_PICK(name))
#else
#define UNIKE_PICK(name) name##_baseline
#define UNIKE_PICK_NARROW(name) name##_baseline
#endif
