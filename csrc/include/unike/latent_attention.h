/* Attention over retrieved memory entries, the alpha gate and the blend into the attention output (UniKE, Eq. 2 and 7). */
#ifndef UNIKE_LATENT_ATTENTION_H_
#define UNIKE_LATENT_ATTENTION_H_

#include "unike/unike.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Enc_sem: w2 gelu(w1 x + b1) + b2. All arrays are contiguous. */
typedef struct unike_semantic_encoder {
  int64_t r;
  unike_dtype dtype; /* of w1 and w2 */
  const void* w1;    /* [r, d]; may be null where the memory has `projected` */
  const float* b1;   /* [r] */
  const void* w2;    /* [d, r] */
  const float* b2;   /* [d] */
} unike_semantic_encoder;

/* The memory's tables, contiguous; `values` may be `keys` where heads * width == d. */
typedef struct unike_memory {
  int64_t n, heads, width;
  unike_dtype dtype;      /* of keys and values */
  const void* keys;       /* [n, heads, width] */
  const void* values;     /* [n, heads, d] */
  const float* projected; /* [n, heads, r]: values w1^T, so that w1 is not read for each token; or null */
} unike_memory;

typedef struct unike_blend {
  float scale;        /* of the attention logits */
  int eq7;            /* 0: (1 - alpha) h + alpha h_know; 1: alpha h + (1 - alpha) h_know */
  int match_norm;     /* 1: h_know is rescaled to |h| after alpha is computed */
  const float* alpha; /* null: the gate is computed; else given, alphas values: 1 or m */
  int64_t alphas;
  const float* anchor; /* null: the gate compares with the token's own h; else [anchors, d], m / anchors tokens each */
  int64_t anchors;
} unike_blend;

/* What comes in: m tokens of d values. */
typedef struct unike_latent_inputs {
  int64_t m, d;
  unike_rows queries; /* [m, heads * width] */
  unike_rows inputs;  /* h: [m, d] */
  const int64_t* ids; /* [id_rows, k] contiguous, each -1 or in 0..n-1; m / id_rows tokens share a row */
  int64_t id_rows, k;
} unike_latent_inputs;

/* For each token: h_know = sum over heads of softmax(scale q K^T) V over its entries, alpha = clamp(cos(Enc_sem(h_know),
 * anchor), 0, 1), out = the blend of h and h_know.
 *
 * A token whose ids are all -1 gets the bits of h, and alpha 0. A token's result depends on its own inputs only, not on
 * the others and not on `threads`.
 * encoder: its arrays are needed where alpha is computed, and may be null elsewhere.
 * out: [m, d] in the dtype of inputs, may be inputs; alpha_out: [m], or null. */
UNIKE_API unike_status unike_latent_attention(const unike_latent_inputs* in, const unike_memory* memory,
                                              const unike_semantic_encoder* encoder, const unike_blend* blend,
                                              unike_rows_out out, float* alpha_out, void* workspace,
                                              int64_t workspace_bytes, int threads);
UNIKE_API int64_t unike_latent_attention_workspace(const unike_latent_inputs* in, const unike_memory* memory,
                                                   const unike_semantic_encoder* encoder, int threads);

/* The gradients of unike_latent_attention for those of its results; memory and encoder are constants.
 *
 * grad: [m, d], of out; grad_alpha: [m], of alpha_out. grad_queries: [m, heads * width] and grad_inputs: [m, d], float32.
 * grad_given: [m], of a given alpha, summed by the caller where it has one value; null where alpha is computed.
 * grad_anchor: [m, d], of each token's anchor, summed by the caller over the tokens that share it; null without one. */
UNIKE_API unike_status unike_latent_attention_backward(const unike_latent_inputs* in, const unike_memory* memory,
                                                       const unike_semantic_encoder* encoder, const unike_blend* blend,
                                                       unike_rows grad, const float* grad_alpha, float* grad_queries,
                                                       float* grad_inputs, float* grad_given, float* grad_anchor,
                                                       void* workspace, int64_t workspace_bytes, int threads);
UNIKE_API int64_t unike_latent_attention_backward_workspace(const unike_latent_inputs* in, const unike_memory* memory,
                                                            const unike_semantic_encoder* encoder, int threads);

#ifdef __cplusplus
}
#endif

#endif /* UNIKE_LATENT_ATTENTION_H_ */
