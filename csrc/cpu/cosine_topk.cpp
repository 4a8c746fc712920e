// Exact cosine top-k in two phases. The scan multiplies codes and keeps one number for each query and key: an upper bound of
// the score, an estimate plus its proved error (EXACTNESS.md). Then the k keys of the highest bounds get canonical scores;
// a key whose bound is below the least of these is not among the k best, so that few others are looked at again: their
// codes with all bits of the query, and, unless these rule them out, their rows. No threshold is needed while keys are
// scanned, and the one that is used has seen all of them. cosine_pack.cpp makes the codes.
//
// Few queries of keys that have leading directions scan the codes of these instead, and replace the bounds of those keys that
// this leaves by the ones of all their codes. What follows is the same.
#include "unike/cosine_topk.h"

#include <algorithm>
#include <cmath>

#include "common/checked.h"
#include "common/parallel.h"
#include "common/poll.h"
#include "common/status.h"
#include "common/workspace.h"
#include "cpu/best.h"
#include "cpu/isa.h"
#include "cpu/query_coder.h"

namespace unike {
namespace {

// Queries that share a pass over the keys: 512 KB of codes in the L2 cache at 4 KB each.
constexpr int64_t kQueryBlock = 128;
// Fewer where the bounds of so many would need more than this, but no less than a quarter.
constexpr int64_t kBoundsBytes = 128 << 20;
// So many queries may want enough of the same keys.
constexpr int64_t kSharing = 16;
// Codes of keys that stay in the L2 cache.
constexpr int64_t kCachedBytes = 512 << 10;
// Tiles whose bounds are on their way.
constexpr int64_t kFetched = 4;
// Up to so many, `low` is multiplied with all keys: high and low then fill one register block. Where codes are arranged, half a
// group is.
constexpr int64_t kWideQueries = 3;
// Up to so many read the leading codes first.
constexpr int64_t kLeadingQueries = 8;
// For each key that is wanted, so many are looked at with all codes before others are ruled out.
constexpr int64_t kLikely = 4;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Range {
  int64_t start, stop;
};

struct Query {
  Range range;  // the keys that it sees
  Coded whole, leading;
  float reached;  // of the scores, by k keys; -inf: nothing is known
  int64_t found;  // k keys, or those that there are
  bool many;      // of its tiles have keys that may be among the best
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
        kept_(std::min(p.k, p.keys.n)),
        tiles_(ceil_div(p.keys.n, kTile)),
        integers_(keys_.scan == UNIKE_SCAN_I8),
        arranged_(integers_ && kernels.arranged.tile != nullptr),
        wide_queries_(arranged_ ? kernels.arranged.group / 2 : kWideQueries),
        length_(keys_.scan == UNIKE_SCAN_F32 ? keys_.d : unike_code_bytes(keys_.scan, keys_.d) / (integers_ ? 1 : 2)),
        p_leading_(keys_.leading.p),
        coder_(keys_, kernels, length_),
        row_bytes_(padded_bytes(sizeof(float), keys_.d)) {
    threads_ =
        useful_threads(static_cast<double>(p.m) * static_cast<double>(keys_.n) * static_cast<double>(keys_.d), threads);
    const int64_t bytes = plus(times(std::max<int64_t>(tiles_, 1), kTile, sizeof(float)), times(kept_, sizeof(Scored)));
    block_ = std::min(p.m, std::clamp(kBoundsBytes / bytes, kQueryBlock / 4, kQueryBlock));
    active_ = workspace.take<int64_t>(p.m);
    queries_ = workspace.take<Query>(block_);
    rows_ = workspace.take<char>(times(block_, row_bytes_));
    codes_ = workspace.take<char>(times(block_, coder_.bytes()));
    leading_codes_ = workspace.take<char>(times(std::min(block_, kLeadingQueries), coder_.leading_bytes()));
    arranged_codes_ = workspace.take<char>(arranged_ ? times(coded_size(), length_) : 0);
    bounds_ = workspace.take<float>(times(block_, tiles_, kTile));
    largest_ = workspace.take<float>(times(block_, tiles_));
    rests_ = workspace.take<char>(times(threads_, row_bytes_));
    raw_ = workspace.take<int32_t>(times(threads_, raw_size()));
    maxima_ = workspace.take<float>(times(threads_, tiles_));
    found_ = workspace.take<Scored>(times(block_, kept_));
    scored_ = workspace.take<Scored>(times(threads_, scored_size()));
  }

