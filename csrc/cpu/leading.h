// What unit rows are in the leading directions of the keys, and how far that may be off (EXACTNESS.md).
#pragma once

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#include "cpu/scan_kernels.h"

namespace unike {

// Most directions.
constexpr int64_t kMostLeading = 512;
// Throws where there cannot be so many.
inline void check_leading(const char* name, int64_t p) {
  if (0 < p && p <= kMostLeading && p % 64 == 0) return;
  throw std::invalid_argument(std::string(name) + " must be a multiple of 64, at most " + std::to_string(kMostLeading));
}

// Rows that are multiplied with the directions together.
constexpr int64_t kLeadingRows = 16;

// What directions that are not quite at right angles, and rounding, may add to an error, and to the square of a tail.
constexpr double kLeadingSlack = 0x1p-16, kTailSlack = 0x1p-18;

// Most that the float32 products of a unit row with all directions may be off, as one vector. Keys may have been packed by
// another ISA: of the fewest lanes that there are.
inline double leading_rounding(int64_t p, int64_t d) {
  constexpr int64_t kFewestLanes = 4;
  const double terms = static_cast<double>(d / kFewestLanes + kDepth) * 0x1p-24;
  return terms < 0.5 ? terms / (1 - terms) * std::sqrt(static_cast<double>(1 + p)) * 1.0001 : 0x1p96;
}

// y[r, j] = rows[r] . directions[j] for count <= kLeadingRows rows and 1 + p directions; y: [count, 1 + p].
inline void multiply_directions(const ScanKernels& kernels, const float* const* rows, int64_t count,
                                const float* directions, int64_t p, int64_t d, float* y) {
  for (int64_t first = 0; first <= p; first += kTile) {
    const int64_t n = std::min(kTile, 1 + p - first);
    const void *queries[kLeadingRows], *keys[kTile];
    float products[kLeadingRows * kTile];
    for (int64_t r = 0; r < count; ++r) queries[r] = rows[r];
    for (int64_t j = 0; j < n; ++j) keys[j] = directions + (first + j) * d;
    kernels.tile[UNIKE_SCAN_F32](queries, count, keys, n, d, false, products);
    for (int64_t r = 0; r < count; ++r) std::copy_n(products + r * kTile, n, y + r * (1 + p) + first);
  }
}

// At least what a unit row is outside of the directions, from its products with them.
inline float tail_of(const float* y, int64_t p, double rounding) {
  double left = 1.0;
  for (int64_t j = 0; j <= p; ++j) left -= static_cast<double>(y[j]) * static_cast<double>(y[j]);
  return static_cast<float>(std::sqrt(std::max(left, 0.0) + kTailSlack + 2.1 * rounding) * (1 + 0x1p-20));
}

}  // namespace unike
