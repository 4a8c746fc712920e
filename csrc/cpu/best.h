// The best of many keys.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "cpu/scan_kernels.h"

namespace unike {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// A key and its canonical score, or the bound of it.
struct Scored {
  float score;
  int64_t id;
};

constexpr auto better = [](const Scored& a, const Scored& b) {
  return a.score > b.score || (a.score == b.score && a.id < b.id);
};

// The k best of what is added, in memory for a few more.
class Best {
 public:
  static constexpr int64_t kMore = 8 * kTile;

  Best(Scored* memory, int64_t k) : scored_(memory), k_(k) {}

  // Nothing below this is among the k best.
  float threshold() const { return threshold_; }
  int64_t count() const { return count_; }
  int64_t k() const { return k_; }

  // Room for a tile more.
  Scored* room() {
    if (count_ + kTile > k_ + kMore) prune();
    return scored_ + count_;
  }
  void added(int64_t count) { count_ += count; }

  // Drops all but the k best.
  void prune() {
    if (count_ < k_ || k_ == 0) return;
    std::nth_element(scored_, scored_ + k_ - 1, scored_ + count_, better);
    count_ = k_;
    threshold_ = scored_[k_ - 1].score;
  }

 private:
  Scored* scored_;
  int64_t k_, count_ = 0;
  float threshold_ = -kInfinity;
};

}  // namespace unike
