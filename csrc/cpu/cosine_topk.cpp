// Exact cosine top-k: a scan of codes estimates each score within a proved error, and the keys that it cannot rule out are
// scored in canonical arithmetic. cosine_pack.cpp makes the codes.
//
// A packed key is x = b u + s c + r: u the common direction, b and s numbers, c the codes, r the rest. A query is
// q = g u + w + e, with g = fl(q.u), w in float32 and e what its rounding left; w = t c' + z with c' its codes. Then
//   q.x = g along + s w.c + b (q.u - g) + q.r + e.(s c),   along = b + s u.c,   |q.r| <= |w| |r| + |g u.r| + |e| |r|,
//   s w.c = s t c'.c + s z.c,                              |s z.c| <= |z| |s c|.
// The estimate is g along + (t s) (c'.c); its error is at most |w| residual + |z| norm + slack, where slack covers what
// is left. With v = 2^-24: |q|, |x|, |u| <= 1 + 2^-22 and |e| <= 2.1 v, so |w| and |x - b u| are at most 1.01, |r| too as
// each code is the nearest to its value and 0 is one of them, |s c| and |t c'| at most 2.02, |b| at most 2.2. Then
//   |b (q.u - g)| <= 2.3 v; |g u.r| <= 2.3 v, since b is the rounded projection of x - s c on u; |e.(s c)| + |e| |r| <=
//   6.4 v; rounding of `along` 2.3 v and of its product with g 2.3 v; of c'.c (two conversions, a product and a sum), of
//   t s and of their product 6 * 4.1 v; of the sum 7 v; of score + error 2 v; the canonical sum d 2^-53 and its rounding v.
// Together that is below 64 v = 2^-18, and kSlack is twice as much. The error itself is computed in float32 from factors
// raised by 2^-20, which covers its four roundings.
// With floating-point codes t = 1 and c' = w, or w rounded to bfloat16, and the products are summed in float32: n rounded
// terms in a row are off by at most n v / (1 - n v) |c'| |c| in any order, fused or not (Higham, section 3.1). Terms below
// 2^-126 may count as 0. The rows themselves have s = 1, r = 0, and no direction is taken out of them.
//
// int8 products are exact integers. Queries have 16 bits, as c' = high + low / 254. For a few queries the keys come from
// memory more slowly than both products are made; for many, all keys are scored with `high` (where z is half a step), and
// with `low` only those that this does not rule out, while they are in the cache.
#include "cpu/cosine_topk.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>

#include "common/checked.h"
#include "common/cpu_isa.h"
#include "common/parallel.h"
#include "common/status.h"
#include "common/workspace.h"

