// What a search keeps of the keys.
#pragma once

#include <cstdint>

namespace unike {

// A key that may be among the k best: its score is within `error` of `score`, and 0 for a canonical score.
struct alignas(16) Candidate {
  float score, error;
  int64_t id;
};

}  // namespace unike
