#include "cuda/cosine_topk.cuh"
#include "cuda/kernels.h"

namespace unike::cuda {

const void* kernel_f16(bool many, bool ranged) { return kernel_of<UNIKE_SCAN_F16>(many, ranged); }

}  // namespace unike::cuda