namespace unike {
namespace {

constexpr float kSlack = 0x1p-17f;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Suspects that come in before they are pruned: a fresh threshold spares others, but costs canonical scores.
constexpr int64_t kPruneEvery = 2 * kTile;

// Queries that share a pass over the keys: 512 KB of codes in the L2 cache at 4 KB each.
constexpr int64_t kQueryBlock = 128;
// A thread with fewer than this would wait for memory: then all threads share the keys instead of the queries.
constexpr int64_t kQueriesPerThread = 16;
// Fewer queries share a pass where the suspects of all threads would need more than this.
constexpr int64_t kSuspectsBytes = 128 << 20;
// Up to so many, `low` is multiplied with all keys: high and low then fill one register block.
constexpr int64_t kWideQueries = 3;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Range {
  int64_t start, stop;
};

struct Query {
  Range range;       // the keys that it sees
  const float* row;  // canonical, of norm 1
  const void* codes;
  const void* low_codes;  // of an int8 scan
  QueryBounds bounds;
};

// A key that may be among the k best of a query: its score is within `error` of `score`, and 0 for a canonical score.
struct Suspect {
  float score, error;
  int64_t id;
};

struct Count {
  int64_t kept;   // suspects
  int64_t limit;  // beyond which they are pruned
};

constexpr auto by_score = [](const Suspect& a, const Suspect& b) {
  return a.score > b.score || (a.score == b.score && a.id < b.id);
};
constexpr auto by_lower_bound = [](const Suspect& a, const Suspect& b) {
  return a.score - a.error > b.score - b.error;
};

struct Problem {
  const unike_keys& keys;
  unike_rows queries;
  int64_t m, k;
  const int64_t* ranges;
};

class Search {
 public:
  Search(const Problem& p, const ScanKernels& kernels, int threads, Workspace& workspace)
      : p_(p),
        kernels_(kernels),
        keys_(p.keys),
        kept_(std::min(p.k, keys_.n)),
        capacity_(2 * kept_ + 2 * kPruneEvery),
        integers_(keys_.scan == UNIKE_SCAN_I8),
        narrow_(keys_.scan == UNIKE_SCAN_BF16 && kernels.narrow_queries),
        row_bytes_(padded_bytes(sizeof(float), keys_.d)),
        length_(keys_.scan == UNIKE_SCAN_F32 ? keys_.d : unike_code_bytes(keys_.scan, keys_.d) / (integers_ ? 1 : 2)),
        // Rows that lie whole pages apart would share a few sets of the caches.
        code_bytes_(padded_bytes(integers_ ? 1
                                 : narrow_ ? sizeof(BFloat16)
                                           : sizeof(float),
                                 length_) +
                    64) {
    threads_ =
        useful_threads(static_cast<double>(p.m) * static_cast<double>(keys_.n) * static_cast<double>(keys_.d), threads);
    group_ = std::min(kQueryBlock, ceil_div(p.m, threads_));
    slots_ = group_ >= kQueriesPerThread || threads_ == 1 ? 1 : threads_;
    if (slots_ > 1) group_ = std::min(kQueryBlock, p.m);
    const int64_t suspects_bytes = times(slots_, capacity_, sizeof(Suspect));
    block_ = std::min(slots_ > 1 ? group_ : group_ * threads_, std::max<int64_t>(kSuspectsBytes / suspects_bytes, 1));
    group_ = std::min(group_, block_);
    queries_ = workspace.take<Query>(block_);
    thresholds_ = workspace.take<float>(block_);
    counts_ = workspace.take<Count>(times(block_, slots_));
    suspects_ = workspace.take<Suspect>(times(block_, slots_, capacity_));
    rows_ = workspace.take<char>(times(block_, row_bytes_));
    codes_ = workspace.take<char>(times(block_, code_bytes_, integers_ ? 2 : 1));
    rests_ = workspace.take<char>(times(threads_, row_bytes_));
    raw_ = workspace.take<int32_t>(times(threads_, std::max(group_, 2 * kWideQueries), kTile));
    const double terms = (static_cast<double>(keys_.d) / kernels.lanes + kDepth) * 0x1p-24;
    rounding_ = static_cast<float>(terms < 0.5 ? terms / (1 - terms) * 1.0001 : kInfinity);
  }

  void run(float* scores, int64_t* ids) {
    for (int64_t first = 0; first < p_.m; first += block_) {
      const int64_t count = std::min(block_, p_.m - first);
      const auto pack_one = [&](int64_t q, int thread) { pack(first + q, q, thread); };
      const auto finish_one = [&](int64_t q, int threads) {
        finish(q, threads, scores + (first + q) * p_.k, ids + (first + q) * p_.k);
      };
      std::fill_n(thresholds_, count, -kInfinity);
      std::fill_n(counts_, count * slots_, Count{0, kept_ + kPruneEvery});
      if (slots_ == 1) {
        // Each thread takes a share of the queries through all keys, which the last-level cache gives to all of them.
        const int64_t groups = ceil_div(count, group_);
        parallel_for(groups, threads_, [&](int64_t g, int thread) {
          const int64_t from = g * count / groups, to = (g + 1) * count / groups;
          for (int64_t q = from; q < to; ++q) pack_one(q, thread);
          for (int64_t start = 0; start < keys_.n; start += kTile) scan_tile(start, from, to, 0, thread);
          for (int64_t q = from; q < to; ++q) finish_one(q, 1);
        });
        continue;
      }
      parallel_for(count, useful_threads(8.0 * static_cast<double>(count * keys_.d), threads_), pack_one);
      // Several runs of tiles for each thread, in case one is held up.
      const int64_t tiles = ceil_div(keys_.n, kTile), run = std::max<int64_t>(1, tiles / (8 * threads_));
      parallel_for(ceil_div(tiles, run), threads_, [&](int64_t task, int thread) {
        const int64_t stop = std::min(keys_.n, (task + 1) * run * kTile);
        for (int64_t start = task * run * kTile; start < stop; start += kTile) {
          scan_tile(start, 0, count, thread, thread);
        }
      });
      for (int64_t q = 0; q < count; ++q) finish_one(q, threads_);
    }
  }

