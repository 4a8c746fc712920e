/* Attention over retrieved memory entries, the alpha gate and the blend into the attention output (UniKE, Eq. 2 and 7). */
#ifndef UNIKE_LATENT_ATTENTION_H_
#define UNIKE_LATENT_ATTENTION_H_

#include "unike/unike.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Enc_sem: w2 gelu(w1 x + b1) + b2. All arrays are contiguous. */
typedef struct unike_semantic_encoder_f32 {
  int64_t r;
  const float* w1; /* [r, d] */
  const float* b1; /* [r] */
  const float* w2; /* [d, r] */
  const float* b2; /* [d] */
} unike_semantic_encoder_f32;

/* The memory's tables, contiguous; `values` may be `keys` where heads * width == d. */
typedef struct unike_memory_f32 {
  int64_t n, heads, width;
  const float* keys;   /* [n, heads, width] */
  const float* values; /* [n, heads, d] */
} unike_memory_f32;

typedef struct unike_blend {
  float scale;        /* of the attention logits */
  int eq7;            /* 0: (1 - alpha) h + alpha h_know; 1: alpha h + (1 - alpha) h_know */
  int match_norm;     /* 1: h_know is rescaled to |h| after alpha is computed */
  const float* alpha; /* null: the gate is computed; else given, alphas values: 1 or m */
  int64_t alphas;
  const float* anchor; /* null: the gate compares with the token's own h; else [anchors, d], m / anchors tokens each */
  int64_t anchors;
} unike_blend;

/* For each token: h_know = sum over heads of softmax(scale q K^T) V over its entries, alpha = clamp(cos(Enc_sem(h_know),
 * anchor), 0, 1), out = the blend of h and h_know.
 *
 * A token whose ids are all -1 gets the bits of h, and alpha 0. No result depends on `threads`.
 * queries: [m, heads, width] contiguous; inputs h: [m, d] and out: [m, d], row strides in elements; out may be inputs.
 * ids: [id_rows, k] contiguous, each -1 or in 0..n-1; m / id_rows tokens share a row. alpha_out: [m]. */
UNIKE_API unike_status unike_latent_attention_f32(const float* queries, const float* inputs, int64_t inputs_stride,
                                                  int64_t m, int64_t d, const unike_memory_f32* memory,
                                                  const int64_t* ids, int64_t id_rows, int64_t k,
                                                  const unike_semantic_encoder_f32* encoder, const unike_blend* blend,
                                                  float* out, int64_t out_stride, float* alpha_out, int threads);

#ifdef __cplusplus
}
#endif

#endif /* UNIKE_LATENT_ATTENTION_H_ */
