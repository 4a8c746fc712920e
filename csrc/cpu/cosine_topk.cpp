// Exact cosine top-k: a scan in float32 rules keys out, the rest are scored in canonical arithmetic.
//
// A key is ruled out if its approximate score s' is more than `margin(d)` below the worst canonical score kept so far.
// With u = 2^-24 and unit rows: a float32 sum of d products in any order, fused or not, is off by at most
// d u / (1 - d u) * sum |q_i k_i| <= d u / (1 - d u) * |q| |k|, where |q| |k| < 1 + 4 u from the rounding of the rows; the
// canonical sum is off by less than d 2^-53, and its rounding to float32 by u. Twice the terms beyond d u cover them with
// room, so a key that is ruled out has a canonical score strictly below one that is kept: ties are never lost.
#include "unike/cosine_topk.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "common/canonical.h"
#include "common/cpu_isa.h"
#include "common/parallel.h"
#include "common/status.h"
#include "common/topk.h"
#include "cpu/cosine_topk.h"

namespace unike {
namespace {

// Queries that share a pass over the keys, and the size of the tile of keys that stays in the cache meanwhile.
constexpr int64_t kQueryBlock = 16;
constexpr int64_t kKeyTileFloats = 32 * 1024;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

void normalize_row(const float* x, int64_t d, float* out) {
  const double squares = canonical_dot(x, x, d);
  // Squares of finite float32 values cannot overflow a float64 sum, nor underflow to zero.
  if (!std::isfinite(squares)) {
    std::fill_n(out, d, std::numeric_limits<float>::quiet_NaN());
  } else if (squares == 0.0) {
    std::fill_n(out, d, 0.0f);
  } else {
    const double norm = std::sqrt(squares);
    for (int64_t i = 0; i < d; ++i) out[i] = static_cast<float>(static_cast<double>(x[i]) / norm);
  }
}

struct Range {
  int64_t start, stop;
};

struct Problem {
  const float* queries;
  int64_t m, q_stride;
  const float* keys;
  int64_t n, k_stride;
  int64_t d, k;
  const int64_t* bounds;

  // The keys that query q sees.
  Range range(int64_t q) const { return bounds ? Range{bounds[2 * q], bounds[2 * q + 1]} : Range{0, n}; }