 private:
  // Makes query number `index` the q-th of the block.
  void pack(int64_t index, int64_t q, int thread) {
    const auto* given = static_cast<const char*>(p_.queries.data);
    auto* row = reinterpret_cast<float*>(rows_ + q * row_bytes_);
    kernels_.normalize[p_.queries.dtype](given + index * p_.queries.stride * size_of(p_.queries.dtype), keys_.d, row);
    Query& query = queries_[q];
    query = {};
    query.row = row;
    if (std::isnan(row[0])) return;  // not finite: it sees no keys
    query.range = p_.ranges ? Range{p_.ranges[2 * index], p_.ranges[2 * index + 1]} : Range{0, keys_.n};
    QueryBounds& bounds = query.bounds;
    bounds.slack = kSlack;
    const float* direction = keys_.scan == UNIKE_SCAN_F32 ? nullptr : keys_.direction;
    char* codes = codes_ + q * code_bytes_ * (integers_ ? 2 : 1);
    query.codes = codes;
    std::fill_n(codes, code_bytes_ * (integers_ ? 2 : 1), 0);
    const bool as_they_are = !integers_ && !narrow_;
    auto* rest = reinterpret_cast<float*>(as_they_are ? codes : rests_ + thread * row_bytes_);
    kernels_.take_out(row, direction, keys_.d, rest, &bounds);
    if (integers_) {
      auto *high = reinterpret_cast<int8_t*>(codes), *low = high + code_bytes_;
      kernels_.quantize(rest, keys_.d, high, low, &bounds);
      query.low_codes = low;
      if (keys_.rows == nullptr) bounds.norm += bounds.low_norm;  // from one estimate to the other: the second is final
      return;
    }
    bounds.scale = 1.0f;
    if (narrow_) kernels_.narrow(rest, keys_.d, reinterpret_cast<BFloat16*>(codes), &bounds);
    bounds.norm = bounds.low_norm = (1 + rounding_) * bounds.norm + rounding_ * bounds.residual;
  }

  // Collects the suspects of the queries from, ..., to - 1 among the keys of a tile.
  void scan_tile(int64_t start, int64_t from, int64_t to, int64_t slot, int thread) {
    const int64_t stop = std::min(start + kTile, keys_.n), n = stop - start;
    int64_t active[kQueryBlock], count = 0;
    for (int64_t q = from; q < to; ++q) {
      const Range range = queries_[q].range;
      if (std::max(start, range.start) < std::min(stop, range.stop)) active[count++] = q;
    }
    if (count == 0) return;
    const bool wide = integers_ && count <= kWideQueries;
    const void* rows[std::max(kQueryBlock, 2 * kWideQueries)];
    for (int64_t a = 0; a < count; ++a) {
      rows[a] = queries_[active[a]].codes;
      if (wide) rows[count + a] = queries_[active[a]].low_codes;
    }
    const void* tile[kTile];
    for (int64_t i = 0; i < n; ++i) tile[i] = key_codes(start + i);
    int32_t* raw = raw_ + thread * std::max(group_, 2 * kWideQueries) * kTile;
    kernels_.tile[keys_.scan](rows, wide ? 2 * count : count, tile, n, length_, true, raw);
    TileBounds bounds;
    load_bounds(start, n, bounds);
    for (int64_t a = 0; a < count; ++a) {
      const int32_t* low = wide ? raw + (count + a) * kTile : nullptr;
      collect(active[a], start, n, tile, raw + a * kTile, low, bounds, slot);
    }
  }

