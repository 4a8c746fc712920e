#include "cpu/kernels/latent_attention.h"

namespace unike {

const LatentAttention latent_attention_avx2 = latent_attention;

}  // namespace unike
