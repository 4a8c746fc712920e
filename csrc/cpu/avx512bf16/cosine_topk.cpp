#include "cpu/kernels/cosine_topk.h"

namespace unike {

const ScanKernels scan_kernels_avx512bf16 = scan_kernels;

}  // namespace unike
