#include "cuda/cosine_topk.cuh"
#include "cuda/kernels.h"

namespace unike::cuda {

const void* kernel_i8(bool many, bool ranged) { return kernel_of<UNIKE_SCAN_I8>(many, ranged); }

}  // namespace unike::cuda
