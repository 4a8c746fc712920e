// What a warp does with numbers and candidates that lie in memory, all lanes together.
#pragma once

#include "cuda/canonical.cuh"
#include "cuda/search.h"

namespace unike::cuda {

// Integers in the order of the floats; its own inverse.
__device__ inline int ordered(int bits) { return bits ^ (bits >> 31 & 0x7fffffff); }
__device__ inline int ordered(float x) { return ordered(__float_as_int(x)); }

// The k-th largest of value(0), ..., value(n - 1), -inf where fewer than k are above that. Each pass counts the values in 16 to
// 32 equal parts of the range that is left: 8 find the result exactly, fewer something not above it. Values may grow
// meanwhile. bins: 32, of the warp.
template <class Value>
__device__ float kth_largest(int n, int k, int passes, int* bins, const Value& value) {
  constexpr int kHeld = 10;  // of each lane in registers, the others are read in each pass
  const int lane = cuda::lane(), lowest = ordered(-INFINITY) + 1;
  int held[kHeld];
#pragma unroll
  for (int i = 0; i < kHeld; ++i) held[i] = lane + 32 * i < n ? ordered(value(lane + 32 * i)) : INT_MIN;
  const auto each = [&](const auto& see) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) see(held[i]);
#pragma unroll 8
    for (int i = lane + 32 * kHeld; i < n; i += 32) see(ordered(value(i)));
  };
  int low = INT_MAX, last = INT_MIN, count = 0;
  each([&](int v) {
    if (v < lowest) return;
    low = min(low, v);
    last = max(last, v);
    ++count;
  });
  low = __reduce_min_sync(kAllLanes, low);
  last = __reduce_max_sync(kAllLanes, last);
  if (__reduce_add_sync(kAllLanes, count) < k) return -INFINITY;
  // At least k are at least `low`; `above` of them are above `last`.
  int above = 0;
  for (int pass = 0; pass < passes && low < last; ++pass) {
    const unsigned range = static_cast<unsigned>(last) - static_cast<unsigned>(low);
    const int shift = max(27 - __clz(range), 0);
    bins[lane] = 0;
    __syncwarp();
    each([&](int v) {
      if (low <= v && v <= last)
        atomicAdd(bins + ((static_cast<unsigned>(v) - static_cast<unsigned>(low)) >> shift), 1);
    });
    __syncwarp();
    int from_here = bins[lane];
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_down_sync(kAllLanes, from_here, step);
      if (lane + step < 32) from_here += other;
    }
    const unsigned enough = __ballot_sync(kAllLanes, above + from_here >= k);
    if (enough == 0) break;  // some have grown beyond `last`
    const int bin = 31 - __clz(enough), beyond = __shfl_sync(kAllLanes, from_here, (bin + 1) & 31);
    if (bin < 31) above += beyond;
    low += bin << shift;
    last = min(last, low + static_cast<int>((1u << shift) - 1));
  }
  return __int_as_float(ordered(low));
}

// Past the L1 cache, which knows nothing of what other blocks write.
__device__ inline Candidate load(const Candidate* p) {
  const int4 bits = __ldcg(reinterpret_cast<const int4*>(p));
  Candidate candidate;
  memcpy(&candidate, &bits, sizeof candidate);
  return candidate;
}

__device__ inline void store(Candidate* p, const Candidate& candidate) {
  int4 bits;
  memcpy(&bits, &candidate, sizeof candidate);
  *reinterpret_cast<int4*>(p) = bits;
}

// Where a lane's item goes, of those that the flags say there are, and how many they are.
struct Place {
  int before, count;
};
__device__ inline Place place_of(bool flag) {
  const unsigned flags = __ballot_sync(kAllLanes, flag), lower = (1u << lane()) - 1;
  return {__popc(flags & lower), __popc(flags)};
}

// The sum of the numbers of this lane and those before it.
__device__ inline int sum_up_to(int x) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(kAllLanes, x, step);
    if (lane() >= step) x += other;
  }
  return x;
}

// Moves those to the front whose upper bound is above the threshold, and the first `ties` that are just there; the order
// stays. Returns how many are kept.
__device__ inline int keep(Candidate* list, int n, float threshold, int ties) {
  int kept = 0;
#pragma unroll 1
  for (int first = 0; first < n; first += 32) {
    const int i = first + lane();
    const Candidate candidate = i < n ? load(list + i) : Candidate{};
    const float upper = candidate.score + candidate.error;
    const Place tie = place_of(i < n && upper == threshold);
    const bool stays = i < n && (upper > threshold || (upper == threshold && tie.before < ties));
    const Place place = place_of(stays);
    if (stays) store(list + kept + place.before, candidate);
    kept += place.count;
    ties -= tie.count;
  }
  __syncwarp();
  return kept;
}

// Keeps the k best by canonical scores of at least as many, with ascending ids. Returns the score of the last of them.
__device__ inline float keep_best(Candidate* list, int n, int k, int* bins) {
  const float last = kth_largest(n, k, 8, bins, [=](int i) { return list[i].score; });
  int above = 0;
  for (int i = lane(); i < n; i += 32) above += list[i].score > last;
  keep(list, n, last, k - static_cast<int>(__reduce_add_sync(kAllLanes, above)));
  return last;
}

}  // namespace unike::cuda