  const char* key_codes(int64_t id) const {
    if (keys_.scan == UNIKE_SCAN_F32) return reinterpret_cast<const char*>(keys_.rows + id * keys_.stride);
    return static_cast<const char*>(keys_.codes) + id * padded_bytes(integers_ ? 1 : 2, keys_.d);
  }

  // The bounds of n keys; the vector lanes beyond them repeat the last one.
  void load_bounds(int64_t start, int64_t n, TileBounds& out) const {
    KeyBounds padded[kTile];
    const auto* bounds = reinterpret_cast<const KeyBounds*>(keys_.bounds) + start;
    if (keys_.scan == UNIKE_SCAN_F32 || n < kTile) {
      for (int64_t i = 0; i < kTile; ++i) {
        padded[i] = keys_.scan == UNIKE_SCAN_F32 ? KeyBounds{1, 0, 0, 1} : bounds[std::min(i, n - 1)];
      }
      bounds = padded;
    }
    kernels_.load_bounds(bounds, &out);
  }

  void collect(int64_t q, int64_t start, int64_t n, const void* const* tile, const int32_t* raw, const int32_t* low,
               const TileBounds& bounds, int64_t slot) {
    const Query& query = queries_[q];
    auto& [kept, limit] = counts_[q * slots_ + slot];
    Suspect* suspects = suspects_ + (q * slots_ + slot) * capacity_;
    if (kept > limit) {
      kept = prune(q, suspects, kept);
      limit = std::min(kept + kPruneEvery, capacity_ - kTile);
    }
    int32_t found[kTile];
    int64_t count = kernels_.survivors(raw, low, integers_, bounds, query.bounds, threshold(q), found);
    const int64_t first = query.range.start - start, last = std::min(query.range.stop - start, n);
    count = std::remove_if(found, found + count, [&](int32_t i) { return i < first || i >= last; }) - found;
    if (count == 0) return;
    int32_t refined[kTile];
    if (integers_ && low == nullptr) {
      const void* rows[kTile];
      for (int64_t s = 0; s < count; ++s) rows[s] = tile[found[s]];
      kernels_.tile[keys_.scan](&query.low_codes, 1, rows, count, length_, false, refined);
    }
    for (int64_t s = 0; s < count; ++s) {
      const int32_t i = found[s];
      float product;
      if (integers_) {
        const int32_t rest = low == nullptr ? refined[s] : low[i];
        product = static_cast<float>(raw[i] - query.bounds.high_offset) +
                  static_cast<float>(rest - query.bounds.low_offset) * (1.0f / kLowSteps);
      } else {
        __builtin_memcpy(&product, raw + i, sizeof product);
      }
      const QueryBounds& of = query.bounds;
      const float score = of.along * bounds.along[i] + of.scale * bounds.scale[i] * product;
      const float error = of.residual * bounds.residual[i] + of.low_norm * bounds.norm[i] + of.slack;
      if (score + error >= threshold(q)) suspects[kept++] = {score, keys_.rows ? error : 0.0f, start + i};
    }
  }

  // No key with a score below this is among the k best of query q.
  float threshold(int64_t q) const { return std::atomic_ref(thresholds_[q]).load(std::memory_order_relaxed); }

  void raise_threshold(int64_t q, float score) {
    std::atomic_ref shared(thresholds_[q]);
    float old = shared.load(std::memory_order_relaxed);
    while (old < score && !shared.compare_exchange_weak(old, score, std::memory_order_relaxed)) {
    }
  }

