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
__device__ inline int lane() { return thread() & 31; }
__device__ inline int warp() { return thread() >> 5; }

// A row of float32 or bfloat16 values.
class Row {
 public:
  __device__ Row(const unike_rows& rows, int64_t row) : row_(rows.data), at_(row * rows.stride), dtype_(rows.dtype) {}
  __device__ double operator[](int i) const {
    if (dtype_ == UNIKE_F32) return static_cast<const float*>(row_)[at_ + i];
    return __uint_as_float(uint32_t{static_cast<const uint16_t*>(row_)[at_ + i]} << 16);
  }

 private:
  const void* row_;
  int64_t at_;
  unike_dtype dtype_;
};

// The sum of a_i b_i, in all lanes of the half-warp; the other half does the same with arguments of its own. The products
// are exact in float64, so that a fused multiply-add gives the same bits.
template <typename A, typename B>
__device__ double canonical_dot(const A& a, const B& b, int d) {
  double sum = 0.0;
#pragma unroll 8
  for (int i = thread() & 15; i < d; i += 16) sum += static_cast<double>(a[i]) * static_cast<double>(b[i]);
  // Both partners of a pair add the same two numbers.
#pragma unroll
  for (int width = 8; width > 0; width /= 2) sum += __shfl_xor_sync(kAllLanes, sum, width);
  return sum;
}

// The norm of a row: 0 for zeros, NaN where a value is not finite. The squares of float32 values cannot overflow a float64
// sum, nor underflow to zero.
__device__ inline double canonical_norm(const Row& row, int d) {
  const double squares = canonical_dot(row, row, d);
  return squares - squares == 0.0 ? sqrt(squares) : __longlong_as_double(-1);
}

__device__ inline float unit(double value, double norm) {
  return norm == 0.0 ? 0.0f : static_cast<float>(value / norm);
}

}  // namespace unike::cuda
