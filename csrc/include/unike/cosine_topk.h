/* Exact cosine top-k over float32 rows, and the packed copies of the rows that make its scan fast.
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
 * x: [rows, d]; out: [rows, d], contiguous, not overlapping x; d >= 1. */
UNIKE_API unike_status unike_normalize_rows(unike_rows x, int64_t rows, int64_t d, float* out, int threads);

/* What the scan reads of each key. The result is the same with all of them. */
typedef enum unike_scan UNIKE_ENUM {
  UNIKE_SCAN_F32 = 0, /* the rows themselves, nothing packed */
  UNIKE_SCAN_F16 = 1,
  UNIKE_SCAN_BF16 = 2,
  UNIKE_SCAN_I8 = 3, /* d <= 65536 */
} unike_scan;

/* What the keys are in a few directions: where these hold most of the keys, few queries read this of all keys, and the codes
 * of some. The result is the same without it. */
typedef struct unike_leading {
  int64_t p;               /* directions, a multiple of 64; 0: there is nothing of this */
  const float* directions; /* [1 + p, d]: `direction` of the keys, then others; see unike_pack_leading */
  const void* codes;       /* [ceil(n / 64), p / 4, 64, 4] bytes: four codes of 64 keys, then their next four */
  const float* bounds;     /* [ceil(n / 64), UNIKE_LEADING_BOUNDS, 64] */
} unike_leading;

#define UNIKE_LEADING_BOUNDS 5

/* The keys of a search: normalised finite rows, and for all scans but UNIKE_SCAN_F32 what unike_pack_keys made of them. */
typedef struct unike_keys {
  int64_t n, d;
  const float* rows; /* [n, d]; null: scores are those of the scan, not canonical, and the k keys may be others */
  int64_t stride;    /* of the rows, in elements, >= 0 */
  unike_scan scan;
  const void* codes;      /* [n, unike_code_bytes(scan, d)] bytes */
  const float* bounds;    /* [n, UNIKE_KEY_BOUNDS] */
  const float* direction; /* [d] */
  unike_leading leading;  /* for UNIKE_SCAN_I8 with rows, else of p = 0 */
} unike_keys;

#define UNIKE_KEY_BOUNDS 4

/* Bytes of a packed key, a multiple of 64; 0 for UNIKE_SCAN_F32. */
UNIKE_API int64_t unike_code_bytes(unike_scan scan, int64_t d);

/* Packs rows, one by one: keys that come later are packed alike, with the same direction.
 *
 * rows: [n, d] normalised and finite. direction: [d], of norm 1 or all zero; any will do, but the scan rules out more if
 * the keys share it: take their normalised mean. codes, bounds: as in unike_keys. */
UNIKE_API unike_status unike_pack_keys(const float* rows, int64_t n, int64_t d, int64_t stride, unike_scan scan,
                                       const float* direction, void* codes, float* bounds, void* workspace,
                                       int64_t workspace_bytes, int threads);
UNIKE_API int64_t unike_pack_keys_workspace(int64_t d, int threads);

/* Fills in codes and bounds of a unike_leading for the keys first, ..., first + n - 1; those of others stay as they are.
 *
 * rows: [n, d], of these keys, as in unike_pack_keys. directions: [1 + p, d]; all of norm 1 and at right angles to each other, but for the
 * first, which may be zero: their products with each other are off by at most 2^-19 in the root of the sum of the squares. */
UNIKE_API unike_status unike_pack_leading(const float* rows, int64_t first, int64_t n, int64_t d, int64_t stride,
                                          int64_t p, const float* directions, void* codes, float* bounds, int threads);
/* Bytes of the codes of n keys; -1 with unike_last_error() for sizes that cannot be. */
UNIKE_API int64_t unike_leading_bytes(int64_t n, int64_t p);

/* The k best keys of each query by score = float32(canonical dot product of the normalised query and the key), -0.0
 * counted and returned as 0.0.
 *
 * Best first: score descending, then id (the key's row) ascending. Where fewer than k keys are in range, the rest is
 * id -1 and score -inf; a query with a NaN or an infinity gets nothing else.
 * queries: [m, d], of any norm. m, n, k may be 0.
 * ranges: null, or [m, 2] int64 with 0 <= start <= stop <= n: query i sees the keys start, ..., stop - 1.
 * scores: [m, k] float32; ids: [m, k] int64; both contiguous. The work and the workspace are those of min(k, n). The result does not depend on `threads`. */
UNIKE_API unike_status unike_cosine_topk(const unike_keys* keys, unike_rows queries, int64_t m, int64_t k,
                                         const int64_t* ranges, float* scores, int64_t* ids, void* workspace,
                                         int64_t workspace_bytes, int threads);
UNIKE_API int64_t unike_cosine_topk_workspace(const unike_keys* keys, int64_t m, int64_t k, int threads);

#ifdef __cplusplus
}
#endif

#endif /* UNIKE_COSINE_TOPK_H_ */
