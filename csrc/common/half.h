// 16-bit floating-point numbers as they lie in memory.
#pragma once

#include <cstdint>

namespace unike {

// The upper half of a float32.
struct BFloat16 {
  uint16_t bits;
};

// IEEE 754 binary16.
using Float16 = _Float16;

}  // namespace unike
