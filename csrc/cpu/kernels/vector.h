// The few float32 primitives of the kernels, in GCC's vector types: one register of SSE, AVX2 or AVX-512.
//
// Files that include this are compiled once for each ISA. Everything lives in an unnamed namespace, and no inline
// function of the standard library is used: the linker could take the copy that the CPU does not have.
#pragma once

#include <cstdint>

namespace unike {
namespace {

#if defined(__AVX512F__)
constexpr int64_t kLanes = 16;
#elif defined(__AVX2__)
constexpr int64_t kLanes = 8;
#else
constexpr int64_t kLanes = 4;
#endif
using Vec = float __attribute__((vector_size(kLanes * sizeof(float))));
using Unaligned = float __attribute__((vector_size(kLanes * sizeof(float)), aligned(4), may_alias));

inline Vec load(const float* p) { return *reinterpret_cast<const Unaligned*>(p); }
inline void store(float* p, Vec v) { *reinterpret_cast<Unaligned*>(p) = v; }

inline float sum(Vec v) {
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int j = 0; j < width; ++j) v[j] += v[j + width];
  }
  return v[0];
}

// Four accumulators hide the latency of the additions.
inline float dot(const float* a, const float* b, int64_t n) {
  Vec s0{}, s1{}, s2{}, s3{};
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    s0 += load(a + i) * load(b + i);
    s1 += load(a + i + kLanes) * load(b + i + kLanes);
    s2 += load(a + i + 2 * kLanes) * load(b + i + 2 * kLanes);
    s3 += load(a + i + 3 * kLanes) * load(b + i + 3 * kLanes);
  }
  for (; i + kLanes <= n; i += kLanes) s0 += load(a + i) * load(b + i);
  float tail = 0.0f;
  for (; i < n; ++i) tail += a[i] * b[i];
  return sum((s0 + s1) + (s2 + s3)) + tail;
}

// y += w x.
inline void axpy(float w, const float* x, float* y, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(y + i, load(y + i) + w * load(x + i));
  for (; i < n; ++i) y[i] += w * x[i];
}

}  // namespace
}  // namespace unike
