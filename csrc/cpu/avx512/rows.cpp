#include "cpu/kernels/rows.h"

namespace unike {

const RowKernels row_kernels_avx512 = row_kernels;

}  // namespace unike
