// What the C ABI of the latent attention hands to the kernel of an ISA.
#pragma once

#include "unike/latent_attention.h"

namespace unike {

struct LatentProblem {
  const float* queries;
  const float* inputs;
  int64_t inputs_stride;
  int64_t m, d;
  const unike_memory_f32* memory;
  const int64_t* ids;
  int64_t id_rows, k;
  const unike_semantic_encoder_f32* encoder;
  const unike_blend* blend;
  float* out;
  int64_t out_stride;
  float* alpha_out;

  // Tokens that share a pass over the encoder's weights, and the floats of scratch that they need.
  static constexpr int64_t kTokens = 4;
  int64_t scratch() const { return k + kTokens * (2 * d + encoder->r); }
};

// Tokens start, ..., stop - 1, at most kTokens of them.
using LatentAttention = void (*)(const LatentProblem&, int64_t start, int64_t stop, float* scratch);

extern const LatentAttention latent_attention_baseline, latent_attention_avx2, latent_attention_avx512;

}  // namespace unike