  void run(float* scores, int64_t* ids) {
    const int64_t active = find_active(scores, ids);
    for (int64_t first = 0; first < active; first += block_) {
      const int64_t count = std::min(block_, active - first);
      const int64_t* of_block = active_ + first;
      in_block_ = count;
      wide_ = integers_ && count <= wide_queries_;
      by_leading_ = p_leading_ > 0 && count <= kLeadingQueries;
      parallel_for(count, useful_threads(8.0 * static_cast<double>(count * keys_.d), threads_),
                   [&](int64_t q, int thread) { pack(of_block[q], q, thread); });
      if (arranged_ && !by_leading_) arrange(count);
      scan(count, by_leading_ ? &Query::leading : &Query::whole);
      if (by_leading_) {
        parallel_for(count, threads_,
                     [&](int64_t q, int thread) { queries_[q].reached = reached_by_codes(q, thread); });
        each_run(count, [&](int64_t first, int64_t last, int64_t from, int64_t to, int) {
          for (int64_t q = from; q < to; ++q) look_again(q, first, last);
        });
      }
      parallel_for(count, threads_, [&](int64_t q, int thread) { find_likely(q, thread, count >= kSharing); });
      if (std::any_of(queries_, queries_ + count, [](const Query& query) { return query.many; })) {
        // As many tiles at a time as stay in the L2 cache for all queries.
        const int64_t some = std::max<int64_t>(1, kCachedBytes / (kTile * length_));
        each_run(count, [&](int64_t first, int64_t last, int64_t from, int64_t to, int) {
          for (; first < last; first += some) {
            poll();
            for (int64_t q = from; q < to; ++q) {
              if (queries_[q].many) look_again(q, first, std::min(first + some, last));
            }
          }
        });
      }
      parallel_for(count, threads_, [&](int64_t q, int thread) {
        finish(q, thread, scores + of_block[q] * p_.k, ids + of_block[q] * p_.k);
      });
    }
  }

 private:
  // Lists the queries that see a key; the others have their result.
  int64_t find_active(float* scores, int64_t* ids) {
    int64_t count = 0;
    for (int64_t q = 0; q < p_.m; ++q) {
      const Range range = range_of(q);
      if (range.start < range.stop) {
        active_[count++] = q;
      } else {
        write({}, 0, scores + q * p_.k, ids + q * p_.k);
      }
    }
    return count;
  }

  Range range_of(int64_t index) const {
    return p_.ranges ? Range{p_.ranges[2 * index], p_.ranges[2 * index + 1]} : Range{0, keys_.n};
  }

  void write(const Scored* best, int64_t count, float* scores, int64_t* ids) const {
    for (int64_t i = 0; i < count; ++i) {
      scores[i] = best[i].score;
      ids[i] = best[i].id;
    }
    std::fill(scores + count, scores + p_.k, -kInfinity);
    std::fill(ids + count, ids + p_.k, -1);
  }

  int64_t scored_size() const { return (p_leading_ > 0 ? kLikely : 1) * kept_ + Best::kMore; }
  // Whether the bounds are those of the high bits of queries, and others can rule out more keys.
  bool only_high() const { return integers_ && !wide_ && !by_leading_ && keys_.rows != nullptr; }
  Scored* found(int64_t q) const { return found_ + q * kept_; }
  Scored* scored(int thread) const { return scored_ + thread * scored_size(); }
  float* row(int64_t q) const { return reinterpret_cast<float*>(rows_ + q * row_bytes_); }
  float* bounds(int64_t q) const { return bounds_ + q * tiles_ * kTile; }
  float* largest(int64_t q) const { return largest_ + q * tiles_; }
  // Rows of codes of a block, up to whole groups of what is arranged.
  int64_t coded_size() const {
    const int64_t rows = std::max(block_, 2 * std::min(block_, wide_queries_));
    return arranged_ ? ceil_div(rows, kernels_.arranged.group) * kernels_.arranged.group : rows;
  }
  int64_t raw_size() const { return coded_size() * kTile; }