  TopK empty_topk() const { return TopK(std::min(k, n)); }
};

double margin(int64_t d) {
  const double du = static_cast<double>(d) * 0x1p-24;
  return du < 0.5 ? du / (1 - du) * (1 + 0x1p-20) + 0x1p-21 : std::numeric_limits<double>::infinity();
}

// Pushes the scores of the queries of `block` over the keys of `part`, query block.start + i into best[i].
void scan(const Problem& p, Range block, Range part, TopK* best) {
  struct Query {
    Range keys;
    const float* row;
    std::vector<double> values;  // converted once, not once for each key
  };
  std::vector<Query> queries;
  for (int64_t q = block.start; q < block.stop; ++q) {
    const float* row = p.queries + q * p.q_stride;
    const Range range = p.range(q);
    const bool finite = std::all_of(row, row + p.d, [](float value) { return std::isfinite(value); });
    queries.push_back({{std::max(part.start, range.start), finite ? std::min(part.stop, range.stop) : part.start},
                       row,
                       {row, row + p.d}});
  }
  const ScoreTile score_tile = UNIKE_PICK(score_tile);
  const double slack = margin(p.d);
  const int64_t tile = std::max<int64_t>(1, kKeyTileFloats / p.d);
  std::vector<float> approximate(queries.size() * tile);
  std::vector<const float*> rows;
  std::vector<size_t> active;
  for (int64_t start = part.start; start < part.stop; start += tile) {
    const int64_t stop = std::min(start + tile, part.stop);
    rows.clear();
    active.clear();
    for (size_t i = 0; i < queries.size(); ++i) {
      if (std::max(start, queries[i].keys.start) >= std::min(stop, queries[i].keys.stop)) continue;
      rows.push_back(queries[i].row);
      active.push_back(i);
    }
    score_tile(rows.data(), static_cast<int64_t>(rows.size()), p.keys + start * p.k_stride, stop - start, p.k_stride,
               p.d, approximate.data());
    for (size_t a = 0; a < active.size(); ++a) {
      const auto& [keys, row, values] = queries[active[a]];
      TopK& kept = best[active[a]];
      const float* scores = approximate.data() + static_cast<int64_t>(a) * (stop - start);
      for (int64_t id = std::max(start, keys.start); id < std::min(stop, keys.stop); ++id) {
        if (static_cast<double>(scores[id - start]) + slack < static_cast<double>(kept.threshold())) continue;
        const auto score = static_cast<float>(canonical_dot(values.data(), p.keys + id * p.k_stride, p.d));
        kept.push({score + 0.0f, id});  // -0.0 becomes 0.0
      }
    }
  }
}

// Many queries: each task scans all keys for a block of them.
void topk_by_queries(const Problem& p, int threads, float* scores, int64_t* ids) {
  const int64_t size = std::min(kQueryBlock, ceil_div(p.m, threads));
  parallel_for(ceil_div(p.m, size), threads, [&](int64_t task) {
    const Range block{task * size, std::min((task + 1) * size, p.m)};
    std::vector<TopK> best(block.stop - block.start, p.empty_topk());
    scan(p, block, {0, p.n}, best.data());
    for (int64_t q = block.start; q < block.stop; ++q) {
      best[q - block.start].write(p.k, scores + q * p.k, ids + q * p.k);
    }
  });
}

// Few queries: each task scans a part of the keys for all of them, and the parts are merged.
void topk_by_keys(const Problem& p, int threads, float* scores, int64_t* ids) {
  const int64_t parts = std::min<int64_t>(threads, p.n);
  std::vector<TopK> best(parts * p.m, p.empty_topk());
  parallel_for(parts, threads, [&](int64_t part) {
    scan(p, {0, p.m}, {part * p.n / parts, (part + 1) * p.n / parts}, &best[part * p.m]);
  });
  for (int64_t q = 0; q < p.m; ++q) {
    for (int64_t part = 1; part < parts; ++part) best[q].merge(best[part * p.m + q]);
    best[q].write(p.k, scores + q * p.k, ids + q * p.k);
  }
}

void require_table(const float* data, int64_t rows, int64_t d, int64_t stride) {
  require(rows >= 0 && stride >= 0, "row counts and strides must not be negative");
  require(d >= 1, "d must be at least 1");
  require(data != nullptr || rows == 0, "a table with rows must not be null");
}

}  // namespace
}  // namespace unike

extern "C" unike_status unike_normalize_rows_f32(const float* x, int64_t rows, int64_t d, int64_t row_stride,
                                                 float* out, int threads) {
  using namespace unike;
  return guarded([&] {
    require_table(x, rows, d, row_stride);
    require(out != nullptr || rows == 0, "out must not be null");
    const int workers = useful_threads(static_cast<double>(rows) * static_cast<double>(d), threads);
    parallel_for(workers, workers, [&](int64_t part) {
      for (int64_t row = part * rows / workers; row < (part + 1) * rows / workers; ++row) {
        normalize_row(x + row * row_stride, d, out + row * d);
      }
    });
  });
}

extern "C" unike_status unike_cosine_topk_f32(const float* queries, int64_t m, int64_t q_stride, const float* keys,
                                              int64_t n, int64_t k_stride, int64_t d, int64_t k, const int64_t* bounds,
                                              float* scores, int64_t* ids, int threads) {
  using namespace unike;
  return guarded([&] {
    require_table(queries, m, d, q_stride);
    require_table(keys, n, d, k_stride);
    require(k >= 0, "k must not be negative");
    require((scores != nullptr && ids != nullptr) || m == 0 || k == 0, "scores and ids must not be null");
    const Problem problem{queries, m, q_stride, keys, n, k_stride, d, k, bounds};
    for (int64_t q = 0; q < m; ++q) {
      const auto [start, stop] = problem.range(q);
      require(0 <= start && start <= stop && stop <= n, "bounds must satisfy 0 <= start <= stop <= n");
    }
    if (m == 0 || k == 0) return;
    const double work = static_cast<double>(m) * static_cast<double>(n) * static_cast<double>(d);
    const int workers = useful_threads(work, threads);
    if (m >= workers) {
      topk_by_queries(problem, workers, scores, ids);
    } else {
      topk_by_keys(problem, workers, scores, ids);
    }
  });
}