  // Drops what the threshold rules out; returns how many are left.
  int64_t without_hopeless(int64_t q, Suspect* suspects, int64_t from, int64_t count) const {
    const auto hopeless = [t = threshold(q)](const Suspect& s) { return s.score + s.error < t; };
    return std::remove_if(suspects + from, suspects + count, hopeless) - suspects;
  }

  // Moves the k best guesses to the front and gives them their canonical scores. The worst of these rules out most of the
  // others; returns how many are left in all.
  int64_t rule_out(int64_t q, Suspect* suspects, int64_t count, int threads) {
    const int64_t best = std::min(kept_, count);
    std::nth_element(suspects, suspects + best, suspects + count, by_score);
    resolve(q, suspects, best, threads);
    if (best < kept_) return count;
    raise_threshold(q, std::max_element(suspects, suspects + best, by_score)->score);
    return without_hopeless(q, suspects, best, count);
  }

  // Makes room for the survivors of a tile. The k-th largest lower bound costs no look at the rows; where the errors are
  // larger than the gaps between the scores, it does not help much.
  int64_t prune(int64_t q, Suspect* suspects, int64_t count) {
    if (kept_ == 0) return 0;
    Suspect* last = suspects + kept_ - 1;
    std::nth_element(suspects, last, suspects + count, by_lower_bound);
    raise_threshold(q, last->score - last->error);
    count = without_hopeless(q, suspects, 0, count);
    if (count <= kept_ + kPruneEvery / 2) return count;
    count = rule_out(q, suspects, count, 1);
    if (count <= capacity_ / 2) return count;
    resolve(q, suspects, count, 1);
    std::nth_element(suspects, suspects + kept_, suspects + count, by_score);
    return kept_;
  }

  // Gives the suspects their canonical scores.
  void resolve(int64_t q, Suspect* suspects, int64_t count, int threads) const {
    constexpr int64_t kBatch = 64;
    if (keys_.rows == nullptr) return;
    const double work = static_cast<double>(count) * static_cast<double>(keys_.d);
    parallel_for(ceil_div(count, kBatch), useful_threads(work, threads), [&](int64_t batch, int) {
      Suspect* open[kBatch];
      const float* rows[kBatch] = {};
      float scores[kBatch];
      int64_t n = 0;
      for (Suspect* s = suspects + batch * kBatch; s < suspects + std::min(count, (batch + 1) * kBatch); ++s) {
        if (s->error == 0.0f) continue;
        open[n] = s;
        rows[n++] = keys_.rows + s->id * keys_.stride;
      }
      kernels_.canonical(queries_[q].row, rows, n, keys_.d, scores);
      for (int64_t i = 0; i < n; ++i) *open[i] = {scores[i], 0.0f, open[i]->id};
    });
  }

  void finish(int64_t q, int threads, float* scores, int64_t* ids) {
    Suspect* all = suspects_ + q * slots_ * capacity_;
    int64_t count = 0;
    for (int64_t slot = 0; slot < slots_; ++slot) {
      const Suspect* of = all + slot * capacity_;
      const int64_t n = counts_[q * slots_ + slot].kept;
      if (of != all + count) std::copy(of, of + n, all + count);
      count += n;
    }
    count = rule_out(q, all, count, threads);
    const int64_t best = std::min(kept_, count);
    resolve(q, all + best, count - best, threads);
    std::partial_sort(all, all + best, all + count, by_score);
    for (int64_t i = 0; i < p_.k; ++i) {
      scores[i] = i < best ? all[i].score : -kInfinity;
      ids[i] = i < best ? all[i].id : -1;
    }
  }

  const Problem& p_;
  const ScanKernels& kernels_;
  const unike_keys& keys_;
  int threads_;
  int64_t block_;                            // queries that the workspace has room for
  int64_t group_;                            // of these that share a pass over the keys
  int64_t slots_;                            // for the suspects of a query: one, or one for each thread
  int64_t kept_;                             // of each query: k, or n if that is less
  int64_t capacity_;                         // for the suspects that a thread has of a query
  bool integers_;                            // of the products
  bool narrow_;                              // bfloat16 queries
  int64_t row_bytes_, length_, code_bytes_;  // of a query: its row, the elements of its codes and their room
  float rounding_;                           // of float products: relative to the norms

