// What the C ABI of the patched FFN hands to the kernel of an ISA.
#pragma once

#include "unike/patched_ffn.h"

namespace unike {

struct FfnProblem {
  const float* x;
  int64_t x_stride;
  const float* base;
  int64_t base_stride;
  int64_t m, d;
  const unike_edit_pool_f32* pool;
  unike_activation activation;
  float* out;
  int64_t out_stride;
};

// Tokens start, ..., stop - 1; `extra` is scratch of d floats.
using AddExtraNeurons = void (*)(const FfnProblem&, int64_t start, int64_t stop, float* extra);

extern const AddExtraNeurons add_extra_neurons_baseline, add_extra_neurons_avx2, add_extra_neurons_avx512;

}  // namespace unike
