/* What an inference engine does with the core: it searches a memory of hidden states, shifts the attention output towards
 * what was found, and adds the neurons of an edit to the output of an FFN. Plain C, without Python.
 *
 *   python3 setup.py build_core --output core
 *   cc examples/search_and_edit.c -Icore/include -Lcore/lib -lunike -lm -Wl,-rpath,core/lib -o example && ./example
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "unike/cosine_topk.h"
#include "unike/extra_neurons.h"
#include "unike/latent_attention.h"
#include "unike/memory_attention.h"

enum { N = 1000, D = 64, R = 8, K = 5, TOKENS = 3, NEURONS = 2, THREADS = 2 };

static void check(unike_status status, const char* what) {
  if (status == UNIKE_OK) return;
  fprintf(stderr, "%s: %s\n", what, unike_last_error());
  exit(1);
}

/* Memory for a call. An engine keeps one workspace that is large enough for all its calls. */
static void* workspace(int64_t bytes) {
  void* memory = malloc((size_t)bytes);
  if (memory == NULL) exit(1);
  return memory;
}

static float* numbers(int64_t count, unsigned seed) {
  float* x = workspace(count * (int64_t)sizeof(float));
  for (int64_t i = 0; i < count; ++i) {
    seed = seed * 1664525u + 1013904223u;
    x[i] = (float)(seed >> 8) / (float)(1 << 23) - 1.0f;
  }
  return x;
}

int main(void) {
  /* Once: the memory's keys are normalised and packed into bytes, for a scan that reads a quarter. */
  float *raw = numbers(N * D, 1), *rows = workspace(N * D * sizeof(float)), direction[D];
  check(unike_normalize_rows((unike_rows){raw, UNIKE_F32, D}, N, D, rows, THREADS), "normalize");
  float mean[D] = {0};
  for (int64_t i = 0; i < N * D; ++i) mean[i % D] += rows[i] / N;
  check(unike_normalize_rows((unike_rows){mean, UNIKE_F32, D}, 1, D, direction, 1), "normalize the mean");
  void* codes = workspace(N * unike_code_bytes(UNIKE_SCAN_I8, D));
  float* bounds = workspace(N * UNIKE_KEY_BOUNDS * sizeof(float));
  int64_t bytes = unike_pack_keys_workspace(D, THREADS);
  void* room = workspace(bytes);
  check(unike_pack_keys(rows, N, D, D, UNIKE_SCAN_I8, direction, codes, bounds, room, bytes, THREADS), "pack");
  free(room);
  const unike_keys keys = {N, D, rows, D, UNIKE_SCAN_I8, codes, bounds, direction, {0}};

  /* For each token: the K nearest entries. Entry 7 asks for itself. */
  float* states = numbers(TOKENS * D, 2);
  memcpy(states, raw + 7 * D, D * sizeof(float));
  float scores[TOKENS * K];
  int64_t ids[TOKENS * K];
  bytes = unike_cosine_topk_workspace(&keys, TOKENS, K, THREADS);
  room = workspace(bytes);
  const unike_rows hidden = {states, UNIKE_F32, D};
  check(unike_cosine_topk(&keys, hidden, TOKENS, K, NULL, scores, ids, room, bytes, THREADS), "search");
  free(room);
  printf("nearest %lld %.6f\n", (long long)ids[0], scores[0]);

  /* The same search, the attention over what it finds, the gate and the blend, in one call. */
  const unike_memory memory = {N, 1, D, UNIKE_F32, raw, raw, NULL};
  float *w1 = numbers(R * D, 3), *w2 = numbers(D * R, 4), b1[R] = {0}, b2[D] = {0};
  const unike_semantic_encoder encoder = {R, UNIKE_F32, w1, b1, w2, b2};
  const float half = 0.5f;
  const unike_blend blend = {1.0f / sqrtf(D), 0, 1, &half, 1, NULL, 0}; /* a fixed gate of one half */
  float *attention = numbers(TOKENS * D, 5), *shifted = workspace(TOKENS * D * sizeof(float)), alpha[TOKENS];
  const unike_latent_inputs in = {TOKENS, D, hidden, {attention, UNIKE_F32, D}, NULL, 0, K};
  bytes = unike_memory_attention_workspace(&keys, &in, &memory, &encoder, THREADS);
  room = workspace(bytes);
  const unike_rows_out out = {shifted, UNIKE_F32, D};
  check(unike_memory_attention(&keys, hidden, NULL, &in, &memory, &encoder, &blend, out, alpha, NULL, room, bytes,
                               THREADS),
        "memory attention");
  free(room);
  printf("alpha %.2f shifted %.6f\n", alpha[0], shifted[0]);

  /* An edit of two neurons for the first of three rows, the others have none. Their base comes back bit for bit. */
  float *neuron_keys = numbers(NEURONS * D, 6), *values = numbers(NEURONS * D, 7), *zeta = numbers(D, 8);
  const float bias[NEURONS] = {0.1f, -0.1f}, beta = 0.1f;
  const int64_t indptr[] = {0, NEURONS}, row_indptr[] = {0, 1, 1, 1}, row_edits[] = {0};
  const unike_edit_pool pool = {NEURONS, 1,    TOKENS, UNIKE_F32, neuron_keys, bias,      NULL, NULL,
                                values,  zeta, &beta,  indptr,    row_indptr,  row_edits, NULL};
  float* edited = workspace(TOKENS * D * sizeof(float));
  bytes = unike_add_extra_neurons_workspace(TOKENS, D, &pool, THREADS);
  room = workspace(bytes);
  check(unike_add_extra_neurons(hidden, (unike_rows){shifted, UNIKE_F32, D}, TOKENS, D, &pool, UNIKE_SILU,
                                (unike_rows_out){edited, UNIKE_F32, D}, room, bytes, THREADS),
        "extra neurons");
  free(room);
  printf("edited %d untouched %d\n", memcmp(edited, shifted, D * sizeof(float)) != 0,
         memcmp(edited + D, shifted + D, 2 * D * sizeof(float)) == 0);

  /* Errors are statuses, with a message for people. */
  const unike_status refused = unike_cosine_topk(&keys, hidden, -1, K, NULL, scores, ids, NULL, 0, THREADS);
  printf("refused %d: %s\n", refused == UNIKE_INVALID_ARGUMENT, unike_last_error());
  return 0;
}
