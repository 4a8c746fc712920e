// Sizes and pointers as callers of the C ABI give them: what cannot be is refused, with its name, before it is used.
#pragma once

#include <cstdint>

#include "common/status.h"

namespace unike {

// More bytes than an address space has. Sums of a few sizes up to this cannot overflow.
constexpr int64_t kMostBytes = int64_t{1} << 48;

// Throws std::invalid_argument: "name: expected `expected`, got `got`".
[[noreturn]] void refuse(const char* name, const char* expected, int64_t got);

// The product of sizes; refuses what is negative or above kMostBytes.
int64_t times(auto... sizes) {
  int64_t product = 1;
  bool fits = true;
  for (const int64_t size : {static_cast<int64_t>(sizes)...}) {
    fits = fits && size >= 0 && !__builtin_mul_overflow(product, size, &product);
  }
  require(fits && product <= kMostBytes, "the sizes are too large or negative: no memory has room for their product");
  return product;
}

// The sum of sizes that are each at most kMostBytes.
inline int64_t plus(int64_t a, int64_t b) { return times(a + b); }

inline void check_size(const char* name, int64_t size, int64_t least) {
  if (size < least) refuse(name, least == 0 ? "a size of at least 0" : "a size of at least 1", size);
  if (size > kMostBytes) refuse(name, "a size of at most 2^48", size);
}

inline void check_dtype(const char* name, unike_dtype dtype) {
  if (dtype != UNIKE_F32 && dtype != UNIKE_BF16) refuse(name, "a dtype, UNIKE_F32 or UNIKE_BF16", dtype);
}

// `count` elements of `size` bytes, each aligned to its size; null only where there are none.
inline void check_memory(const char* name, const void* data, int64_t count, int64_t size) {
  if (count == 0) return;
  times(count, size);
  if (data == nullptr) refuse(name, "memory, not null, for so many elements", count);
  const auto beyond = static_cast<int64_t>(reinterpret_cast<uintptr_t>(data) % static_cast<uintptr_t>(size));
  if (beyond != 0) refuse(name, "elements aligned to their size", beyond);
}

template <typename T>
void check_array(const char* name, const T* data, int64_t count) {
  check_memory(name, data, count, sizeof(T));
}

inline void check_table(const char* name, const void* data, unike_dtype dtype, int64_t count) {
  check_dtype(name, dtype);
  check_memory(name, data, count, size_of(dtype));
}

// Where rows lie, in bytes.
struct Extent {
  uintptr_t first;
  int64_t rows, stride, width;
  uintptr_t end() const { return first + static_cast<uintptr_t>((rows - 1) * stride + width); }
};

// Rows that are read: any may be one and the same.
Extent check_rows(const char* name, const unike_rows& rows, int64_t count, int64_t width);
// Rows that are written: none overlaps the next one.
Extent check_rows_out(const char* name, const unike_rows_out& rows, int64_t count, int64_t width);
// Rows that are written while others are still read: the same rows, or no byte in common.
void check_apart(const char* name, const Extent& written, const Extent& read);

}  // namespace unike
