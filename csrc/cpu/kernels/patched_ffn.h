// The extra neurons of a run of tokens, compiled once for each ISA.
//
// A token at a time: its activations o_e are n dot products with the keys, its output n additions of values, so each
// neuron costs two passes over d floats. The keys and values of an edit (80 KB at d = 4096, n = 10... 320 KB) stay in
// the L2 cache from token to token; a token's sum has an order of its own, whatever else is in the batch.
#pragma once

#include "cpu/kernels/activation.h"
#include "cpu/kernels/vector.h"
#include "cpu/patched_ffn.h"

namespace unike {
namespace {

void add_edit(const FfnProblem& p, int64_t e, const float* x, float* extra) {
  const unike_edit_pool_f32& pool = *p.pool;
  float total = 0.0f;
  for (int64_t j = pool.indptr[e]; j < pool.indptr[e + 1]; ++j) {
    float o = activate(p.activation, dot(x, pool.keys + j * p.d, p.d) + pool.key_bias[j]);
    if (pool.up) o *= dot(x, pool.up + j * p.d, p.d) + pool.up_bias[j];
    total += o;
    axpy(o, pool.values + j * p.d, extra, p.d);
  }
  axpy(pool.beta[e] * total, pool.zeta + e * p.d, extra, p.d);
}

void add_extra_neurons(const FfnProblem& p, int64_t start, int64_t stop, float* extra) {
  const unike_edit_pool_f32& pool = *p.pool;
  for (int64_t t = start; t < stop; ++t) {
    const int64_t row = pool.token_rows ? pool.token_rows[t] : t / (p.m / pool.rows);
    const float* base = p.base + t * p.base_stride;
    float* out = p.out + t * p.out_stride;
    const int64_t first = pool.row_indptr[row], last = pool.row_indptr[row + 1];
    if (first == last) {
      if (out != base) __builtin_memcpy(out, base, p.d * sizeof(float));
      continue;
    }
    // Summed apart and added once, as the definition says: the base is not part of the extra neurons' rounding.
    __builtin_memset(extra, 0, p.d * sizeof(float));
    for (int64_t i = first; i < last; ++i) add_edit(p, pool.row_edits[i], p.x + t * p.x_stride, extra);
    for (int64_t i = 0; i < p.d; ++i) out[i] = base[i] + extra[i];
  }
}

}  // namespace
}  // namespace unike
