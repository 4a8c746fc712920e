#include "cuda/cosine_topk.cuh"
#include "cuda/kernels.h"

namespace unike::cuda {

const void* kernel_i8(bool many) {
  return many ? reinterpret_cast<const void*>(&cosine_topk_kernel<UNIKE_SCAN_I8, true>)
              : reinterpret_cast<const void*>(&cosine_topk_kernel<UNIKE_SCAN_I8, false>);
}

}  // namespace unike::cuda
