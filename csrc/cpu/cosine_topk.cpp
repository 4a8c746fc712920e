// Exact cosine top-k: a scan of codes estimates each score within a proved error (EXACTNESS.md), and the keys that it
// cannot rule out are scored in canonical arithmetic (candidates.h). cosine_pack.cpp makes the codes.
#include "unike/cosine_topk.h"

#include <algorithm>
#include <cmath>

#include "common/checked.h"
#include "common/parallel.h"
#include "common/poll.h"
#include "common/status.h"
#include "common/workspace.h"
#include "cpu/candidates.h"
#include "cpu/isa.h"

namespace unike {
namespace {

// What rounding may add to an error.
constexpr float kSlack = 0x1p-17f;

// Queries that share a pass over the keys: 512 KB of codes in the L2 cache at 4 KB each.
constexpr int64_t kQueryBlock = 128;
// A thread with fewer than this would wait for memory: then all threads share the keys instead of the queries.
constexpr int64_t kQueriesPerThread = 16;
// Fewer queries share a pass where the candidates of all threads would need more than this.
constexpr int64_t kCandidatesBytes = 128 << 20;
// Up to so many, `low` is multiplied with all keys: high and low then fill one register block.
constexpr int64_t kWideQueries = 3;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Range {
  int64_t start, stop;
};

struct Query {
  Range range;  // the keys that it sees
  const void* codes;
  const void* low_codes;  // of an int8 scan
  QueryBounds bounds;
};

struct Problem {
  const unike_keys& keys;
  unike_rows queries;
  int64_t m, k;
  const int64_t* ranges;
};

class CosineTopK {
 public:
  CosineTopK(const Problem& p, const ScanKernels& kernels, int threads, Workspace& workspace)
      : p_(p),
        kernels_(kernels),
        keys_(p.keys),
        candidates_(keys_, kernels, p.k),
        integers_(keys_.scan == UNIKE_SCAN_I8),
        narrow_(keys_.scan == UNIKE_SCAN_BF16 && kernels.narrow_queries),
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
    const int64_t most = std::max<int64_t>(kCandidatesBytes / candidates_.bytes_of_query(slots_), 1);
    block_ = std::min(slots_ > 1 ? group_ : group_ * threads_, most);
    group_ = std::min(group_, block_);
    queries_ = workspace.take<Query>(block_);
    candidates_.take(block_, slots_, workspace);
    codes_ = workspace.take<char>(times(block_, code_bytes_, integers_ ? 2 : 1));
    rests_ = workspace.take<char>(times(threads_, candidates_.row_bytes()));
    raw_ = workspace.take<int32_t>(times(threads_, std::max(group_, 2 * kWideQueries), kTile));
    const double terms = (static_cast<double>(keys_.d) / kernels.lanes + kDepth) * 0x1p-24;
    rounding_ = static_cast<float>(terms < 0.5 ? terms / (1 - terms) * 1.0001 : kInfinity);
  }

