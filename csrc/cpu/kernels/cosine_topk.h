// Approximate scores of a tile of keys, compiled once for each ISA.
//
// Four queries by two keys at a time: six loads feed eight multiply-adds, and eight accumulators hide their latency. The
// tile of keys comes from the cache for all queries but the first.
#pragma once

#include "cpu/cosine_topk.h"
#include "cpu/kernels/vector.h"

namespace unike {
namespace {

constexpr int64_t kQueries = 4, kKeys = 2;

void score_block(const float* const* queries, const float* keys, int64_t stride, int64_t d, float* out, int64_t n) {
  Vec s[kQueries][kKeys] = {};
  int64_t j = 0;
  for (; j + kLanes <= d; j += kLanes) {
    Vec key[kKeys];
    for (int64_t i = 0; i < kKeys; ++i) key[i] = load(keys + i * stride + j);
    for (int64_t q = 0; q < kQueries; ++q) {
      const Vec query = load(queries[q] + j);
      for (int64_t i = 0; i < kKeys; ++i) s[q][i] += query * key[i];
    }
  }
  for (int64_t q = 0; q < kQueries; ++q) {
    for (int64_t i = 0; i < kKeys; ++i) {
      float tail = 0.0f;
      for (int64_t l = j; l < d; ++l) tail += queries[q][l] * keys[i * stride + l];
      out[q * n + i] = sum(s[q][i]) + tail;
    }
  }
}

void score_tile(const float* const* queries, int64_t count, const float* keys, int64_t n, int64_t stride, int64_t d,
                float* out) {
  int64_t q = 0;
  for (; q + kQueries <= count; q += kQueries) {
    int64_t i = 0;
    for (; i + kKeys <= n; i += kKeys) score_block(queries + q, keys + i * stride, stride, d, out + q * n + i, n);
    for (; i < n; ++i) {
      for (int64_t r = q; r < q + kQueries; ++r) out[r * n + i] = dot(queries[r], keys + i * stride, d);
    }
  }
  for (; q < count; ++q) {
    for (int64_t i = 0; i < n; ++i) out[q * n + i] = dot(queries[q], keys + i * stride, d);
  }
}

}  // namespace
}  // namespace unike
