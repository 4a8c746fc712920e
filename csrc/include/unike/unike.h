/* What all headers of the native core share: the version, the status of a call, and what the CPU can do.
 *
 * A C ABI without Python or torch: plain pointers, sizes, row strides in elements, an explicit number of threads, and a
 * workspace for all that a call needs beside its arguments. No function throws or keeps a pointer after it returns, and
 * only unike_set_isa() leaves anything behind; all may be called concurrently.
 *
 * Arguments are checked, and UNIKE_INVALID_ARGUMENT with a message that names one is the answer to: null where there are
 * elements (an array of none may be null), a pointer that is not aligned to the size of its elements, an enum of no name, a
 * negative size or stride, a product of sizes that no memory has room for (2^48 bytes), a number in an index list that is
 * out of its range or repeated, written rows that overlap one another, and written rows that partly share memory with
 * the rows that are read (x, base, inputs, queries, an anchor). Where a function says that an output may be an input, it has
 * the same address, stride and dtype. What an array holds beyond its stated size cannot be seen, and other outputs must
 * share no memory with anything else. A call without tokens needs no workspace.
 *
 * Threads are those of OpenMP; fewer than 1 count as 1, more than 1024 as 1024. A workspace is memory of any alignment
 * and content, at least as large as the function named like the operation with `_workspace` says for the same arguments
 * (0: the call will refuse them); it is free again when the call returns. A smaller one is refused before any result is
 * written, so that a caller may try with what it has. */
#ifndef UNIKE_UNIKE_H_
#define UNIKE_UNIKE_H_

#include <stdint.h>

#define UNIKE_VERSION "0.1.0"
#define UNIKE_API __attribute__((visibility("default")))

/* With a type of its own, an enum may have any value in C++ too, and a wrong one can be refused. */
#ifdef __cplusplus
#define UNIKE_ENUM : int
#else
#define UNIKE_ENUM
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef enum unike_status UNIKE_ENUM {
  UNIKE_OK = 0,
  UNIKE_INVALID_ARGUMENT = 1,
  UNIKE_OUT_OF_MEMORY = 2,
  UNIKE_INTERNAL_ERROR = 3,
  UNIKE_INTERRUPTED = 4, /* see unike_set_poll */
} unike_status;

/* How the elements of a table are stored. All arithmetic is in float32 at least. */
typedef enum unike_dtype UNIKE_ENUM {
  UNIKE_F32 = 0,
  UNIKE_BF16 = 1,
} unike_dtype;

/* Rows to read: row i begins at element i * stride, stride >= 0; 0: all rows are one. */
typedef struct unike_rows {
  const void* data;
  unike_dtype dtype;
  int64_t stride;
} unike_rows;

/* Rows to write; the stride is at least the width where there are several. */
typedef struct unike_rows_out {
  void* data;
  unike_dtype dtype;
  int64_t stride;
} unike_rows_out;

/* The version of the library as built, "major.minor.patch". */
UNIKE_API const char* unike_version(void);

/* Why this thread's last failed call failed; "" before the first failure. Valid until this thread's next failure. */
UNIKE_API const char* unike_last_error(void);

/* Asked about 20 times a second, in the thread that has called a function, while that works: anything but 0 stops the call.
 * It then returns UNIKE_INTERRUPTED, and what it was to write holds anything. */
typedef int (*unike_poll)(void);

/* Sets that of the calling thread, for all its later calls; null: nobody is asked. */
UNIKE_API void unike_set_poll(unike_poll poll);

/* The instruction set of the kernels in use, "invalid UNIKE_ISA" where they would fail: what the environment variable
 * UNIKE_ISA named at the first call of anything that has kernels, else the best that this machine has. */
UNIKE_API const char* unike_cpu_isa(void);

/* Those that this machine has, from "baseline" to the best; null for an index beyond. On x86-64 "avx2", "avxvnni", "avx512",
 * "avx512vnni", "avx512bf16" and "amx". */
UNIKE_API const char* unike_available_isa(int index);

/* Another one for the whole process, or, with null, again what UNIKE_ISA says: for tests and measurements, between
 * calls. */
UNIKE_API unike_status unike_set_isa(const char* name);

#ifdef __cplusplus
}
#endif

#endif /* UNIKE_UNIKE_H_ */
