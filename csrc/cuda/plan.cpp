#include "cuda/plan.h"

#include <algorithm>
#include <cmath>

namespace unike::cuda {
namespace {

// Queries of one launch: what they share of the keys comes from the L2 cache, which more would not improve.
constexpr int64_t kMostQueries = 1024;
// Fewer share a launch where all candidates would need more than this.
constexpr int64_t kCandidatesBytes = 128 << 20;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The blocks that share the keys: whole tiles, but the same number for every multiprocessor, as many as are resident at once.
int64_t groups_of(int64_t n, int64_t m, const Device& device) {
  const int64_t queries = is_many(m) ? Shape<true>::kQueries : Shape<false>::kQueries;
  const int64_t rows = is_many(m) ? Shape<true>::kRows : Shape<false>::kRows;
  const int64_t tiles = ceil_div(m, queries);
  const int64_t even = std::max<int64_t>(device.multiprocessors / tiles, 1);
  const int64_t resident = is_many(m) ? Shape<true>::kResident : device.blocks;
  const int64_t most = std::max<int64_t>(device.multiprocessors * resident / tiles, 1);
  return std::max<int64_t>(std::min({ceil_div(ceil_div(n, rows), even) * even, most, ceil_div(n, 16)}), 1);
}

// Candidates of a query that a block has room for: all its keys, or the k best and as many again, and those of a tile.
int64_t capacity_of(int64_t n, int64_t m, int64_t k, int64_t groups) {
  const int64_t rows = is_many(m) ? Shape<true>::kRows : Shape<false>::kRows;
  return std::max<int64_t>(std::min(2 * std::min(k, n) + rows, ceil_div(n, groups)), 1);
}

}  // namespace

unike_keys scanned_by(const unike_keys& keys, int64_t m) {
  unike_keys scanned = keys;
  const bool aligned = reinterpret_cast<uintptr_t>(keys.rows) % 16 == 0 && (keys.stride | keys.d) % 4 == 0;
  if (keys.scan == UNIKE_SCAN_I8 && is_many(m) && keys.rows != nullptr && aligned) scanned.scan = UNIKE_SCAN_F32;
  return scanned;
}

int64_t queries_of_launch(const unike_keys& keys, int64_t m, int64_t k, const Device& device) {
  int64_t queries = std::min(m, kMostQueries);
  const auto bytes = [&] {
    const int64_t groups = groups_of(keys.n, queries, device);
    return times(queries, groups, capacity_of(keys.n, queries, k, groups), sizeof(Candidate));
  };
  while (queries > Shape<false>::kQueries && bytes() > kCandidatesBytes) queries = (queries + 1) / 2;
  return queries;
}

Launch plan(const unike_keys& keys, int64_t m, int64_t k, const Device& device, Workspace& workspace) {
  const bool many = is_many(m), packed = keys.scan != UNIKE_SCAN_F32;
  const int64_t columns = slab_columns(keys.scan), d = keys.d, n = keys.n, groups = groups_of(n, m, device);
  Search s{};
  s.n = n;
  s.d = static_cast<int>(d);
  s.m = static_cast<int>(m);
  s.k = static_cast<int>(k);
  s.groups = static_cast<int>(groups);
  s.capacity = static_cast<int>(capacity_of(n, m, k, groups));
  // Four times as many keys as are wanted, each the best of some others: the k-th of these is not far from the k-th of all.
  for (s.slots = 1; s.slots < 32 && groups * s.slots < 4 * std::min(k, n);) s.slots *= 2;

  s.scanned = static_cast<const char*>(packed ? keys.codes : keys.rows);
  s.scanned_bytes =
      packed ? padded_bytes(keys.scan == UNIKE_SCAN_I8 ? 1 : 2, d) : keys.stride * static_cast<int64_t>(sizeof(float));
  s.slabs = static_cast<int>(ceil_div(d, columns));
  s.bounds = packed ? reinterpret_cast<const KeyBounds*>(keys.bounds) : nullptr;
  s.direction = packed ? keys.direction : nullptr;
  s.rows = keys.rows;
  s.stride = keys.stride;
  // Of the products that a warp adds to a sum, and of the sums of all splits, each of them two at most.
  const int64_t splits = many ? Shape<true>::kSplits : Shape<false>::kSplits;
  const double rounding = static_cast<double>(ceil_div(s.slabs, splits) * columns + splits + 1) * 0x1p-22;
  s.rounding = static_cast<float>(rounding / (1 - rounding) * 1.0001);
  s.residual = static_cast<float>(0x1.01p-11 + 0x1.01p-25 * std::sqrt(static_cast<double>(d)));

  s.query_bounds = workspace.take<DeviceQueryBounds>(m);
  s.units = workspace.take<float>(times(m, d));
  s.codes = workspace.take<uint16_t>(times(ceil_div(m, many ? 16 : 8), many ? 16 : 8, s.slabs, columns));
  s.lower = workspace.take<float>(times(m, groups, s.slots));
  s.counts = workspace.take<int>(times(m, groups));
  s.candidates = workspace.take<Candidate>(times(m, groups, s.capacity));

  const int64_t tiles = ceil_div(m, many ? Shape<true>::kQueries : Shape<false>::kQueries);
  return {s, many, static_cast<int>(groups * tiles), many ? Shape<true>::kSharedBytes : Shape<false>::kSharedBytes};
}

}  // namespace unike::cuda
