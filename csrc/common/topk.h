// The k best candidates under the total order of the results: score descending, then id ascending.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

namespace unike {

struct Candidate {
  float score;
  int64_t id;
};

inline bool better(const Candidate& a, const Candidate& b) {
  return a.score > b.score || (a.score == b.score && a.id < b.id);
}

// Keeps the best `capacity` candidates of those pushed. The order is total, so the result does not depend on the order
// of the pushes, nor on how they were shared between several heaps that are merged afterwards.
class TopK {
 public:
  explicit TopK(int64_t capacity) : capacity_(capacity) {}

  void push(const Candidate& candidate) {
    if (static_cast<int64_t>(heap_.size()) < capacity_) {
      heap_.push_back(candidate);
      std::push_heap(heap_.begin(), heap_.end(), better);
    } else if (capacity_ > 0 && better(candidate, heap_.front())) {
      std::pop_heap(heap_.begin(), heap_.end(), better);
      heap_.back() = candidate;
      std::push_heap(heap_.begin(), heap_.end(), better);
    }
  }

  // A candidate with a score below this cannot enter.
  float threshold() const {
    return static_cast<int64_t>(heap_.size()) < capacity_ || heap_.empty() ? -std::numeric_limits<float>::infinity()
                                                                           : heap_.front().score;
  }

  void merge(const TopK& other) {
    for (const Candidate& candidate : other.heap_) push(candidate);
  }

  // Writes the candidates, best first, to k places, and pads the rest with score -inf and id -1. Leaves nothing behind.
  void write(int64_t k, float* scores, int64_t* ids) {
    std::sort_heap(heap_.begin(), heap_.end(), better);
    const auto found = static_cast<int64_t>(heap_.size());
    for (int64_t i = 0; i < found; ++i) {
      scores[i] = heap_[i].score;
      ids[i] = heap_[i].id;
    }
    std::fill(scores + found, scores + k, -std::numeric_limits<float>::infinity());
    std::fill(ids + found, ids + k, int64_t{-1});
    heap_.clear();
  }

 private:
  int64_t capacity_;
  std::vector<Candidate> heap_;  // a heap under `better`: the worst is in front
};

}  // namespace unike
