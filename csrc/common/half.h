// 16-bit floating-point numbers as they lie in memory.
#pragma once

#include <cstdint>

namespace unike {

// The upper half of a float32.
struct BFloat16 {
  uint16_t bits;
};

// IEEE 754 binary16. Not _Float16, which not every compiler has for every machine.
struct Float16 {
  uint16_t bits;
};

}  // namespace unike
