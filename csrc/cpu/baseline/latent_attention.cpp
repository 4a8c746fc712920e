#include "cpu/kernels/latent_attention.h"

namespace unike {

const LatentAttention latent_attention_baseline = latent_attention;

}  // namespace unike
