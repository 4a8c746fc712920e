// The kernels for any machine: SSE2 on x86-64, AdvSIMD on aarch64, without fused multiply-adds.
#include "cpu/isa.h"
#include "cpu/kernels/rows.h"
#include "cpu/kernels/scan.h"

namespace unike {

const Kernels kernels_baseline{&scan, &rows};

}  // namespace unike