  // Makes query number `index` the q-th of the block.
  void pack(int64_t index, int64_t q, int thread) {
    const auto* given = static_cast<const char*>(p_.queries.data);
    kernels_.normalize[p_.queries.dtype](given + index * p_.queries.stride * size_of(p_.queries.dtype), keys_.d,
                                         row(q));
    Query& query = queries_[q];
    query = {};
    if (std::isnan(row(q)[0])) return;  // not finite: it sees no keys
    query.range = range_of(index);
    query.whole =
        coder_.whole(row(q), reinterpret_cast<float*>(rests_ + thread * row_bytes_), codes_ + q * coder_.bytes());
    if (by_leading_) query.leading = coder_.leading(row(q), leading_codes_ + q * coder_.leading_bytes());
  }

  void arrange(int64_t count) const {
    const void* codes[kQueryBlock];
    for (int64_t q = 0; q < count; ++q) {
      codes[q] = queries_[q].whole.codes;
      if (wide_) codes[count + q] = queries_[q].whole.low_codes;
    }
    kernels_.arranged.arrange(codes, wide_ ? 2 * count : count, length_, arranged_codes_);
  }

  // Calls body(first, last, from, to, thread) for the tiles first, ..., last - 1 and the queries from, ..., to - 1, until it
  // was all of both. The keys are shared out among the threads, so that memory is read once for all queries; where there are
  // few, the queries too. Several tasks for each thread, in case one is held up.
  void each_run(int64_t count, const auto& body) {
    const int64_t run = std::max<int64_t>(1, tiles_ / (8 * threads_)), runs = ceil_div(tiles_, run);
    const int64_t groups = runs >= threads_ ? 1 : std::min(count, ceil_div(2 * threads_, runs));
    parallel_for(runs * groups, threads_, [&](int64_t task, int thread) {
      const int64_t group = task % groups, first = task / groups * run;
      body(first, std::min(tiles_, first + run), group * count / groups, (group + 1) * count / groups, thread);
    });
  }

  // The bounds of all queries and keys, by the whole or the leading codes.
  void scan(int64_t count, Coded Query::* coded) {
    each_run(count, [&](int64_t first, int64_t last, int64_t from, int64_t to, int thread) {
      for (int64_t tile = first; tile < last; ++tile) {
        poll();
        scan_tile(coded, tile, from, to, thread);
      }
    });
  }

  // The bounds of the queries from, ..., to - 1 and the keys of a tile.
  void scan_tile(Coded Query::* coded, int64_t tile, int64_t from, int64_t to, int thread) {
    const int64_t start = tile * kTile, n = std::min(kTile, keys_.n - start);
    int64_t seeing[kQueryBlock], count = 0;
    for (int64_t q = from; q < to; ++q) {
      const Range range = queries_[q].range;
      if (std::max(start, range.start) < std::min(start + n, range.stop)) seeing[count++] = q;
    }
    if (count == 0) return;
    int32_t* raw = raw_ + thread * raw_size();
    int64_t coded_queries = wide_ ? 2 * count : count;
    const bool arranged = arranged_ && coded == &Query::whole && n == kTile && 2 * count >= in_block_;
    if (arranged) coded_queries = wide_ ? 2 * in_block_ : in_block_;
    const void* codes[kQueryBlock];
    for (int64_t i = 0; i < count && !arranged; ++i) {
      codes[i] = (queries_[seeing[i]].*coded).codes;
      if (wide_) codes[count + i] = (queries_[seeing[i]].*coded).low_codes;
    }
    TileBounds padded;
    const TileBounds* of_keys = &padded;
    if (coded == &Query::leading) {
      of_keys = reinterpret_cast<const TileBounds*>(keys_.leading.bounds) + tile;
      const char* columns = static_cast<const char*>(keys_.leading.codes) + start * p_leading_;
      kernels_.leading_tile(codes, coded_queries, columns, p_leading_, raw);
    } else {
      if (arranged) {
        kernels_.arranged.tile(arranged_codes_, coded_queries, key_codes(start), length_, raw);
      } else {
        const void* keys[kTile];
        for (int64_t i = 0; i < n; ++i) keys[i] = key_codes(start + i);
        kernels_.tile[keys_.scan](codes, coded_queries, keys, n, length_, true, raw);
      }
      load_bounds(start, n, padded);
    }
    for (int64_t i = 0; i < count; ++i) {
      const Query& query = queries_[seeing[i]];
      const int64_t first = std::max<int64_t>(0, query.range.start - start),
                    last = std::min(n, query.range.stop - start);
      const int32_t* high = raw + (arranged ? seeing[i] : i) * kTile;
      largest(seeing[i])[tile] =
          kernels_.upper_bounds(high, wide_ ? high + coded_queries / 2 * kTile : nullptr, integers_, *of_keys,
                                (query.*coded).bounds, first, last, bounds(seeing[i]) + start);
    }
  }

