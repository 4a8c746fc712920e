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
__device__ inline float strong_load(const float* p) {
  return __uint_as_float(strong_load(reinterpret_cast<const unsigned*>(p)));
}
__device__ inline void strong_store(float* p, float x) {
  asm volatile("st.relaxed.gpu.global.f32 [%0], %1;" ::"l"(p), "f"(x) : "memory");
}
__device__ inline void fence() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

// Calls prepare(i) for i = 0, ..., count - 1, each in one block, and returns when all are done. Blocks claim them one by one:
// what is waited for is being done by a block that runs.
template <class Prepare>
__device__ void share(Counters* counters, int count, const Prepare& prepare) {
  __shared__ int claimed;
  for (int mine = -1;;) {
    if (thread() == 0) {
      if (mine >= 0) {
        fence();
        atomicAdd(&counters->prepared, 1);
      }
      claimed = static_cast<int>(atomicAdd(&counters->claimed, 1));
    }
    __syncthreads();
    mine = claimed;
    if (mine >= count) break;
    prepare(mine);
    __syncthreads();
  }
  if (thread() == 0) {
    while (strong_load(&counters->prepared) < static_cast<unsigned>(count)) __nanosleep(32);
    fence();
  }
  __syncthreads();
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
      if (passed(strong_load(&barrier->generation))) return Met::kAll;
      __nanosleep(32);
    }
  } while (nanoseconds() - arrival < arrival - start + kPatience);
  return passed(atomicCAS(&barrier->generation, generation, generation | 1)) ? Met::kAll : Met::kGaveUp;
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
    fence();
  }
  __syncthreads();
  return met;
}

}  // namespace unike::cuda