  void run(float* scores, int64_t* ids) {
    for (int64_t first = 0; first < p_.m; first += block_) {
      const int64_t count = std::min(block_, p_.m - first);
      const auto pack_one = [&](int64_t q, int thread) { pack(first + q, q, thread); };
      const auto finish_one = [&](int64_t q, int threads) {
        candidates_.finish(q, threads, scores + (first + q) * p_.k, ids + (first + q) * p_.k);
      };
      candidates_.clear(count);
      if (slots_ == 1) {
        // Each thread takes a share of the queries through all keys, which the last-level cache gives to all of them.
        const int64_t groups = ceil_div(count, group_);
        parallel_for(groups, threads_, [&](int64_t g, int thread) {
          const int64_t from = g * count / groups, to = (g + 1) * count / groups;
          for (int64_t q = from; q < to; ++q) pack_one(q, thread);
          for (int64_t start = 0; start < keys_.n; start += kTile) {
            poll();
            scan_tile(start, from, to, 0, thread);
          }
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
          poll();
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
    float* row = candidates_.row(q);
    kernels_.normalize[p_.queries.dtype](given + index * p_.queries.stride * size_of(p_.queries.dtype), keys_.d, row);
    Query& query = queries_[q];
    query = {};
    if (std::isnan(row[0])) return;  // not finite: it sees no keys
    query.range = p_.ranges ? Range{p_.ranges[2 * index], p_.ranges[2 * index + 1]} : Range{0, keys_.n};
    QueryBounds& bounds = query.bounds;
    bounds.slack = kSlack;
    const float* direction = keys_.scan == UNIKE_SCAN_F32 ? nullptr : keys_.direction;
    char* codes = codes_ + q * code_bytes_ * (integers_ ? 2 : 1);
    query.codes = codes;
    std::fill_n(codes, code_bytes_ * (integers_ ? 2 : 1), 0);
    const bool as_they_are = !integers_ && !narrow_;
    auto* rest = reinterpret_cast<float*>(as_they_are ? codes : rests_ + thread * candidates_.row_bytes());
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

  // Collects the candidates of the queries from, ..., to - 1 among the keys of a tile.
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
    candidates_.make_room(q, slot);
    int32_t found[kTile];
    int64_t count = kernels_.survivors(raw, low, integers_, bounds, query.bounds, candidates_.threshold(q), found);
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
      const float score = of.projection * bounds.projection[i] + of.scale * bounds.scale[i] * product;
      const float error = of.residual * bounds.residual[i] + of.low_norm * bounds.norm[i] + of.slack;
      if (score + error >= candidates_.threshold(q)) {
        candidates_.add(q, slot, {score, keys_.rows ? error : 0.0f, start + i});
      }
    }
  }

  const Problem& p_;
  const ScanKernels& kernels_;
  const unike_keys& keys_;
  Candidates candidates_;
  int threads_;
  int64_t block_;                // queries that the workspace has room for
  int64_t group_;                // of these that share a pass over the keys
  int64_t slots_;                // for the candidates of a query: one, or one for each thread
  bool integers_;                // of the products
  bool narrow_;                  // bfloat16 queries
  int64_t length_, code_bytes_;  // of a query's codes: elements, and their room
  float rounding_;               // of float products: relative to the norms

  Query* queries_;
  char *codes_, *rests_;
  int32_t* raw_;
};

void check_sizes(const unike_keys& keys, int64_t m, int64_t k) {
  check_size("keys.n", keys.n, 0);
  check_size("keys.stride", keys.stride, 0);
  check_size("keys.d", keys.d, 1);
  times(keys.n, std::max(keys.d, keys.stride), sizeof(float));
  require(UNIKE_SCAN_F32 <= keys.scan && keys.scan <= UNIKE_SCAN_I8, "scan names none of the scans");
  require(keys.n == 0 || keys.scan == UNIKE_SCAN_F32 || unike_code_bytes(keys.scan, keys.d) > 0,
          "d is too large for an int8 scan");
  check_size("m", m, 0);
  check_size("k", k, 0);
  times(m, k, sizeof(int64_t));
  times(m, keys.d, sizeof(float));
}

void check(const unike_keys& keys) {
  if (keys.n == 0) return;
  if (keys.rows != nullptr) check_array("keys.rows", keys.rows, (keys.n - 1) * keys.stride + keys.d);
  if (keys.scan == UNIKE_SCAN_F32) {
    require(keys.rows != nullptr, "a scan of float32 rows needs the rows");
  } else {
    require(keys.codes != nullptr && keys.bounds != nullptr && keys.direction != nullptr,
            "codes, bounds and direction of packed keys must not be null");
    const int64_t size = keys.scan == UNIKE_SCAN_I8 ? 1 : 2;
    check_memory("keys.codes", keys.codes, times(keys.n, unike_code_bytes(keys.scan, keys.d)) / size, size);
    check_array("keys.bounds", keys.bounds, times(keys.n, UNIKE_KEY_BOUNDS));
    check_array("keys.direction", keys.direction, keys.d);
  }
}

}  // namespace
}  // namespace unike

extern "C" int64_t unike_cosine_topk_workspace(const unike_keys* keys, int64_t m, int64_t k, int threads) {
  using namespace unike;
  return guarded_bytes([&] {
    require(keys != nullptr, "keys must not be null");
    check_sizes(*keys, m, k);
    Workspace workspace;
    if (m > 0 && k > 0) {
      const Problem problem{*keys, {}, m, k, nullptr};
      CosineTopK(problem, scan_kernels(), threads_of_call(threads), workspace);
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
    check_sizes(*keys, m, k);
    check(*keys);
    check_rows("queries", queries, m, keys->d);
    check_array("scores", scores, m * k);
    check_array("ids", ids, m * k);
    if (ranges != nullptr) check_array("ranges", ranges, 2 * m);
    for (int64_t q = 0; ranges != nullptr && q < m; ++q) {
      require(0 <= ranges[2 * q] && ranges[2 * q] <= ranges[2 * q + 1] && ranges[2 * q + 1] <= keys->n,
              "the ranges of each query must satisfy 0 <= start <= stop <= n");
    }
    if (m == 0 || k == 0) return;
    Workspace memory(workspace, workspace_bytes);
    const Problem problem{*keys, queries, m, k, ranges};
    CosineTopK(problem, scan_kernels(), threads_of_call(threads), memory).run(scores, ids);
  });
}
