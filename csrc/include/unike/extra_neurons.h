/* The extra key-value neurons of edited FFNs (UniKE, Eq. 3 and 6), added to the output of a base FFN. */
#ifndef UNIKE_EXTRA_NEURONS_H_
#define UNIKE_EXTRA_NEURONS_H_

#include "unike/unike.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum unike_activation UNIKE_ENUM {
  UNIKE_RELU = 0,
  UNIKE_GELU = 1,
  UNIKE_GELU_TANH = 2,
  UNIKE_SILU = 3,
  UNIKE_RELU2 = 4, /* the square of relu */
} unike_activation;

/* The neurons of all edits of a layer, and which row of the batch uses which edits. All arrays are contiguous. */
typedef struct unike_edit_pool {
  int64_t neurons, edits, rows; /* P, E, R */
  unike_dtype dtype;            /* of keys, up, values and zeta */
  const void* keys;             /* [P, d] */
  const float* key_bias;        /* [P] */
  const void* up;               /* [P, d] for gated neurons, or null */
  const float* up_bias;         /* [P], null where up is */
  const void* values;           /* [P, d] */
  const void* zeta;             /* [E, d] */
  const float* beta;            /* [E] */
  const int64_t*
      indptr; /* [E + 1], ascending from 0 to P at most: edit e owns neurons indptr[e], ..., indptr[e + 1] - 1 */
  const int64_t* row_indptr; /* [R + 1], ascending from 0 to the length of row_edits at most */
  const int64_t* row_edits;  /* row r uses row_edits[row_indptr[r]], ... in this order; each in 0..E-1, none twice */
  const int64_t* token_rows; /* [m], the row of each token; null: the m tokens belong to the R rows in equal runs */
} unike_edit_pool;

/* out = base + sum over the edits e of the token's row of o_e (V_e + beta_e zeta_e),
 * o_e = act(x K_e^T + b_e), times (x U_e^T + c_e) for gated neurons.
 *
 * A token whose row has no edit gets the bits of `base`. A token's result depends on x, base and its own row's edits
 * only, not on `threads`.
 * x, base, out: [m, d]; out has the dtype of base and may be base, or x. */
UNIKE_API unike_status unike_add_extra_neurons(unike_rows x, unike_rows base, int64_t m, int64_t d,
                                               const unike_edit_pool* pool, unike_activation activation,
                                               unike_rows_out out, void* workspace, int64_t workspace_bytes,
                                               int threads);
UNIKE_API int64_t unike_add_extra_neurons_workspace(int64_t m, int64_t d, const unike_edit_pool* pool, int threads);

/* Gradients in float32, contiguous, of the shapes of what they belong to; up and up_bias null where the pool's are. */
typedef struct unike_extra_gradients {
  float *x, *keys, *key_bias, *up, *up_bias, *values, *zeta, *beta;
} unike_extra_gradients;

/* The gradients of the extra neurons for `grad`, [m, d], that of out. Sums over tokens are taken in their order; without
 * tokens they are zeros. */
UNIKE_API unike_status unike_add_extra_neurons_backward(unike_rows grad, unike_rows x, int64_t m, int64_t d,
                                                        const unike_edit_pool* pool, unike_activation activation,
                                                        const unike_extra_gradients* out, void* workspace,
                                                        int64_t workspace_bytes, int threads);
UNIKE_API int64_t unike_add_extra_neurons_backward_workspace(int64_t m, int64_t d, const unike_edit_pool* pool,
                                                             int threads);

#ifdef __cplusplus
}
#endif

#endif /* UNIKE_EXTRA_NEURONS_H_ */
