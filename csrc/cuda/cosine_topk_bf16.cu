#include "cuda/cosine_topk.cuh"
#include "cuda/kernels.h"

namespace unike::cuda {

const void* kernel_bf16(bool many) {
  return many ? reinterpret_cast<const void*>(&cosine_topk_kernel<UNIKE_SCAN_BF16, true>)
              : reinterpret_cast<const void*>(&cosine_topk_kernel<UNIKE_SCAN_BF16, false>);
}

}  // namespace unike::cuda
