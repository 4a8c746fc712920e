/* What this machine can do at best: the bounds that a kernel's time is compared with. */
#ifndef UNIKE_MACHINE_H_
#define UNIKE_MACHINE_H_

#include "unike/cosine_topk.h"
#include "unike/unike.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Reads `bytes` bytes once, shared by the threads, and does next to nothing with them. */
UNIKE_API unike_status unike_read(const void* data, int64_t bytes, int threads);

/* Multiply-adds of registers, as a scan's products need them: `rounds` times some vector instructions on each thread. count: how
 * many multiply-adds all threads did. */
UNIKE_API unike_status unike_multiply_add(unike_scan scan, int64_t rounds, int threads, double* count);

#ifdef __cplusplus
}
#endif

#endif /* UNIKE_MACHINE_H_ */
