// CUDA kernels for the interpreter's tests: several entries in one file, static and dynamic shared memory, pointers and
// scalars by value, a structure by value, local arrays, device variables, and the idioms of hand-written kernels.
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

extern "C" {

__global__ void block_sum(const float* x, float* out, int n, float scale) {
  __shared__ float partial[32];
  float sum = 0;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) sum += x[i];
  for (int step = 16; step; step /= 2) sum += __shfl_down_sync(0xffffffff, sum, step);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x < 32) {
    sum = threadIdx.x < blockDim.x / 32 ? partial[threadIdx.x] : 0;
    for (int step = 16; step; step /= 2) sum += __shfl_down_sync(0xffffffff, sum, step);
    if (threadIdx.x == 0) atomicAdd(out, sum * scale);
  }
}

__global__ void reverse(const int* x, int* out) {
  extern __shared__ int tile[];
  int i = threadIdx.x, n = blockDim.x;
  tile[i] = x[blockIdx.x * n + i];
  __syncthreads();
  out[blockIdx.x * n + i] = tile[n - 1 - i];
}

struct Shape {
  int rows, columns;
  float scale;
};

__global__ void transpose(const float* x, float* out, Shape shape) {
  __shared__ float tile[32][33];
  int column = blockIdx.x * 32 + threadIdx.x, row = blockIdx.y * 32 + threadIdx.y;
  for (int r = 0; r < 32; r += blockDim.y)
    if (column < shape.columns && row + r < shape.rows)
      tile[threadIdx.y + r][threadIdx.x] = x[(row + r) * shape.columns + column];
  __syncthreads();
  column = blockIdx.y * 32 + threadIdx.x, row = blockIdx.x * 32 + threadIdx.y;
  for (int r = 0; r < 32; r += blockDim.y)
    if (column < shape.rows && row + r < shape.columns)
      out[(row + r) * shape.rows + column] = shape.scale * tile[threadIdx.x][threadIdx.y + r];
}

// The k largest of each row, k <= 8: a sorted list in each thread's local memory, merged by thread 0.
__global__ void topk(const float* x, float* scores, int* ids, int n, int k) {
  extern __shared__ char shared[];
  float* best = reinterpret_cast<float*>(shared);
  int* where = reinterpret_cast<int*>(best + blockDim.x * k);
  float mine[8];
  int place[8];
  for (int j = 0; j < k; ++j) mine[j] = -INFINITY, place[j] = -1;
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
    float v = x[blockIdx.x * n + i];
    int j = k;
    while (j > 0 && v > mine[j - 1]) {
      if (j < k) mine[j] = mine[j - 1], place[j] = place[j - 1];
      --j;
    }
    if (j < k) mine[j] = v, place[j] = i;
  }
  for (int j = 0; j < k; ++j) best[threadIdx.x * k + j] = mine[j], where[threadIdx.x * k + j] = place[j];
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int j = 0; j < k; ++j) {
      int top = 0;
      for (int i = 1; i < blockDim.x * k; ++i)
        if (best[i] > best[top] || (best[i] == best[top] && unsigned(where[i]) < unsigned(where[top]))) top = i;
      scores[blockIdx.x * k + j] = best[top], ids[blockIdx.x * k + j] = where[top];
      best[top] = -INFINITY, where[top] = -1;
    }
  }
}

// Blocks publish their minimum and the last one merges them.
__device__ unsigned arrived;
__global__ void last_block_min(const double* x, double* partial, double* out, int per_block) {
  __shared__ bool last;
  __shared__ double minima[64];
  double best = x[blockIdx.x * per_block + threadIdx.x];
  for (int i = threadIdx.x; i < per_block; i += blockDim.x) best = fmin(best, x[blockIdx.x * per_block + i]);
  minima[threadIdx.x] = best;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int i = 1; i < blockDim.x; ++i) best = fmin(best, minima[i]);
    partial[blockIdx.x] = best;
    __threadfence();
    last = atomicInc(&arrived, gridDim.x - 1) == gridDim.x - 1;
  }
  __syncthreads();
  if (last && threadIdx.x == 0) {
    __threadfence();
    best = partial[0];
    for (int i = 1; i < gridDim.x; ++i) best = fmin(best, partial[i]);
    *out = best;
  }
}

// A grid barrier by hand: one thread of each block announces it and spins; then another warp reads the blocks' values.
__global__ void spin(int* values, unsigned* counter, int* out) {
  if (threadIdx.x == 0) {
    values[blockIdx.x] = 100 + blockIdx.x;
    __threadfence();
    atomicAdd(counter, 1u);
    while (*reinterpret_cast<volatile unsigned*>(counter) < gridDim.x) {
    }
    __threadfence();
  }
  __syncthreads();
  int i = threadIdx.x - 32;
  if (i >= 0 && i < gridDim.x) out[blockIdx.x * gridDim.x + i] = values[i];
}

// Double-buffered copies from global to shared memory.
__global__ void pipelined_sum(const float4* x, float* out, int tiles) {
  __shared__ float4 stage[2][64];
  unsigned base = __cvta_generic_to_shared(&stage[0][0]) + threadIdx.x * 16;
  auto fetch = [&](int tile) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(base + (tile & 1) * 1024),
                 "l"(x + tile * 64 + threadIdx.x));
    asm volatile("cp.async.commit_group;");
  };
  float sum = 0;
  fetch(0);
  for (int tile = 0; tile < tiles; ++tile) {
    if (tile + 1 < tiles) {
      fetch(tile + 1);
      asm volatile("cp.async.wait_group 1;" ::: "memory");
    } else {
      asm volatile("cp.async.wait_group 0;" ::: "memory");
    }
    __syncthreads();
    float4 v = stage[tile & 1][63 - threadIdx.x];
    sum += v.x + v.y + v.z + v.w;
    __syncthreads();
  }
  atomicAdd(out, sum);
}

__global__ void half_axpy(const __half2* x, const __nv_bfloat162* y, __half2* h, __nv_bfloat162* b, float a) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  h[i] = __hfma2(x[i], __float2half2_rn(a), x[i]);
  b[i] = __hmul2(y[i], __float2bfloat162_rn(a));
}

__global__ void warp_votes(const int* x, unsigned* ballots, int* sums, int* peers) {
  int i = blockIdx.x * blockDim.x + threadIdx.x, v = x[i];
  unsigned even = __ballot_sync(0xffffffff, v % 2 == 0);
  if (threadIdx.x % 32 == 0) ballots[i / 32] = even;
  sums[i] = __reduce_add_sync(0xffffffff, v);
  peers[i] = __popc(__match_any_sync(0xffffffff, v)) + (__any_sync(0xffffffff, v == 3) ? 100 : 0);
  if (v < 4) sums[i] += __shfl_sync(__activemask(), v, __ffs(__activemask()) - 1);
}
}