  Query* queries_;
  float* thresholds_;
  Count* counts_;      // [block, slots]
  Suspect* suspects_;  // [block, slots, capacity]
  char *rows_, *codes_, *rests_;
  int32_t* raw_;
};

void check(const unike_keys& keys) {
  check_size("keys.n", keys.n, 0);
  check_size("keys.stride", keys.stride, 0);
  check_size("keys.d", keys.d, 1);
  times(keys.n, std::max(keys.d, keys.stride), sizeof(float));
  require(UNIKE_SCAN_F32 <= keys.scan && keys.scan <= UNIKE_SCAN_I8, "scan names none of the scans");
  if (keys.n == 0) return;
  if (keys.rows != nullptr) check_array("keys.rows", keys.rows, (keys.n - 1) * keys.stride + keys.d);
  if (keys.scan == UNIKE_SCAN_F32) {
    require(keys.rows != nullptr, "a scan of float32 rows needs the rows");
  } else {
    require(keys.codes != nullptr && keys.bounds != nullptr && keys.direction != nullptr,
            "codes, bounds and direction of packed keys must not be null");
    require(unike_code_bytes(keys.scan, keys.d) > 0, "d is too large for an int8 scan");
    const int64_t size = keys.scan == UNIKE_SCAN_I8 ? 1 : 2;
    check_memory("keys.codes", keys.codes, times(keys.n, unike_code_bytes(keys.scan, keys.d)) / size, size);
    check_array("keys.bounds", keys.bounds, times(keys.n, UNIKE_KEY_BOUNDS));
    check_array("keys.direction", keys.direction, keys.d);
  }
}

void check_counts(int64_t m, int64_t k, int64_t d) {
  check_size("m", m, 0);
  check_size("k", k, 0);
  times(m, k, sizeof(int64_t));
  times(m, d, sizeof(float));
}

}  // namespace
}  // namespace unike

extern "C" int64_t unike_cosine_topk_workspace(const unike_keys* keys, int64_t m, int64_t k, int threads) {
  using namespace unike;
  return guarded_bytes([&] {
    require(keys != nullptr, "keys must not be null");
    check(*keys);
    check_counts(m, k, keys->d);
    Workspace workspace;
    if (m > 0 && k > 0) {
      const Problem problem{*keys, {}, m, k, nullptr};
      Search(problem, UNIKE_PICK_NARROW(scan_kernels), threads_of_call(threads), workspace);
    }
    return workspace.bytes();
  });
}

extern "C" unike_status unike_cosine_topk(const unike_keys* keys, unike_rows queries, int64_t m, int64_t k,
                                          const int64_t* ranges, float* scores, int64_t* ids, void* workspace,
                                          int64_t workspace_bytes, int threads) {
  using namespace unike;
  return guarded([&] {
    require(keys != nullptr, "keys must not be null");
    check(*keys);
    check_counts(m, k, keys->d);
    check_rows("queries", queries, m, keys->d);
    check_array("scores", scores, m * k);
    check_array("ids", ids, m * k);
    if (ranges != nullptr) check_array("ranges", ranges, 2 * m);
    for (int64_t q = 0; ranges != nullptr && q < m; ++q) {
      require(0 <= ranges[2 * q] && ranges[2 * q] <= ranges[2 * q + 1] && ranges[2 * q + 1] <= keys->n,
              "the bounds of each query must satisfy 0 <= start <= stop <= n");
    }
    if (m == 0 || k == 0) return;
    Workspace memory(workspace, workspace_bytes);
    const Problem problem{*keys, queries, m, k, ranges};
    Search(problem, UNIKE_PICK_NARROW(scan_kernels), threads_of_call(threads), memory).run(scores, ids);
  });
}
