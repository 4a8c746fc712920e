#include "cpu/isa.h"
#include "cpu/kernels/scan.h"

namespace unike {

const Kernels kernels_i8mm{.scan = &scan, .fallback = &kernels_neon};

}  // namespace unike
