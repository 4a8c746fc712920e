#include "cpu/isa.h"
#include "cpu/kernels/rows.h"
#include "cpu/kernels/scan.h"

namespace unike {

const Kernels kernels_avx512{&scan, &rows};

}  // namespace unike
