// Blocks that work together in one launch, without the need to be on the device at the same time: nobody waits for ever for
// a block that may not have started.
#pragma once

#include "cuda/canonical.cuh"
#include "cuda/search.h"

namespace unike::cuda {

__device__ inline unsigned strong_load(const unsigned* p) {
  unsigned x;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
  return x;
}
// What was written before the value that it finds, and a fence, is visible behind it.
__device__ inline unsigned acquiring_load(const unsigned* p) {
  unsigned x;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
  return x;
}
__device__ inline float strong_load(const float* p) {
  return __uint_as_float(strong_load(reinterpret_cast<const unsigned*>(p)));
}
__device__ inline void strong_store(float* p, float x) {
  asm volatile("st.relaxed.gpu.global.f32 [%0], %1;" ::"l"(p), "f"(x) : "memory");
}
__device__ inline void fence() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

// Waits until a count that others raise behind a fence has come to `count`. For one thread; what they wrote is visible to it.
__device__ inline void await(const unsigned* p, int count) {
  while (acquiring_load(p) < static_cast<unsigned>(count)) __nanosleep(32);
}

// Claims what a block prepares next for all. What is waited for is then being done by a block that runs.
__device__ inline int claim(Counters* counters) { return static_cast<int>(atomicAdd(&counters->claimed, 1)); }

// Calls prepare(i) for i = claimed, ... that other blocks have not claimed, below count; it returns the counter of those that are
// done. claimed: of the block, from claim().
template <class Prepare>
__device__ void share(Counters* counters, int& claimed, int count, const Prepare& prepare) {
  for (int mine = claimed; mine < count; mine = claimed) {
    unsigned* const done = prepare(mine);
    __syncthreads();
    if (thread() == 0) {
      const int next = claim(counters);
      fence();
      atomicAdd(done, 1);
      claimed = next;
    }
    __syncthreads();
  }
}

enum class Met {
  kAll,       // every block has arrived
  kGaveUp,    // this one has waited long enough
  kAfterAll,  // every block has arrived, this one last, and some have given up
};

// How long a block waits: as long again as it has worked itself, and 0.1 ms. Blocks that run side by side, with equal shares of
// the work, are never that far apart.
constexpr uint64_t kPatience = 100'000;
constexpr int kLooks = 16;  // between two at the clock

__device__ inline uint64_t nanoseconds() {
  uint64_t now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
  return now;
}

// A generation is even; its lowest bit says that a block has given up on it. Giving up and completing are one atomic
// operation each, so that either the block learns that all have come, or the last one learns that a block has left.
__device__ inline unsigned generation_of(const Barrier* barrier) { return strong_load(&barrier->generation) & ~1u; }

__device__ inline Met wait(Barrier* barrier, unsigned generation, uint64_t start) {
  const auto passed = [=](unsigned now) { return now - generation > 1; };
  const uint64_t arrival = nanoseconds();
  do {
#pragma unroll 1
    for (int look = 0; look < kLooks; ++look) {
      if (passed(acquiring_load(&barrier->generation))) return Met::kAll;
      __nanosleep(32);
    }
  } while (nanoseconds() - arrival < arrival - start + kPatience);
  const bool all = passed(atomicCAS(&barrier->generation, generation, generation | 1));
  fence();
  return all ? Met::kAll : Met::kGaveUp;
}

// Waits for all blocks of the grid, up to a limit. generation, start: as it was, and when, as the block began. in_between() runs in the last
// block, before the others go on. What a block wrote before is visible to those that met it.
template <class InBetween>
__device__ Met meet(Barrier* barrier, unsigned generation, uint64_t start, const InBetween& in_between) {
  __shared__ Met met;
  __syncthreads();
  if (thread() == 0) {
    fence();
    const unsigned last = blocks() - 1;
    if (atomicInc(&barrier->arrived, last) == last) {
      fence();
      in_between();
      met = atomicExch(&barrier->generation, generation + 2) & 1 ? Met::kAfterAll : Met::kAll;
    } else {
      met = wait(barrier, generation, start);
    }
  }
  __syncthreads();
  return met;
}

}  // namespace unike::cuda
