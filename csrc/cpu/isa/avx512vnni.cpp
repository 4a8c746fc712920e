#include "cpu/isa.h"
#include "cpu/kernels/scan.h"

namespace unike {

const Kernels kernels_avx512vnni{.scan = &scan, .fallback = &kernels_avx512};

}  // namespace unike
