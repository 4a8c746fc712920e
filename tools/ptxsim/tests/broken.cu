// Kernels with one defect each; test_defects.py says which.
#include <stdint.h>

extern "C" {

__global__ void load_past_the_end(const float* x, float* out) { out[threadIdx.x] = x[threadIdx.x + 1]; }

__global__ void store_before_the_start(float* out) { out[int(threadIdx.x) - 1] = 1; }

__global__ void wild_pointer(const float* const* table, float* out) { out[threadIdx.x] = table[0][threadIdx.x]; }

__global__ void shared_past_the_end(float* out) {
  extern __shared__ float tile[];
  tile[threadIdx.x] = 1;
  out[threadIdx.x] = tile[threadIdx.x];
}

__global__ void misaligned(const char* x, float* out) {
  out[threadIdx.x] = *reinterpret_cast<const float*>(x + 4 * threadIdx.x + 2);
}

__global__ void shared_nobody_wrote(float* out) {
  __shared__ float tile[64];
  if (threadIdx.x != 5) tile[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = tile[63 - threadIdx.x];
}

__global__ void reads_its_output(float* out) { out[threadIdx.x] += 1; }

__global__ void shuffle_of_half_a_warp(float* out) {
  float v = threadIdx.x;
  if (threadIdx.x % 32 < 16) v = __shfl_sync(0xffffffff, v, 3);
  out[threadIdx.x] = v;
}

__global__ void shuffle_from_outside(float* out) {
  float v = threadIdx.x;
  if (threadIdx.x % 32 < 16) v = __shfl_sync(0x0000ffff, v, 20);
  out[threadIdx.x] = v;
}

__global__ void barrier_in_a_branch(float* out) {
  if (threadIdx.x % 32 < 16) __syncthreads();
  out[threadIdx.x] = 1;
}

__global__ void two_barriers(float* out) {
  if (threadIdx.x < 32) {
    __syncthreads();
    out[threadIdx.x] = 1;
  } else {
    __syncthreads();
    out[threadIdx.x] = 2;
  }
}

__global__ void copy_without_wait(const float* x, float* out) {
  __shared__ float tile[64];
  unsigned place = __cvta_generic_to_shared(tile + threadIdx.x);
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;\ncp.async.commit_group;" ::"r"(place), "l"(x + threadIdx.x));
  __syncthreads();
  out[threadIdx.x] = tile[threadIdx.x];
}

__global__ void waits_for_too_few(const float* x, float* out) {
  __shared__ float tile[2][64];
  for (int i = 0; i < 2; ++i) {
    unsigned place = __cvta_generic_to_shared(&tile[i][threadIdx.x]);
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;\ncp.async.commit_group;" ::"r"(place),
                 "l"(x + 64 * i + threadIdx.x));
  }
  asm volatile("cp.async.wait_group 1;" ::: "memory");
  __syncthreads();
  out[threadIdx.x] = tile[1][threadIdx.x];
}

__global__ void copy_without_barrier(const float* x, float* out) {
  __shared__ float tile[64];
  unsigned place = __cvta_generic_to_shared(tile + threadIdx.x);
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;\ncp.async.wait_all;" ::"r"(place), "l"(x + threadIdx.x)
               : "memory");
  out[threadIdx.x] = tile[63 - threadIdx.x];
}

__global__ void lanes_write_one_place(int* out) { out[threadIdx.x / 2] = threadIdx.x; }

__global__ void warps_write_one_place(int* out) { out[threadIdx.x % 32] = threadIdx.x; }

__global__ void blocks_write_one_place(int* out) { out[threadIdx.x] = blockIdx.x; }

__global__ void warps_write_one_shared_place(int* out) {
  __shared__ int tile[32];
  tile[threadIdx.x % 32] = threadIdx.x;
  __syncthreads();
  if (threadIdx.x < 32) out[threadIdx.x] = tile[threadIdx.x];
}

__global__ void reads_before_the_barrier(int* out) {
  __shared__ int tile[64];
  tile[threadIdx.x] = threadIdx.x;
  out[threadIdx.x] = tile[63 - threadIdx.x];
}

__global__ void overwrites_what_is_read(int* out) {
  __shared__ int tile[64];
  tile[threadIdx.x] = threadIdx.x;
  __syncthreads();
  out[threadIdx.x] = tile[63 - threadIdx.x];
  tile[threadIdx.x] = -1;
}

// The last block adds up what the others wrote, without a fence before the atomic.
__global__ void no_fence(unsigned* counter, int* partial, int* out) {
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = blockIdx.x;
    if (atomicAdd(counter, 1u) == gridDim.x - 1) {
      int sum = 0;
      for (int i = 0; i < gridDim.x; ++i) sum += *(volatile int*)(partial + i) * 0 + partial[i];
      *out = sum;
    }
  }
}

__global__ void waits_for_ever(unsigned* flag, int* out) {
  while (*(volatile unsigned*)flag == 0) {
  }
  out[threadIdx.x] = 1;
}

__global__ void trips(int* out) {
  if (threadIdx.x == 3) __trap();
  out[threadIdx.x] = 1;
}
}