  const char* key_codes(int64_t id) const {
    if (keys_.scan == UNIKE_SCAN_F32) return reinterpret_cast<const char*>(keys_.rows + id * keys_.stride);
    return static_cast<const char*>(keys_.codes) + id * padded_bytes(integers_ ? 1 : 2, keys_.d);
  }

  KeyBounds key_bounds(int64_t id) const {
    return keys_.scan == UNIKE_SCAN_F32 ? KeyBounds{1, 0, 0, 1} : reinterpret_cast<const KeyBounds*>(keys_.bounds)[id];
  }

  // The bounds of n keys; the vector lanes beyond them repeat the last one.
  void load_bounds(int64_t start, int64_t n, TileBounds& out) const {
    KeyBounds padded[kTile];
    const auto* of_keys = reinterpret_cast<const KeyBounds*>(keys_.bounds) + start;
    if (keys_.scan == UNIKE_SCAN_F32 || n < kTile) {
      for (int64_t i = 0; i < kTile; ++i) padded[i] = key_bounds(start + std::min(i, n - 1));
      of_keys = padded;
    }
    kernels_.load_bounds(of_keys, &out);
  }

  // A score that k keys reach: the k-th of what those whose leading codes promise most have at least, by all codes.
  float reached_by_codes(int64_t q, int thread) {
    const Range range = queries_[q].range;
    const int64_t k = std::min(kept_, range.stop - range.start);
    Best likely(scored(thread), std::min(kLikely * kept_, range.stop - range.start));
    take_likely(q, thread, likely);
    Scored* keys = scored(thread);
    for (int64_t i = 0; i < likely.count(); i += kTile) {
      estimate(q, keys + i, std::min(kTile, likely.count() - i),
               [&](int64_t j, float score, float error) { keys[i + j].score = score - error; });
    }
    Best best(keys, k);
    best.added(likely.count());
    best.prune();
    return best.threshold();
  }

  // Replaces the bounds of a query and the keys of some tiles by those of all codes and bits, where they reach what k keys do.
  void look_again(int64_t q, int64_t first, int64_t last) {
    const Range seen = tiles_of(queries_[q].range);
    const float reached = std::max(queries_[q].reached, std::numeric_limits<float>::lowest());
    Scored left[2 * kTile];
    int64_t count = 0;
    const auto replace = [&](int64_t n) {
      estimate(q, left, n, [&](int64_t i, float score, float error) {
        const int64_t id = left[i].id;
        bounds(q)[id] = score + error;
        largest(q)[id / kTile] = std::max(largest(q)[id / kTile], score + error);
      });
    };
    for (int64_t tile = std::max(first, seen.start); tile < std::min(last, seen.stop); ++tile) {
      if (largest(q)[tile] < reached) continue;
      float* of_tile = bounds(q) + tile * kTile;
      int32_t found[kTile + 16];
      const int64_t n = kernels_.at_least(of_tile, kTile, reached, found);
      for (int64_t i = 0; i < n; ++i) left[count++].id = tile * kTile + found[i];
      std::fill_n(of_tile, kTile, -kInfinity);
      largest(q)[tile] = -kInfinity;
      if (count < kTile) continue;
      replace(kTile);
      count -= kTile;
      std::copy_n(left + kTile, count, left);
    }
    replace(count);
  }

  // Adds the keys of the highest bounds.
  void take_likely(int64_t q, int thread, Best& likely) const {
    const float reached = reached_by(q, likely.k(), maxima_ + thread * tiles_);
    each_bound(
        q, [&] { return std::max(reached, likely.threshold()); },
        [&](const Scored* found, int64_t n) {
          std::copy_n(found, n, likely.room());
          likely.added(n);
        });
    likely.prune();
  }

  // Gives the k keys of the highest bounds the scores that count; what these reach is what others must.
  // `shared`: enough queries may want the same keys that these are looked at for all of them together.
  void find_likely(int64_t q, int thread, bool shared) {
    Query& query = queries_[q];
    Best likely(scored(thread), std::min(kept_, query.range.stop - query.range.start));
    take_likely(q, thread, likely);
    Scored* keys = found(q);
    query.found = likely.count();
    std::copy_n(scored(thread), query.found, keys);
    for (int64_t i = 0; i < query.found; ++i) bounds(q)[keys[i].id] = -kInfinity;  // done with
    score(q, keys, query.found);
    query.reached = kInfinity;
    for (int64_t i = 0; i < query.found; ++i) query.reached = std::min(query.reached, keys[i].score);
    if (!shared || !only_high()) return;
    const auto [first, last] = tiles_of(query.range);
    const auto reaching =
        std::count_if(largest(q) + first, largest(q) + last, [&](float most) { return most >= query.reached; });
    query.many = 2 * reaching > last - first;
  }

