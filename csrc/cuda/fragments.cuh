// Keys in registers, and their products with the queries in shared memory by mma.sync (m16n8k16).
//
// Eight keys are one operand. A lane loads 16 neighbouring bytes of key `lane / 4`; the order of the columns within a product
// does not matter as long as keys and queries agree, so these are the lane's elements of the fragment as they are: keys
// never touch shared memory, and nothing is moved between registers. All products are of 16-bit floats: float32 keys are
// rounded to float16, whose 11 bits are those of tf32, at twice its rate; int8 codes are exact in float16.
//
// Sixteen rows are the other operand, 16 bytes for each lane, in the order of its registers: columns p, then r, of row
// `lane / 4`, each followed by those of the row 8 below. Many queries are these rows. Eight or fewer fill both halves: the
// upper one with columns 0-1 and 2-3 of the lane's eight, the lower one with 4-5 and 6-7. Both are multiplied with both
// parts of the keys, into two sums, and of each the half is right where the columns agree.
#pragma once

#include <cstdint>

#include "cuda/canonical.cuh"
#include "cuda/search.h"

namespace unike::cuda {

__device__ inline void load_once(uint32_t (&to)[4], const void* p) {
  asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "l"(p));
}

__device__ inline void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

__device__ inline uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

__device__ inline uint2 load_shared_8(uint32_t p) {
  uint2 v;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(p));
  return v;
}
__device__ inline uint4 load_shared_16(uint32_t p) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(p));
  return v;
}

// 16 bytes to shared memory, zeros where there is nothing to copy.
__device__ inline void copy_async(uint32_t target, const void* source, bool exists) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(source), "r"(exists ? 16 : 0)
               : "memory");
}
__device__ inline void copy_async_4(uint32_t target, const void* source) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(target), "l"(source) : "memory");
}
__device__ inline void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }
// Copies come in groups; all but so many of these have landed.
__device__ inline void end_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kGroups>
__device__ inline void wait_for_copies_but() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

__device__ inline uint32_t float16_pair(uint32_t first, uint32_t second) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(__uint_as_float(second)), "f"(__uint_as_float(first)));
  return pair;
}

// Two of four codes c + 128 -> c. In float16 the bits 0x6400 + code are 1024 + code.
__device__ inline uint32_t float16_codes(uint32_t codes, int half) {
  static_assert(kCodeOffset == 128);
  constexpr uint32_t kBase = 0x64806480;  // 1024 + 128
  uint32_t pair;
  asm("sub.rn.f16x2 %0, %1, %2;"
      : "=r"(pair)
      : "r"(__byte_perm(codes, 0x64646464, half == 0 ? 0x4140 : 0x4342)), "r"(kBase));
  return pair;
}

template <unike_scan kScan, bool kMany>
struct Fragments {
  static constexpr int kColumns = slab_columns(kScan);
  // What a lane holds of a slab of sixteen keys: 16 bytes of two that are eight apart.
  using Keys = uint32_t[2][4];
  // Bytes of the queries that a lane reads for a slab, of each sixteen or of all eight, and sums that they go to.
  static constexpr int kRead = kColumns / 4 * 2 * (kMany ? 2 : 1);
  static constexpr int kSums = kMany ? Shape<true>::kQueries / 16 : kRead == 8 ? 1 : 2;

  static __device__ uint32_t pair(const uint32_t (&words)[4], int i) {
    if constexpr (kScan == UNIKE_SCAN_F32) return float16_pair(words[2 * i], words[2 * i + 1]);
    if constexpr (kScan == UNIKE_SCAN_I8) return float16_codes(words[i / 2], i % 2);
    return words[i];
  }

  static __device__ void multiply_add(float (&sum)[4], const uint4& rows, uint32_t first, uint32_t second) {
    if constexpr (kScan == UNIKE_SCAN_BF16) {
      asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, "
          "%2, %3};"
          : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
          : "r"(rows.x), "r"(rows.y), "r"(rows.z), "r"(rows.w), "r"(first), "r"(second));
    } else {
      asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, "
          "%2, %3};"
          : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
          : "r"(rows.x), "r"(rows.y), "r"(rows.z), "r"(rows.w), "r"(first), "r"(second));
    }
  }

  // Lanes read neighbouring units of shared memory, 16 bytes each; where one reads several, they are exchanged so that no two
  // of the eight lanes that are served together meet in a bank.
  static __device__ int swapped(int lane) { return kRead <= 16 ? 0 : lane * kRead / 128 % (kRead / 16); }
  static __device__ int offset_of(int lane) { return lane * kRead + swapped(lane) * 16; }

  // Adds the products of a slab. rows: in shared memory, at the lane's first unit of the slab; whole: of all queries of a
  // tile, not only of the first half.
  static __device__ void multiply(const Keys& keys, uint32_t rows, bool whole, float (&sums)[kSums][2][4]) {
    if constexpr (kRead == 8) {
      const uint2 a = load_shared_8(rows);
#pragma unroll
      for (int eight = 0; eight < 2; ++eight) {
        multiply_add(sums[0][eight], {a.x, 0, a.y, 0}, pair(keys[eight], 0), pair(keys[eight], 1));
      }
    } else if constexpr (kMany) {
      multiply<0, kSums / 2>(keys, rows, sums);
      if (whole) multiply<kSums / 2, kSums>(keys, rows, sums);
    } else {
      multiply<0, kSums>(keys, rows, sums);
    }
  }

  template <int kFirst, int kLast>
  static __device__ void multiply(const Keys& keys, uint32_t rows, float (&sums)[kSums][2][4]) {
#pragma unroll
    for (int unit = 0; unit < kRead / 16; ++unit) {
      uint4 a;
#pragma unroll
      for (int i = kFirst; i < kLast; ++i) {
        if (kMany || i == 0) a = load_shared_16((rows ^ unit * 16) + i * 32 * kRead);
        const int first = kMany ? 2 * unit : 4 * unit + 2 * i;
#pragma unroll
        for (int eight = 0; eight < 2; ++eight) {
          multiply_add(sums[i][eight], a, pair(keys[eight], first), pair(keys[eight], first + 1));
        }
      }
    }
  }

  // Codes of the queries, and the place in its row of the code of a column. A row belongs to one query, or to two that are
  // eight apart.
  static __device__ uint16_t encode(float x) {
    uint16_t code;
    if constexpr (kScan == UNIKE_SCAN_BF16) {
      asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(code) : "f"(x));
    } else {
      asm("cvt.rn.f16.f32 %0, %1;" : "=h"(code) : "f"(x));
    }
    return code;
  }
  static __device__ float decode(uint16_t code) {
    if constexpr (kScan == UNIKE_SCAN_BF16) return __uint_as_float(uint32_t{code} << 16);
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(code));
    return x;
  }
  static __device__ int row_of(int query) { return kMany ? query / 16 * 8 + query % 8 : query; }
  static __device__ int place_of_code(int query, int column) {
    if (kMany) return column / 2 * 4 + query / 8 % 2 * 2 + column % 2;
    if (kSums == 1) return column;
    return column & ~7 | column % 4 / 2 * 4 | column / 4 % 2 * 2 | column % 2;
  }
};

}  // namespace unike::cuda
