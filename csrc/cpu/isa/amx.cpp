#include "cpu/isa.h"
#include "cpu/kernels/scan.h"

namespace unike {

const Kernels kernels_amx{.scan = &scan, .fallback = &kernels_avx512};

}  // namespace unike
