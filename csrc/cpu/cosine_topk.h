// What the exact top-k hands to the kernel of an ISA.
#pragma once

#include <cstdint>

namespace unike {

// out[q * n + i] = queries[q] . keys[i] in float32, in any order of summation.
using ScoreTile = void (*)(const float* const* queries, int64_t count, const float* keys, int64_t n, int64_t stride,
                           int64_t d, float* out);

extern const ScoreTile score_tile_baseline, score_tile_avx2, score_tile_avx512;

}  // namespace unike
