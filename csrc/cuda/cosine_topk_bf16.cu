#include "cuda/cosine_topk.cuh"
#include "cuda/kernels.h"

namespace unike::cuda {

const void* kernel_bf16(bool many, bool ranged) { return kernel_of<UNIKE_SCAN_BF16>(many, ranged); }

}  // namespace unike::cuda
