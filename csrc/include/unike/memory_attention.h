/* Retrieval from a memory and the attention over what it finds, in one call (UniKE, Eq. 2 and 7). */
#ifndef UNIKE_MEMORY_ATTENTION_H_
#define UNIKE_MEMORY_ATTENTION_H_

#include "unike/cosine_topk.h"
#include "unike/latent_attention.h"
#include "unike/unike.h"

#ifdef __cplusplus
extern "C" {
#endif

/* unike_cosine_topk followed by unike_latent_attention with the ids that it found.
 *
 * hidden: [m, index->d], what retrieves; in->ids is ignored; in->k is the number of entries: more than memory->n cost no
 * more than that. ids: [m, k], written, -1 where there are no more entries, or null. */
UNIKE_API unike_status unike_memory_attention(const unike_keys* index, unike_rows hidden, const int64_t* ranges,
                                              const unike_latent_inputs* in, const unike_memory* memory,
                                              const unike_semantic_encoder* encoder, const unike_blend* blend,
                                              unike_rows_out out, float* alpha_out, int64_t* ids, void* workspace,
                                              int64_t workspace_bytes, int threads);
UNIKE_API int64_t unike_memory_attention_workspace(const unike_keys* index, const unike_latent_inputs* in,
                                                   const unike_memory* memory, const unike_semantic_encoder* encoder,
                                                   int threads);

#ifdef __cplusplus
}
#endif

#endif /* UNIKE_MEMORY_ATTENTION_H_ */
