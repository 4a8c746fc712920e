#include "cpu/kernels/cosine_topk.h"

namespace unike {

const ScanKernels scan_kernels_baseline = scan_kernels;

}  // namespace unike