  // Writes the k best of a query: of those that are found, and of all whose bounds reach them.
  void finish(int64_t q, int thread, float* scores, int64_t* ids) {
    const Query& query = queries_[q];
    Scored* memory = scored(thread);
    std::copy_n(found(q), query.found, memory);
    Best best(memory, query.found);
    best.added(query.found);
    best.prune();
    each_bound(
        q, [&] { return best.threshold(); },
        [&](Scored* keys, int64_t n) {
          if (only_high() && !query.many) n = refine(q, keys, n, best.threshold());
          score(q, keys, n);
          std::copy_n(keys, n, best.room());
          best.added(n);
        });
    best.prune();
    std::sort(memory, memory + best.count(), better);
    write(memory, best.count(), scores, ids);
  }

  // A bound that k keys reach: the k-th largest of those that are largest in their tiles.
  float reached_by(int64_t q, int64_t k, float* scratch) const {
    const auto [first, last] = tiles_of(queries_[q].range);
    if (k == 0 || last - first < k) return -kInfinity;
    std::copy(largest(q) + first, largest(q) + last, scratch);
    std::nth_element(scratch, scratch + k - 1, scratch + (last - first), [](float a, float b) { return a > b; });
    return scratch[k - 1];
  }

  static Range tiles_of(Range keys) { return {keys.start / kTile, ceil_div(keys.stop, kTile)}; }

  // Calls body(keys, n) with the keys, and their bounds, that reach least(), a tile's at most at a time.
  void each_bound(int64_t q, const auto& least, const auto& body) const {
    const auto [first, last] = tiles_of(queries_[q].range);
    Scored found[2 * kTile];
    int64_t count = 0;
    for (int64_t group = first; group < last; group += kTile) {
      // Which tiles have such a key, so that the bounds of the next ones are fetched meanwhile.
      const float threshold = std::max(least(), std::numeric_limits<float>::lowest());  // -inf is no key
      int32_t tiles[kTile + 16], keys[kTile + 16];                                      // room for a register more
      const int64_t of_group = kernels_.at_least(largest(q) + group, std::min(kTile, last - group), threshold, tiles);
      const auto fetch = [&](int64_t i) {
        if (i >= of_group) return;
        const float* of_tile = bounds(q) + (group + tiles[i]) * kTile;
        for (int64_t j = 0; j < kTile; j += 16) __builtin_prefetch(of_tile + j);
      };
      for (int64_t i = 0; i < kFetched; ++i) fetch(i);
      for (int64_t i = 0; i < of_group; ++i) {
        fetch(i + kFetched);
        const int64_t tile = group + tiles[i];
        const float* of_tile = bounds(q) + tile * kTile;
        const int64_t n = kernels_.at_least(of_tile, kTile, std::max(least(), threshold), keys);
        for (int64_t j = 0; j < n; ++j) found[count++] = {of_tile[keys[j]], tile * kTile + keys[j]};
        if (count < kTile) continue;
        body(found, kTile);
        count -= kTile;
        std::copy_n(found + kTile, count, found);
      }
    }
    if (count > 0) body(found, count);
  }

  // Gives keys the scores that count: canonical, or where there are no rows those of all codes.
  void score(int64_t q, Scored* keys, int64_t count) const {
    for (; count > 0; keys += kTile, count -= kTile) {
      const int64_t n = std::min(count, kTile);
      float scores[kTile];
      if (keys_.rows != nullptr) {
        const float* rows[kTile];
        for (int64_t i = 0; i < n; ++i) rows[i] = keys_.rows + keys[i].id * keys_.stride;
        kernels_.canonical(row(q), rows, n, keys_.d, scores);
      } else {
        estimate(q, keys, n, [&](int64_t i, float score, float) { scores[i] = score; });
      }
      for (int64_t i = 0; i < n; ++i) keys[i].score = scores[i];
    }
  }

