// The upper half of a float32.
#pragma once

#include <cstdint>

namespace unike {

struct BFloat16 {
  uint16_t bits;
};

}  // namespace unike
