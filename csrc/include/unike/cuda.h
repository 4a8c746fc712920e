/* The search of cosine_topk.h on a CUDA device: the same results, bit for bit.
 *
 * All pointers but those of structs are to memory of the device. Calls are put into a stream and return at once: they
 * allocate nothing, wait for nothing, and may be captured into a CUDA graph. A library that was built without CUDA has
 * these functions too; they fail, and say so. */
#ifndef UNIKE_CUDA_H_
#define UNIKE_CUDA_H_

#include "unike/cosine_topk.h"
#include "unike/unike.h"

#ifdef __cplusplus
extern "C" {
#endif

/* How many CUDA devices there are; fails where there is none, no driver, or no CUDA in this build. */
UNIKE_API unike_status unike_cuda_devices(int* count);

/* unike_cosine_topk, and the values of the keys that were found.
 *
 * keys: as for the CPU, packed there; rows, codes, bounds and direction on the device, rows and codes aligned to 16 bytes.
 * For UNIKE_SCAN_F32 the stride of the rows is a multiple of 4, and the columns that fill up the last four are finite.
 * UNIKE_SCAN_I8 scans the codes for up to 8 queries; more scan the rows, where those are there and d and their stride are
 * multiples of 4.
 * queries, ranges, scores, ids: as there. A range that is not one of the keys cannot be an error: that query gets ids -1
 * and scores NaN.
 * values: null, or [n, value_bytes] bytes; gathered: [m, k, value_bytes], row i of a query that of its i-th key, zeros
 * where it has none.
 * state: UNIKE_CUDA_STATE_BYTES, aligned to as many, by which the blocks of a launch find one another. Zero before its
 * first call; what a call leaves there is right for the next one, of any arguments. So a graph has nothing to zero.
 * workspace: what it holds before is nothing to a call. Calls with one state, or with one workspace, come one after the
 * other.
 * One kernel for up to 1024 queries, fewer where k is large and a launch's lists would exceed 128 MB. */
UNIKE_API unike_status unike_cuda_cosine_topk(const unike_keys* keys, unike_rows queries, int64_t m, int64_t k,
                                              const int64_t* ranges, float* scores, int64_t* ids, const void* values,
                                              int64_t value_bytes, void* gathered, void* state, void* workspace,
                                              int64_t workspace_bytes, int device, void* stream);
UNIKE_API int64_t unike_cuda_cosine_topk_workspace(const unike_keys* keys, int64_t m, int64_t k, int device);

#define UNIKE_CUDA_STATE_BYTES 64

#ifdef __cplusplus
}
#endif

#endif /* UNIKE_CUDA_H_ */
