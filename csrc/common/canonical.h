// The canonical sum of products, defined in unike/cosine_topk.h.
#pragma once

#include <cstdint>

namespace unike {
namespace {  // compiled once for each ISA: never shared between files

// The canonical sum of a[i] * b[i] over i < d; `A` is float, or double for float32 values that are already converted.
template <typename A>
inline double canonical_dot(const A* a, const float* b, int64_t d) {
  constexpr int kLanes = 16;
  double lane[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= d; i += kLanes) {
    for (int j = 0; j < kLanes; ++j) lane[j] += static_cast<double>(a[i + j]) * static_cast<double>(b[i + j]);
  }
  for (int j = 0; i < d; ++i, ++j) lane[j] += static_cast<double>(a[i]) * static_cast<double>(b[i]);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int j = 0; j < width; ++j) lane[j] += lane[j + width];
  }
  return lane[0];
}

}  // namespace
}  // namespace unike
