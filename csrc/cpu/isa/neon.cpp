#include "cpu/isa.h"
#include "cpu/kernels/rows.h"
#include "cpu/kernels/scan.h"

namespace unike {

const Kernels kernels_neon{&scan, &rows};

}  // namespace unike