  // Drops those of at most kTile keys that all bits of the query rule out; returns how many are left.
  int64_t refine(int64_t q, Scored* keys, int64_t n, float threshold) const {
    int64_t left = 0;
    estimate(q, keys, n, [&](int64_t i, float score, float error) {
      if (score + error >= threshold) keys[left++] = keys[i];
    });
    return left;
  }

  // Calls body(i, score, error) for at most kTile keys: with all bits of the query.
  void estimate(int64_t q, const Scored* keys, int64_t n, const auto& body) const {
    const Coded& query = queries_[q].whole;
    const QueryBounds& of = query.bounds;
    const void *codes[2] = {query.codes, query.low_codes}, *of_keys[kTile] = {};
    int32_t raw[2 * kTile];
    for (int64_t i = 0; i < n; ++i) of_keys[i] = key_codes(keys[i].id);
    kernels_.tile[keys_.scan](codes, integers_ ? 2 : 1, of_keys, n, length_, false, raw);
    for (int64_t i = 0; i < n; ++i) {
      float product;
      if (integers_) {
        product = static_cast<float>(raw[i] - of.high_offset) +
                  static_cast<float>(raw[kTile + i] - of.low_offset) * (1.0f / kLowSteps);
      } else {
        __builtin_memcpy(&product, raw + i, sizeof product);
      }
      const KeyBounds key = key_bounds(keys[i].id);
      const float score = of.projection * key.projection + of.scale * key.scale * product;
      body(i, score, of.residual * key.residual + of.low_norm * key.norm + of.slack);
    }
  }

  const Problem& p_;
  const ScanKernels& kernels_;
  const unike_keys& keys_;
  int64_t kept_;  // keys that are found for a query, at most
  int64_t tiles_;
  int threads_;
  int64_t block_;            // queries that the workspace has room for
  bool integers_;            // of the products
  bool arranged_;            // the codes of queries, for all keys
  int64_t wide_queries_;     // up to so many, all bits of queries are multiplied with all keys
  int64_t in_block_ = 0;     // queries of the block at work
  bool wide_ = false;        // the block at work has the bounds of all bits of its queries
  bool by_leading_ = false;  // the block at work reads the leading codes first
  int64_t length_;           // elements of a key's codes
  int64_t p_leading_;        // leading codes of a key; 0: there are none
  QueryCoder coder_;
  int64_t row_bytes_;  // of a query's unit row

  int64_t* active_;  // [m]: the queries that see a key
  Query* queries_;
  char* rows_;   // [block, row_bytes]: unit rows
  char* codes_;  // [block, coder.bytes]
  char* leading_codes_;
  char* arranged_codes_;
  float* bounds_;   // [block, tiles, kTile]: of the scores; only those of the tiles that a query sees
  float* largest_;  // [block, tiles]
  char* rests_;     // [threads, row_bytes]
  int32_t* raw_;    // [threads, raw_size]: products
  float* maxima_;   // [threads, tiles]
  Scored* found_;   // [block, kept]
  Scored* scored_;  // [threads, scored_size]
};

void check_sizes(const unike_keys& keys, int64_t m, int64_t k) {
  check_size("keys.n", keys.n, 0);
  check_size("keys.stride", keys.stride, 0);
  check_size("keys.d", keys.d, 1);
  times(keys.n, std::max(keys.d, keys.stride), sizeof(float));
  require(UNIKE_SCAN_F32 <= keys.scan && keys.scan <= UNIKE_SCAN_I8, "scan names none of the scans");
  require(keys.n == 0 || keys.scan == UNIKE_SCAN_F32 || unike_code_bytes(keys.scan, keys.d) > 0,
          "d is too large for an int8 scan");
  if (keys.leading.p != 0) check_leading("keys.leading.p", keys.leading.p);
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
  const unike_leading& leading = keys.leading;
  if (leading.p == 0) return;
  require(keys.scan == UNIKE_SCAN_I8 && keys.rows != nullptr, "leading codes are for an int8 scan of keys with rows");
  require(leading.codes != nullptr && leading.bounds != nullptr && leading.directions != nullptr,
          "codes, bounds and directions of leading must not be null");
  const int64_t padded = ceil_div(keys.n, kTile) * kTile;
  check_memory("keys.leading.codes", leading.codes, times(padded, leading.p), 1);
  check_array("keys.leading.bounds", leading.bounds, times(padded, UNIKE_LEADING_BOUNDS));
  check_array("keys.leading.directions", leading.directions, times(1 + leading.p, keys.d));
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
