// Canonical arithmetic (unike/cosine_topk.h) on half a warp: each of 16 lanes holds one of the partial sums.
#pragma once

#include <cstdint>

#include "unike/unike.h"

namespace unike::cuda {

constexpr unsigned kAllLanes = 0xffffffff;

// Read anew wherever it is asked for: what depends on it is not kept in registers from one phase of a kernel to the next.
__device__ inline int thread() {
  int x;
  asm volatile("mov.u32 %0, %tid.x;" : "=r"(x));
  return x;
}
__device__ inline unsigned blocks() {
  unsigned x;
  asm volatile("mov.u32 %0, %nctaid.x;" : "=r"(x));
  return x;
}
__device__ inline int lane() { return thread() & 31; }
__device__ inline int warp() { return thread() >> 5; }

// Calls use() with the values of a row of float32 or bfloat16, as a function of the column.
template <class Use>
__device__ void with_row(const unike_rows& rows, int64_t row, const Use& use) {
  const int64_t at = row * rows.stride;
  if (rows.dtype == UNIKE_F32) {
    use([values = static_cast<const float*>(rows.data) + at](int i) { return values[i]; });
  } else {
    use([values = static_cast<const uint16_t*>(rows.data) + at](int i) {
      return __uint_as_float(uint32_t{values[i]} << 16);
    });
  }
}

// Goes on with the 16 sums, one in each lane of a half-warp; the other half does the same. The products begin with a multiple
// of 16 columns; those of two float32 are exact in float64.
__device__ inline double canonical_sum(double sum, const double* products, int n) {
#pragma unroll 16
  for (int i = thread() & 15; i < n; i += 16) sum += products[i];
  return sum;
}

// Their sum, in all lanes: both partners of a pair add the same two numbers.
__device__ inline double folded(double sum) {
#pragma unroll
  for (int width = 8; width > 0; width /= 2) sum += __shfl_xor_sync(kAllLanes, sum, width);
  return sum;
}

// The norm of a row from its squares: 0 for zeros, NaN where a value is not finite. The squares of float32 values cannot
// overflow a float64 sum, nor underflow to zero.
__device__ inline double norm_of(double squares) {
  return squares - squares == 0.0 ? sqrt(squares) : __longlong_as_double(-1);
}

__device__ inline float unit(double value, double norm) {
  return norm == 0.0 ? 0.0f : static_cast<float>(value / norm);
}

}  // namespace unike::cuda
