/* Exact cosine top-k over float32 rows.
 *
 * Canonical arithmetic, the same bit for bit in every implementation: a sum over i < d of float64 products of float32
 * values is taken in 16 lanes, each starting from 0.0; lane j adds the terms i = j, j + 16, j + 32, ... in this order;
 * then lane[j] += lane[j + w] for j < w with w = 8, 4, 2, 1, and the sum is lane[0]. */
#ifndef UNIKE_COSINE_TOPK_H_
#define UNIKE_COSINE_TOPK_H_

#include "unike/unike.h"

#ifdef __cplusplus
extern "C" {
#endif

/* out[r, i] = float32(float64(x[r, i]) / sqrt(s)), with s the canonical sum of the squares of row r.
 *
 * A row of zeros gives zeros; a row with a NaN or an infinity gives NaNs only.
 * x: [rows, d], row_stride >= 0, in elements; out: [rows, d], contiguous, not overlapping x; d >= 1. */
UNIKE_API unike_status unike_normalize_rows_f32(const float* x, int64_t rows, int64_t d, int64_t row_stride, float* out,
                                                int threads);

/* The k best keys of each query by score = float32(canonical dot product), -0.0 counted and returned as 0.0.
 *
 * Best first: score descending, then id (the key's row) ascending. Where fewer than k keys are in range, the rest is
 * id -1 and score -inf; a query with a NaN or an infinity gets nothing else.
 * queries: [m, d], keys: [n, d], both normalised, keys finite; strides >= 0, in elements. d >= 1; m, n, k may be 0.
 * bounds: null, or [m, 2] int64 with 0 <= start <= stop <= n: query i sees the keys start, ..., stop - 1.
 * scores: [m, k] float32; ids: [m, k] int64; both contiguous. The result does not depend on `threads`. */
UNIKE_API unike_status unike_cosine_topk_f32(const float* queries, int64_t m, int64_t q_stride, const float* keys,
                                             int64_t n, int64_t k_stride, int64_t d, int64_t k, const int64_t* bounds,
                                             float* scores, int64_t* ids, int threads);

#ifdef __cplusplus
}
#endif

#endif /* UNIKE_COSINE_TOPK_H_ */
