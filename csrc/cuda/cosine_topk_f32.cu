#include "cuda/cosine_topk.cuh"
#include "cuda/kernels.h"

namespace unike::cuda {

const void* kernel_f32(bool many, bool ranged) { return kernel_of<UNIKE_SCAN_F32>(many, ranged); }

}  // namespace unike::cuda
