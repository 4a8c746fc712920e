// The kernels of cosine_topk.cuh, each scan's in a file of its own: nvcc compiles them side by side.
#pragma once

namespace unike::cuda {

// For few queries or for many, of which each sees all keys or has a range of its own.
const void* kernel_f32(bool many, bool ranged);
const void* kernel_f16(bool many, bool ranged);
const void* kernel_bf16(bool many, bool ranged);
const void* kernel_i8(bool many, bool ranged);

}  // namespace unike::cuda
