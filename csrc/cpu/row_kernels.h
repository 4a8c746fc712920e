// Operations on rows that the latent attention and the extra neurons are made of.
#pragma once

#include <cstdint>

#include "unike/unike.h"

namespace unike {

struct RowKernels {
  // A row as float32, and back; by unike_dtype.
  void (*load_row[2])(const void* row, int64_t d, float* out);
  void (*store_row[2])(const float* row, int64_t d, void* out);

  // out[t * ld + j] = x[t] . rows[j], in an order of additions that depends on d alone; ld: n up to a multiple of 4.
  // prefetch_next: the rows lie in memory at equal distances, and more follow.
  using Dots = void (*)(const float* const* x, int64_t tokens, const void* const* rows, int64_t n, int64_t d,
                        bool prefetch_next, float* out, int64_t ld);
  Dots dots[2];  // by the dtype of the rows

  // sums[t] += sum over j of weights[t][j] rows[j], in the order of j. Gathered rows serve one token.
  void (*add_rows[2])(const float* const* weights, int64_t tokens, const void* const* rows, int64_t n, int64_t d,
                      float* const* sums);
  void (*add_gathered[2])(const float* weights, const void* const* rows, int64_t n, int64_t d, float* sum);

  float (*dot)(const float* a, const float* b, int64_t d);

  void (*gelu)(float* x, int64_t n);
  // x *= gelu'(at).
  void (*times_gelu_slope)(float* x, const float* at, int64_t n);

  // x += bias, then of these n values: against = x . anchor, squares = x . x.
  void (*measure)(float* x, const float* bias, const float* anchor, int64_t n, float* against, float* squares);

  // out = own a + other b.
  void (*blend)(const float* a, float own, const float* b, float other, int64_t d, float* out);
};

}  // namespace unike
