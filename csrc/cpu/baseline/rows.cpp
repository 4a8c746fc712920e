#include "cpu/kernels/rows.h"

namespace unike {

const RowKernels row_kernels_baseline = row_kernels;

}  // namespace unike
