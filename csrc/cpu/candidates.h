// The keys that may be among the k best of a query: collected by a scan, pruned, and scored in canonical arithmetic.
#pragma once

#include <algorithm>
#include <atomic>
#include <limits>

#include "common/candidate.h"
#include "common/checked.h"
#include "common/parallel.h"
#include "common/workspace.h"
#include "cpu/scan_kernels.h"

namespace unike {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// The candidates of a block of queries. Each query has a threshold, which all threads share and which only rises, and a
// list for each slot, which one thread fills at a time.
class Candidates {
 public:
  Candidates(const unike_keys& keys, const ScanKernels& kernels, int64_t k)
      : keys_(keys), kernels_(kernels), k_(k), kept_(std::min(k, keys.n)), capacity_(2 * kept_ + 2 * kPruneEvery) {}

  int64_t bytes_of_query(int64_t slots) const { return times(slots, capacity_, sizeof(Candidate)); }

  void take(int64_t block, int64_t slots, Workspace& workspace) {
    slots_ = slots;
    thresholds_ = workspace.take<float>(block);
    counts_ = workspace.take<Count>(times(block, slots));
    candidates_ = workspace.take<Candidate>(times(block, slots, capacity_));
    rows_ = workspace.take<char>(times(block, row_bytes()));
  }

  // For the next block.
  void clear(int64_t queries) {
    std::fill_n(thresholds_, queries, -kInfinity);
    std::fill_n(counts_, queries * slots_, Count{0, kept_ + kPruneEvery});
  }

  // The unit row of a query, for the caller to write.
  int64_t row_bytes() const { return padded_bytes(sizeof(float), keys_.d); }
  float* row(int64_t q) const { return reinterpret_cast<float*>(rows_ + q * row_bytes()); }

  // No key with a score below this is among the k best of query q.
  float threshold(int64_t q) const { return std::atomic_ref(thresholds_[q]).load(std::memory_order_relaxed); }

  // Makes room for the keys of a tile.
  void make_room(int64_t q, int64_t slot) {
    auto& [count, limit] = counts_[q * slots_ + slot];
    if (count <= limit) return;
    count = prune(q, list(q, slot), count);
    limit = std::min(count + kPruneEvery, capacity_ - kTile);
  }

  void add(int64_t q, int64_t slot, const Candidate& candidate) {
    list(q, slot)[counts_[q * slots_ + slot].candidates++] = candidate;
  }

  // Writes the k best, best first; id -1 and score -inf where there are no more.
  void finish(int64_t q, int threads, float* scores, int64_t* ids) {
    Candidate* all = list(q, 0);
    int64_t count = 0;
    for (int64_t slot = 0; slot < slots_; ++slot) {
      const Candidate* of = list(q, slot);
      const int64_t n = counts_[q * slots_ + slot].candidates;
      if (of != all + count) std::copy(of, of + n, all + count);
      count += n;
    }
    count = rule_out(q, all, count, threads);
    const int64_t best = std::min(kept_, count);
    resolve(q, all + best, count - best, threads);
    std::partial_sort(all, all + best, all + count, by_score);
    for (int64_t i = 0; i < k_; ++i) {
      scores[i] = i < best ? all[i].score : -kInfinity;
      ids[i] = i < best ? all[i].id : -1;
    }
  }

 private:
  // Candidates that come in before they are pruned: a fresh threshold spares others, but costs canonical scores.
  static constexpr int64_t kPruneEvery = 2 * kTile;

  struct Count {
    int64_t candidates;
    int64_t limit;  // beyond which they are pruned
  };

  static constexpr auto by_score = [](const Candidate& a, const Candidate& b) {
    return a.score > b.score || (a.score == b.score && a.id < b.id);
  };
  static constexpr auto by_lower_bound = [](const Candidate& a, const Candidate& b) {
    return a.score - a.error > b.score - b.error;
  };

  Candidate* list(int64_t q, int64_t slot) const { return candidates_ + (q * slots_ + slot) * capacity_; }

  void raise_threshold(int64_t q, float score) {
    std::atomic_ref shared(thresholds_[q]);
    float old = shared.load(std::memory_order_relaxed);
    while (old < score && !shared.compare_exchange_weak(old, score, std::memory_order_relaxed)) {
    }
  }

  // Drops what the threshold rules out; returns how many are left.
  int64_t drop_pruned(int64_t q, Candidate* candidates, int64_t from, int64_t count) const {
    const auto pruned = [t = threshold(q)](const Candidate& c) { return c.score + c.error < t; };
    return std::remove_if(candidates + from, candidates + count, pruned) - candidates;
  }

  // Moves the k best guesses to the front and gives them their canonical scores. The worst of these rules out most of
  // the others; returns how many are left in all.
  int64_t rule_out(int64_t q, Candidate* candidates, int64_t count, int threads) {
    const int64_t best = std::min(kept_, count);
    std::nth_element(candidates, candidates + best, candidates + count, by_score);
    resolve(q, candidates, best, threads);
    if (best < kept_) return count;
    raise_threshold(q, std::max_element(candidates, candidates + best, by_score)->score);
    return drop_pruned(q, candidates, best, count);
  }

  // Makes room for the survivors of a tile. The k-th largest lower bound costs no look at the rows; where the errors
  // are larger than the gaps between the scores, it does not help much.
  int64_t prune(int64_t q, Candidate* candidates, int64_t count) {
    if (kept_ == 0) return 0;
    Candidate* last = candidates + kept_ - 1;
    std::nth_element(candidates, last, candidates + count, by_lower_bound);
    raise_threshold(q, last->score - last->error);
    count = drop_pruned(q, candidates, 0, count);
    if (count <= kept_ + kPruneEvery / 2) return count;
    count = rule_out(q, candidates, count, 1);
    if (count <= capacity_ / 2) return count;
    resolve(q, candidates, count, 1);
    std::nth_element(candidates, candidates + kept_, candidates + count, by_score);
    return kept_;
  }

  // Gives the candidates their canonical scores.
  void resolve(int64_t q, Candidate* candidates, int64_t count, int threads) const {
    constexpr int64_t kBatch = 64;
    if (keys_.rows == nullptr) return;
    const double work = static_cast<double>(count) * static_cast<double>(keys_.d);
    parallel_for((count + kBatch - 1) / kBatch, useful_threads(work, threads), [&](int64_t batch, int) {
      Candidate* estimated[kBatch];
      const float* rows[kBatch] = {};
      float scores[kBatch];
      int64_t n = 0;
      for (Candidate* c = candidates + batch * kBatch; c < candidates + std::min(count, (batch + 1) * kBatch); ++c) {
        if (c->error == 0.0f) continue;
        estimated[n] = c;
        rows[n++] = keys_.rows + c->id * keys_.stride;
      }
      kernels_.canonical(row(q), rows, n, keys_.d, scores);
      for (int64_t i = 0; i < n; ++i) *estimated[i] = {scores[i], 0.0f, estimated[i]->id};
    });
  }

  const unike_keys& keys_;
  const ScanKernels& kernels_;
  int64_t k_, kept_;   // of each query: as asked for, and as there are
  int64_t capacity_;   // of a list
  int64_t slots_ = 0;  // lists of a query

  float* thresholds_ = nullptr;
  Count* counts_ = nullptr;          // [block, slots]
  Candidate* candidates_ = nullptr;  // [block, slots, capacity]
  char* rows_ = nullptr;             // [block, row_bytes]
};

}  // namespace unike
