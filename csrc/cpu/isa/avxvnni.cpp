#include "cpu/isa.h"
#include "cpu/kernels/scan.h"

namespace unike {

const Kernels kernels_avxvnni{.scan = &scan, .fallback = &kernels_avx2};

}  // namespace unike
