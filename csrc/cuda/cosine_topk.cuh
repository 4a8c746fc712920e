// Exact cosine top-k in one launch: no [m, n] matrix, no second kernel, no host in between.
//
// What it computes: for each query the k keys of highest canonical score (unike/cosine_topk.h). A scan of the keys in
// 4, 2 or 1 bytes a number gives each score to within a proved bound (cpu/EXACTNESS.md has the proof); keys whose upper
// bound reaches the k-th best lower bound are candidates, and only these are scored canonically, from their float32
// rows.
//
// How it is tiled: a block takes a tile of queries, 8 or 128, and a part of the keys; where queries have ranges, of those
// between the first and the last key that one of its queries may see. It
//   1. prepares queries, each of them in one block, for all: codes and bounds, and, where others wait for these, the unit
//      rows, whose canonical norm is a long sum that the scan does not need;
//   2. multiplies its keys with its queries on tensor cores: keys go straight from memory to registers, 16 bytes a lane,
//      each once; the codes of the queries come from shared memory, where they are copied while others are multiplied;
//   3. tells the others lower bounds, meets them once, and so knows a threshold that is close to the final one;
//   4. keeps its candidates in a list of its own; if the list is full, scores them, keeps the best k and goes on;
//   5. scores its candidates, meets the others again, and writes each of its candidates to its place among all of them.
//      The order of a canonical sum allows 16 additions at a time, which is why each candidate has a warp to itself.
// Blocks need not be resident together: one that has waited too long goes on without what it waited for, and the block
// that arrives last finishes for all (blocks.cuh). The result does not depend on who waited: order and arithmetic are
// canonical.
//
// Why this is bound by memory: for one query the scan reads n d bytes of int8 codes; it executes 0.08 warp instructions
// for each of them (0.014 for float16, 0.023 for float32; counted by executing the PTX). An H100 issues 132 x 4 a
// clock, about 900 G a second, and reads 3.35 TB: 0.08 x 3350 G = 270 G, three tenths of what it could issue. With 8
// queries it is 0.19, seven tenths. Each lane has 64 bytes on their way. Few queries take 64 registers a thread, so that
// two blocks of 512 threads live on a multiprocessor: 64 KB, four times what the latency of an H100's memory asks for at
// its full rate. Many take twice as many registers, and one block: what limits them is what multiprocessors ask L2 for, of
// keys once for every 128 queries, and of queries once for every 128 keys.
#pragma once

#include "cuda/blocks.cuh"
#include "cuda/canonical.cuh"
#include "cuda/fragments.cuh"
#include "cuda/selection.cuh"

namespace unike::cuda {

constexpr float kSlack = 0x1p-17f;
// The threshold is found to 2^-12 of the range of the lower bounds that it is chosen from.
constexpr int kThresholdPasses = 3;
// Bytes of each key of the first tile that are fetched into the L2 cache while the queries are being prepared.
constexpr int kPrefetched = 1024;

template <bool kMany>
struct Shared {
  KeyBounds keys[Shape<kMany>::kRows];
  DeviceQueryBounds queries[Shape<kMany>::kQueries];
  int64_t starts[Shape<kMany>::kQueries], stops[Shape<kMany>::kQueries];
  float thresholds[Shape<kMany>::kQueries];  // no key with a lower score is among the k best
  int counts[Shape<kMany>::kQueries];        // of candidates
  int ends[Shape<kMany>::kQueries];          // of the queries' candidates, one after the other
  double2 sums[kWarps];
  double norm;
  int bins[kWarps][32];
  Counters* counters;             // here, so that no phase keeps it in registers for the next
  int64_t from, to;               // keys of the block
  int64_t first;                  // key of the tile
  int rows;                       // keys of the tile
  int tile, tiles;                // of the block's keys
  int chunks;                     // of the queries
  int group, query, query_count;  // of the block
  int others_known;               // their lower bounds may be read
  int others;                     // that are left to finish for
  int claimed;                    // what the block prepares next
  unsigned generations[2];        // of the barriers when the launch began
  uint64_t start;                 // time then
};

// A block, with its part of the keys and of the queries. Each query has a warp that decides about its keys.
template <unike_scan kScan, bool kMany, bool kRanged>
class Block {
  using Tile = Shape<kMany>;
  using Slab = Fragments<kScan, kMany>;
  static constexpr int kChunkSlabs = Tile::kColumns / Slab::kColumns;
  // Slabs that a warp has asked for: two, or what it multiplies of a chunk.
  static constexpr int kAhead = kChunkSlabs / Tile::kSplits < 2 ? 1 : 2;

 public:
  __device__ Block(const Search& search, Shared<kMany>& shared, char* ring)
      : p(search), shared(shared), ring_(ring), products_(reinterpret_cast<float*>(kMany ? ring : ring + kRing)) {
    if (thread() == 0) {
      const int claimed = claim(p.counters);  // nothing waits for these three yet
      const unsigned first = generation_of(p.counters->barriers), second = generation_of(p.counters->barriers + 1);
      take_place_of(blockIdx.x);
      shared.counters = p.counters;
      shared.chunks = (p.slabs + kChunkSlabs - 1) / kChunkSlabs;
      shared.others_known = 0;
      shared.start = nanoseconds();
      take_keys(part_of({0, p.n}));
      shared.generations[0] = first;
      shared.generations[1] = second;
      shared.claimed = claimed;
    }
    if constexpr (kRanged) {
      if (warp() == 0) narrow();
    }
  }

  __device__ void run() {
    start_tile(0);
    prefetch_keys();
    share_queries();
    for (int q = thread(); q < shared.query_count; q += kThreads) begin(q);
    __syncthreads();
    for (;;) {
      const bool again = p.capacity < shared.to - shared.from && make_room();
      if (!kRanged || shared.rows > 0) {
        load_bounds();
        multiply(again);
      }
      for_my_queries([&](int q) { raise_lower_bounds(q); });
      if (shared.tile == 0) meet_first();
      if (shared.others_known && threshold_is_due()) for_my_queries([&](int q) { raise_threshold(q); });
      for_my_queries([&](int q) { collect(q); });
      const int next = shared.tile + 1;
      __syncthreads();
      if (next == shared.tiles) break;
      start_tile(next);
    }
    if (shared.tiles > 1) {
      for_my_queries([&](int q) { drop(q, shared.thresholds[q]); });
      __syncthreads();
    }
    resolve();
    __syncthreads();
    for_my_queries([&](int q) {
      if (!kMany) drop(q, shared.thresholds[q]);
      if (lane() == 0) p.counts[(shared.query + q) * p.groups + shared.group] = shared.counts[q];
    });
    const Met met = meet(shared.counters->barriers + 1, shared.generations[1], shared.start,
                         [&] { shared.counters->claimed = shared.counters->coded = shared.counters->normed = 0; });
    if (met == Met::kGaveUp) return;
    // The last one finishes for those that have left, too.
    if (thread() == 0) shared.others = met == Met::kAfterAll ? static_cast<int>(gridDim.x) : 0;
    do finish();
    while (take_over());
  }

 private:
  // The queries and the keys of a block of the grid. For one thread.
  __device__ void take_place_of(int block) {
    const int query_tiles = gridDim.x / p.groups;
    shared.group = block / query_tiles;
    shared.query = block % query_tiles * Tile::kQueries;
    shared.query_count = min(p.m - shared.query, Tile::kQueries);
  }

  struct Keys {
    int64_t from, to;
  };
  // The block's part of keys that all groups share.
  __device__ Keys part_of(const Keys& keys) const {
    const int64_t all = keys.to - keys.from;
    return {keys.from + all * shared.group / p.groups, keys.from + all * (shared.group + 1) / p.groups};
  }
  __device__ void take_keys(const Keys& keys) {
    shared.from = keys.from;
    shared.to = keys.to;
    shared.tiles = max(static_cast<int>((keys.to - keys.from + Tile::kRows - 1) / Tile::kRows), 1);
  }

  // Shares out what some query of the block's may see, and leaves out of its part what lies before and behind that. A block
  // that is left without keys meets the others all the same, and waits as if it had read a whole part, at a byte a nanosecond.
  // For one warp.
  __device__ void narrow() {
    __syncwarp();
    const Keys mine = seen_of(part_of(seen_of({0, p.n})));
    if (lane() == 0) {
      take_keys(mine);
      shared.start -= p.n / p.groups * p.scanned_bytes;
    }
  }

  // Of these keys those from the first to the last one that some query of the block's may see. For all lanes together.
  __device__ Keys seen_of(const Keys& keys) const {
    int64_t from = keys.to, to = keys.from;
    for (int q = lane(); q < shared.query_count; q += 32) {
      const Keys own = range_of(shared.query + q);
      const int64_t first = max(own.from, keys.from), last = min(own.to, keys.to);
      if (first >= last) continue;
      from = min(from, first);
      to = max(to, last);
    }
#pragma unroll
    for (int width = 16; width > 0; width /= 2) {
      from = min(from, __shfl_xor_sync(kAllLanes, from, width));
      to = max(to, __shfl_xor_sync(kAllLanes, to, width));
    }
    return {from, max(from, to)};
  }

  // Goes on as another block, where there is one left to finish for.
  __device__ bool take_over() {
    __syncthreads();
    if (thread() == 0 && --shared.others >= 0) take_place_of(shared.others);
    __syncthreads();
    if (shared.others < 0) return false;
    for (int q = thread(); q < shared.query_count; q += kThreads) {
      shared.counts[q] = __ldcg(p.counts + (shared.query + q) * p.groups + shared.group);
    }
    __syncthreads();
    return true;
  }

  // Writes those candidates of the block that are among the best of all.
  __device__ void finish() {
    number_candidates();
    for (int i = warp(); i < shared.ends[Tile::kQueries - 1]; i += kWarps) {
      const Spot spot = spot_of(i);
      rank(shared.query + spot.query, spot.place);
    }
    for_my_queries([&](int q) {
      if ((shared.query + q) % p.groups == shared.group) fill(shared.query + q);
    });
  }

  __device__ void start_tile(int tile) {
    if (thread() == 0) {
      shared.tile = tile;
      const int64_t all = shared.to - shared.from;
      shared.first = shared.from + all * tile / shared.tiles;
      shared.rows = static_cast<int>(shared.from + all * (tile + 1) / shared.tiles - shared.first);
    }
    __syncthreads();
  }

  __device__ void for_my_queries(const auto& body) {
    for (int q = warp(); q < shared.query_count; q += kWarps) body(q);
  }

  // Numbers the candidates of the block, query after query, and returns how many they are.
  __device__ int number_candidates() {
    if (warp() == 0) {
      int before = 0;
#pragma unroll
      for (int first = 0; first < Tile::kQueries; first += 32) {
        const int q = first + lane();
        const int end = before + sum_up_to(q < shared.query_count ? shared.counts[q] : 0);
        if (q < Tile::kQueries) shared.ends[q] = end;
        before = __shfl_sync(kAllLanes, end, 31);
      }
    }
    __syncthreads();
    return shared.ends[Tile::kQueries - 1];
  }

  // The query of candidate i, and its place in the query's list. For all lanes together.
  struct Spot {
    int query, place;
  };
  __device__ Spot spot_of(int i) const {
    int q = 0;
#pragma unroll
    for (int other = lane(); other < Tile::kQueries; other += 32) q += shared.ends[other] <= i;
    q = __reduce_add_sync(kAllLanes, q);
    return {q, q == 0 ? i : i - shared.ends[q - 1]};
  }

  // After the first tile every block knows lower bounds from all the others, and the unit rows are there.
  __device__ void meet_first() {
    if (p.rows != nullptr && thread() == kThreads - 1) await(&shared.counters->normed, p.m);
    const Met met = meet(shared.counters->barriers, shared.generations[0], shared.start, [] {});
    if (thread() == 0) shared.others_known = met != Met::kGaveUp;
    __syncthreads();
  }

  // After 1, 2, 4, ... tiles and the last.
  __device__ bool threshold_is_due() const {
    return (shared.tile & (shared.tile + 1)) == 0 || shared.tile + 1 == shared.tiles;
  }

  __device__ void prefetch_keys() const {
    constexpr int kLine = 128, kLines = kPrefetched / kLine;
    for (int i = thread(); i < shared.rows * kLines; i += kThreads) {
      const int at = i % kLines * kLine;
      if (at < p.slabs * kSlabBytes) prefetch(p.scanned + (shared.first + i / kLines) * p.scanned_bytes + at);
    }
  }

  // The sums of two numbers of each thread, in all of them.
  __device__ double2 block_sums(double x, double y) {
#pragma unroll
    for (int width = 16; width > 0; width /= 2) {
      x += __shfl_xor_sync(kAllLanes, x, width);
      y += __shfl_xor_sync(kAllLanes, y, width);
    }
    __syncthreads();
    if (lane() == 0) shared.sums[warp()] = {x, y};
    __syncthreads();
    double2 sums = {0.0, 0.0};
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) {
      sums.x += shared.sums[warp].x;
      sums.y += shared.sums[warp].y;
    }
    return sums;
  }

  // Prepares the codes of all queries, and then their unit rows, which the scan does not wait for.
  __device__ void share_queries() {
    const int coded = kMany ? (p.m + 15) / 16 * 16 : p.m, all = coded + (p.rows == nullptr ? 0 : p.m);
    share(p.counters, shared.claimed, all, [&](int i) {
      if (i < coded) {
        encode(i);
        return &p.counters->coded;
      }
      if (!sees_nothing(i - coded)) with_row(p.queries, i - coded, [&](const auto& row) { normalize(i - coded, row); });
      return &p.counters->normed;
    });
    if (thread() == 0) await(&shared.counters->coded, coded);
    __syncthreads();
  }

  // The codes and bounds of a query. Queries that only fill the last sixteen have no row, those that see no keys need none.
  __device__ void encode(int query) {
    const int columns = p.slabs * Slab::kColumns;
    uint16_t* codes = p.codes + static_cast<int64_t>(Slab::row_of(query)) * columns * (kMany ? 2 : 1);
    if (query >= p.m || sees_nothing(query)) {
      for (int i = thread(); i < columns; i += kThreads) codes[Slab::place_of_code(query, i)] = 0;
      return;
    }
    with_row(p.queries, query, [&](const auto& row) { encode(query, row, codes, columns); });
  }

  // They are of the row divided by its norm, which is summed in any order here: within 2^-23 of the unit row.
  __device__ void encode(int query, const auto& row, uint16_t* codes, int columns) {
    double squares = 0.0, projection = 0.0;
#pragma unroll 8
    for (int i = thread(); i < p.d; i += kThreads) {
      const double x = row(i);
      squares += x * x;
      if (p.direction) projection += x * p.direction[i];
    }
    const double2 found = block_sums(squares, projection);
    const double norm = norm_of(found.x), scale = norm == 0.0 ? 0.0 : 1.0 / norm;
    const float g = static_cast<float>(found.y * scale);
    double rest = 0.0, left = 0.0;
#pragma unroll 4
    for (int i = thread(); i < columns; i += kThreads) {
      float w = i < p.d ? static_cast<float>(row(i) * scale) : 0.0f;
      if (i < p.d && p.direction) w -= g * p.direction[i];
      const uint16_t code = Slab::encode(w);
      codes[Slab::place_of_code(query, i)] = code;
      const float z = w - Slab::decode(code);
      rest += static_cast<double>(w) * w;
      left += static_cast<double>(z) * z;
    }
    const double2 sums = block_sums(rest, left);
    rest = sqrt(sums.x);
    left = sqrt(sums.y);
    constexpr double kRaise = 1 + 0x1p-20;
    if (thread() == 0) {
      p.query_bounds[query] = {g, static_cast<float>(rest * kRaise),
                               static_cast<float>((left + p.rounding * (rest + left)) * kRaise), kSlack};
    }
  }

  // The unit row of a query, in canonical arithmetic. All threads square what one warp then adds up.
  __device__ void normalize(int query, const auto& row) {
    constexpr int kChunk = kRing / sizeof(double);
    auto* const squares = reinterpret_cast<double*>(ring_);
    double sum = 0.0;
    for (int first = 0; first < p.d; first += kChunk) {
      const int n = min(kChunk, p.d - first);
#pragma unroll 8
      for (int i = thread(); i < n; i += kThreads) {
        const double x = row(first + i);
        squares[i] = x * x;
      }
      __syncthreads();
      if (warp() == 0) sum = canonical_sum(sum, squares, n);
      __syncthreads();
    }
    if (warp() == 0) {
      sum = norm_of(folded(sum));
      if (lane() == 0) shared.norm = sum;
    }
    __syncthreads();
    const double norm = shared.norm;
    float* unit_row = p.units + static_cast<int64_t>(query) * p.d;
#pragma unroll 8
    for (int i = thread(); i < p.d; i += kThreads) unit_row[i] = unit(row(i), norm);
  }

  // Invalid ranges cannot be an error here: such a query sees no keys, and its scores are NaN.
  __device__ bool valid_range(int query) const {
    const int64_t start = p.ranges[2 * query], stop = p.ranges[2 * query + 1];
    return 0 <= start && start <= stop && stop <= p.n;
  }

  // What a query may see.
  __device__ Keys range_of(int query) const {
    if (!kRanged) return {0, p.n};
    if (!valid_range(query)) return {0, 0};
    return {p.ranges[2 * query], p.ranges[2 * query + 1]};
  }

  __device__ bool sees_nothing(int query) const {
    const Keys own = range_of(query);
    return kRanged && own.from == own.to;
  }

  __device__ void begin(int q) {
    const int query = shared.query + q;
    const Keys own = range_of(query);
    shared.starts[q] = own.from;
    shared.stops[q] = own.to;
    if (!sees_nothing(query)) shared.queries[q] = p.query_bounds[query];
    shared.thresholds[q] = -INFINITY;
    shared.counts[q] = 0;
  }

  // They are on their way when this returns.
  __device__ void load_bounds() {
    if constexpr (kScan == UNIKE_SCAN_F32) {
      for (int row = thread(); row < shared.rows; row += kThreads) shared.keys[row] = {1.0f, 0.0f, p.residual, 1.01f};
    } else {
      const auto* const words = reinterpret_cast<const float*>(p.bounds + shared.first);
      const uint32_t target = shared_address(shared.keys);
      for (int i = thread(); i < shared.rows * UNIKE_KEY_BOUNDS; i += kThreads) copy_async_4(target + i * 4, words + i);
    }
  }

  // How much of a key is left for a lane, from its next slab on: columns of float32 keys, slabs of codes.
  static constexpr int kUnit = kScan == UNIKE_SCAN_F32 ? Tile::kSplits * Slab::kColumns : 1;  // of a slab
  __device__ int left_of_key() const {
    if (kScan == UNIKE_SCAN_F32) return p.d - split() * Slab::kColumns - lane() % 4 * 4;
    return max(p.slabs - split() + Tile::kSplits - 1, 0) / Tile::kSplits;
  }
  // Whether there is another slab, for any of the lanes.
  __device__ static bool is_slab(int left) { return left + (kScan == UNIKE_SCAN_F32 ? lane() % 4 * 4 : 0) > 0; }

  // Starts to copy a chunk of the queries of the tile.
  static constexpr int kCodeRows = kMany ? Tile::kQueries / 2 : Tile::kQueries, kRowUnits = 4 * Slab::kRead / 16;
  __device__ void copy_chunk(int chunk) const {
    constexpr int kSlabUnits = kCodeRows * kRowUnits;
    static_assert(kChunkSlabs * kSlabUnits * 16 == kRing / 2);
    const int rows = kMany ? (shared.query_count + 15) / 16 * 8 : shared.query_count;
    const uint16_t* const codes = p.codes + static_cast<int64_t>(Slab::row_of(shared.query)) * p.slabs * kRowUnits * 8;
    const uint32_t target = shared_address(ring_) + chunk % 2 * (kRing / 2);
#pragma unroll 1
    for (int first = 0; first < kChunkSlabs * kSlabUnits; first += kThreads) {
      const unsigned at = first + thread(), unit = at % kSlabUnits, row = unit / kRowUnits;
      const int slab = chunk * kChunkSlabs + static_cast<int>(at / kSlabUnits);
      const bool exists = static_cast<int>(row) < rows;
      const int64_t source_row = static_cast<int64_t>(exists ? row : 0) * p.slabs + slab;
      const uint16_t* source =
          codes + (source_row * kRowUnits + (unit % kRowUnits ^ Slab::swapped(unit * 16 / Slab::kRead % 32))) * 8;
      if (slab < p.slabs) copy_async(target + at * 16, source, exists);
    }
  }

  // The products of the tile. Each of kSplits warps takes every kSplits-th slab of its keys.
  __device__ void multiply(bool again) {
    constexpr int kSplits = Tile::kSplits, kGroups = kChunkSlabs / (kAhead * kSplits);
    static_assert(kChunkSlabs % (kAhead * kSplits) == 0);
    const int chunks = shared.chunks;
    const bool whole = shared.query_count > Tile::kQueries / 2;
    const bool copying = shared.tile == 0 || kMany || chunks > 2 || again;
    const int row = warp() / kSplits * 16 + lane() / 4;
    const char* at = p.scanned + (shared.first + row) * p.scanned_bytes + split() * kSlabBytes + lane() % 4 * 16;
    const bool exists[] = {row < shared.rows, row + 8 < shared.rows};
    int left = left_of_key();
    typename Slab::Keys ahead[kAhead] = {};
    float sums[Slab::kSums][2][4] = {};
    // What is not there stays as it was, finite, and is multiplied with zeros or of no key.
    const auto load = [&](int i, int later) {
      const int there = left - (later + i) * kUnit;
#pragma unroll
      for (int eight = 0; eight < 2; ++eight) {
        if (exists[eight] && there > 0) {
          load_once(ahead[i][eight], at + eight * 8 * p.scanned_bytes + i * kSplits * kSlabBytes);
        }
      }
    };
#pragma unroll
    for (int i = 0; i < kAhead; ++i) load(i, 0);
    at += kAhead * kSplits * kSlabBytes;
    if (copying) copy_chunk(0);
#pragma unroll 1
    for (int group = 0; group < chunks * kGroups; ++group) {
      if (copying && group % kGroups == 0) {
        wait_for_copies();
        __syncthreads();  // of all threads; and the other half of the ring is free
        if (group / kGroups + 1 < chunks) copy_chunk(group / kGroups + 1);
      }
      const uint32_t rows = first_row() + group % (2 * kGroups) * (kAhead * kSplits * kSlabRows);
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (is_slab(left - i * kUnit)) Slab::multiply(ahead[i], rows + i * kSplits * kSlabRows, whole, sums);
        load(i, kAhead);
      }
      left -= kAhead * kUnit;
      at += kAhead * kSplits * kSlabBytes;
    }
    store_products(sums);
  }

  // The warps that share their keys, by the slabs that they take.
  __device__ static int split() { return warp() % Tile::kSplits; }

  // Where the lane's first unit of its first slab is in shared memory, and how far the next slab is.
  static constexpr int kSlabRows = kCodeRows * kRowUnits * 16;
  __device__ uint32_t first_row() const {
    return shared_address(ring_) + split() * kSlabRows + Slab::offset_of(lane());
  }

  // The splits add theirs one after the other.
  __device__ void store_products(const float (&sums)[Slab::kSums][2][4]) {
    const int lane = cuda::lane();
    wait_for_copies();  // of the bounds
    float* const corner = products_ + lane / 4 * Tile::kProductStride + warp() / Tile::kSplits * 16 + lane % 4 * 2;
    for (int s = 0; s < Tile::kSplits; ++s) {
      __syncthreads();
      if (split() != s) continue;
      const auto add = [&](int query, int eight, float x, float y) {
        auto& at = *reinterpret_cast<float2*>(corner + query * Tile::kProductStride + eight * 8);
        at = s == 0 ? float2{x, y} : float2{at.x + x, at.y + y};
      };
#pragma unroll
      for (int eight = 0; eight < 2; ++eight) {
        if constexpr (kMany) {
#pragma unroll
          for (int i = 0; i < Slab::kSums; ++i) {
            add(i * 16, eight, sums[i][eight][0], sums[i][eight][1]);
            add(i * 16 + 8, eight, sums[i][eight][2], sums[i][eight][3]);
          }
        } else if constexpr (Slab::kSums == 2) {
          add(0, eight, sums[0][eight][0] + sums[1][eight][2], sums[0][eight][1] + sums[1][eight][3]);
        } else {
          add(0, eight, sums[0][eight][0], sums[0][eight][1]);
        }
      }
    }
    __syncthreads();
  }

  __device__ bool in_range(int q, int row) const {
    const int64_t id = shared.first + row;
    return row < shared.rows && shared.starts[q] <= id && id < shared.stops[q];
  }

  __device__ Candidate estimate(int q, int row) const {
    const DeviceQueryBounds& query = shared.queries[q];
    const KeyBounds& key = shared.keys[row];
    const float score = query.projection * key.projection + key.scale * products_[q * Tile::kProductStride + row];
    const float error = query.residual * key.residual + query.norm * key.norm + query.slack;
    return {score, p.rows ? error : 0.0f, shared.first + row};
  }

  __device__ float* lower_bounds(int q) const {
    return p.lower + static_cast<int64_t>(shared.query + q) * p.groups * p.slots;
  }
  __device__ Candidate* candidates(int query, int group) const {
    return p.candidates + (static_cast<int64_t>(query) * p.groups + group) * p.capacity;
  }

  // Tells the other blocks of the best keys of the tile, one for each slot.
  __device__ void raise_lower_bounds(int q) {
    float best = -INFINITY;
#pragma unroll
    for (int first = 0; first < Tile::kRows; first += 32) {
      const int row = first + lane();
      if (!in_range(q, row)) continue;
      const Candidate key = estimate(q, row);
      best = fmaxf(best, key.score - key.error);
    }
    for (int width = 16; width >= p.slots; width /= 2) best = fmaxf(best, __shfl_xor_sync(kAllLanes, best, width));
    float* slot = lower_bounds(q) + shared.group * p.slots + lane();
    if (lane() < p.slots) strong_store(slot, shared.tile == 0 ? best : fmaxf(best, strong_load(slot)));
  }

  __device__ void raise_threshold(int q) {
    if (kRanged && shared.starts[q] == shared.stops[q]) return;
    const float* lower = lower_bounds(q);
    const float found = kth_largest(p.groups * p.slots, p.k, kThresholdPasses, shared.bins[warp()],
                                    [=](int i) { return strong_load(lower + i); });
    if (lane() == 0) shared.thresholds[q] = fmaxf(shared.thresholds[q], found);
    __syncwarp();
  }

  __device__ void collect(int q) {
    Candidate* list = candidates(shared.query + q, shared.group);
    const float threshold = shared.thresholds[q];
    int count = shared.counts[q];
#pragma unroll
    for (int first = 0; first < Tile::kRows; first += 32) {
      const int row = first + lane();
      const Candidate key = in_range(q, row) ? estimate(q, row) : Candidate{NAN, 0.0f, 0};
      const bool candidate = key.score + key.error >= threshold;
      const Place place = place_of(candidate);
      if (candidate) store(list + count + place.before, key);
      count += place.count;
    }
    if (lane() == 0) shared.counts[q] = count;
  }

  // Makes room for all keys of the tile: drops what the bounds rule out, and if that is not enough, all but the k best.
  // Returns whether that took the place of the ring.
  __device__ bool make_room() {
    const auto is_full = [&](int q) { return shared.counts[q] + shared.rows > p.capacity; };
    const auto any_is_full = [&] {
      bool full = false;
      for (int q = lane(); q < shared.query_count; q += 32) full |= is_full(q);
      return __any_sync(kAllLanes, full);
    };
    int pass = 0;
    for (; any_is_full(); ++pass) {
      __syncthreads();
      if (pass > 0) {
        resolve();
        __syncthreads();
      }
      for_my_queries([&](int q) {
        if (!is_full(q)) return;
        Candidate* list = candidates(shared.query + q, shared.group);
        const int count = shared.counts[q];
        if (pass == 0) {
          const auto lower = [=](int i) { return list[i].score - list[i].error; };
          drop(q, kth_largest(count, p.k, 8, shared.bins[warp()], lower));
        } else {
          const float last = keep_best(list, count, p.k, shared.bins[warp()]);
          if (lane() == 0) {
            shared.thresholds[q] = fmaxf(shared.thresholds[q], last);
            shared.counts[q] = p.k;
          }
        }
      });
      __syncthreads();
    }
    return pass > 1;
  }

  // Raises the threshold and drops what it rules out.
  __device__ void drop(int q, float threshold) {
    threshold = fmaxf(shared.thresholds[q], threshold);
    const int kept = keep(candidates(shared.query + q, shared.group), shared.counts[q], threshold, INT_MAX);
    if (lane() == 0) {
      shared.thresholds[q] = threshold;
      shared.counts[q] = kept;
    }
    __syncwarp();
  }

  // Gives all candidates of the block their canonical scores, one to a warp at a time; the products take the place of the
  // ring, of which nothing is needed any more.
  __device__ void resolve() {
    if (p.rows == nullptr) return;
    const int n = number_candidates();
#pragma unroll 1
    for (int i = warp(); i < n; i += kWarps) {
      const Spot spot = spot_of(i);
      Candidate* const candidate = candidates(shared.query + spot.query, shared.group) + spot.place;
      if (candidate->error == 0.0f) continue;
      const double score = canonical_score(p.units + static_cast<int64_t>(shared.query + spot.query) * p.d,
                                           p.rows + candidate->id * p.stride);
      if (lane() == 0) {
        candidate->score = static_cast<float>(score) + 0.0f;
        candidate->error = 0.0f;
      }
    }
  }

  // The product of two rows, for all lanes together.
  __device__ double canonical_score(const float* a, const float* b) const {
    const bool wide = (p.d | p.stride) % 4 == 0 && reinterpret_cast<uintptr_t>(p.rows) % 16 == 0;
    if (wide) return canonical_score_of_pieces(a, b);
    auto* const products = reinterpret_cast<double*>(ring_) + warp() * kPiece;
    double sum = 0.0;
#pragma unroll 1
    for (int first = 0; first < p.d; first += kPiece) {
      const int n = min(kPiece, p.d - first);
      for (int i = lane(); i < n; i += 32) products[i] = static_cast<double>(a[first + i]) * b[first + i];
      __syncwarp();
      sum = canonical_sum(sum, products, n);
      __syncwarp();
    }
    return folded(sum);
  }

  // While a piece is added up, the next one is multiplied, those behind it are on their way to shared memory, and what follows of
  // the second row to the L2 cache. Behind their ends the rows go on with zeros, which change no sum. Of the four products of a
  // lane the first two lie in one half, the others in the other.
  static constexpr int kPiece = 128, kCopies = 3;
  __device__ double canonical_score_of_pieces(const float* a, const float* b) const {
    constexpr int kRow = kPiece * sizeof(float), kProducts = 2 * kRow * kCopies, kBytes = kProducts + 2 * kRow;
    static_assert(kBytes * kWarps <= kRing);
    char* const here = ring_ + warp() * kBytes + lane() * 16;
    const char* const added =
        ring_ + warp() * kBytes + kProducts + lane() / 4 % 4 * 16 + lane() % 2 * 8 + lane() / 2 % 2 * kRow;
    int left = p.d - 4 * lane();
    const auto copy = [&](int piece) {
      const uint32_t to = shared_address(here) + piece * 2 * kRow;
      copy_async(to, a + (p.d - left), left > 0);
      copy_async(to + kRow, b + (p.d - left), left > 0);
      end_copies();
      left -= kPiece;
    };
    const auto multiply = [&](int piece) {
      wait_for_copies_but<kCopies - 1>();  // of this lane
      const auto x = *reinterpret_cast<const float4*>(here + piece * 2 * kRow);
      const auto y = *reinterpret_cast<const float4*>(here + piece * 2 * kRow + kRow);
      __syncwarp();  // what was there is in registers
      *reinterpret_cast<double2*>(here + kProducts) = {static_cast<double>(x.x) * y.x, static_cast<double>(x.y) * y.y};
      *reinterpret_cast<double2*>(here + kProducts + kRow) = {static_cast<double>(x.z) * y.z,
                                                              static_cast<double>(x.w) * y.w};
      copy(piece);
      __syncwarp();
    };
#pragma unroll
    for (int piece = 0; piece < kCopies; ++piece) copy(piece);
    for (int far = kCopies * kPiece + 32 * lane(); far < p.d; far += 32 * 32) prefetch(b + far);
    multiply(0);
    double sum = 0.0;
#pragma unroll 1
    for (int rest = p.d; rest > 0; rest -= kCopies * kPiece) {
#pragma unroll
      for (int piece = 0; piece < kCopies; ++piece) {
        double now[kPiece / 16];
#pragma unroll
        for (int i = 0; i < kPiece / 16; ++i) now[i] = *reinterpret_cast<const double*>(added + 64 * i);
        multiply((piece + 1) % kCopies);
#pragma unroll
        for (int i = 0; i < kPiece / 16; ++i) sum += now[i];
      }
    }
    wait_for_copies();
    return folded(sum);
  }

  // Finds the place of a candidate among those of all groups, and writes it there. Those of earlier groups, and earlier ones
  // of its own, have lower ids.
  __device__ void rank(int query, int e) const {
    constexpr int kAtOnce = kMany ? 4 : 10;  // groups that a lane looks at
    const int* counts = p.counts + static_cast<int64_t>(query) * p.groups;
    const Candidate mine = load(candidates(query, shared.group) + e);
    const auto* const nothing = reinterpret_cast<const float*>(counts);
    int place = 0;
#pragma unroll 1
    for (int first = 0; first < p.groups; first += 32 * kAtOnce) {
      int count[kAtOnce], most = 0;
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const int group = first + lane() + 32 * j, found = __ldcg(counts + min(group, p.groups - 1));
        count[j] = group < p.groups ? found : 0;
        most = max(most, count[j]);
      }
#pragma unroll 1
      for (int i = 0; i < most; ++i) {
        const int group = first + lane();  // read anew: addresses of the whole loop would not fit into registers
        const Candidate* list = candidates(query, group) + i;
        float other[kAtOnce];
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
          other[j] = __ldcg(i < count[j] ? &list->score : nothing);
          list += 32 * static_cast<int64_t>(p.capacity);
        }
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
          const bool earlier = group + 32 * j < shared.group || (group + 32 * j == shared.group && i < e);
          place += i < count[j] && (other[j] > mine.score || (other[j] == mine.score && earlier));
        }
      }
    }
    place = __reduce_add_sync(kAllLanes, place);
    if (place < p.k) write(query, place, mine.score, mine.id);
  }

  // Writes what a query has no keys for.
  __device__ void fill(int query) const {
    const int* counts = p.counts + static_cast<int64_t>(query) * p.groups;
    int found = 0;
    for (int other = lane(); other < p.groups; other += 32) found += __ldcg(counts + other);
    const float nothing = !kRanged || valid_range(query) ? -INFINITY : NAN;
    for (int place = __reduce_add_sync(kAllLanes, found); place < p.k; ++place) write(query, place, nothing, -1);
  }

  __device__ void write(int query, int place, float score, int64_t id) const {
    const int64_t at = static_cast<int64_t>(query) * p.k + place;
    if (lane() == 0) {
      p.scores[at] = score;
      p.ids[at] = id;
    }
    if (p.values != nullptr)
      copy_row(p.gathered + at * p.value_bytes, id < 0 ? nullptr : p.values + id * p.value_bytes);
  }

  // Zeros where there is no row.
  __device__ void copy_row(char* to, const char* from) const {
    const auto copy = [&](auto* target, const auto* source) {
      constexpr int kSize = sizeof *target;
      for (int64_t i = lane(); i < p.value_bytes / kSize; i += 32) {
        if (source)
          target[i] = source[i];
        else
          target[i] = {};
      }
    };
    const auto all = reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from) | p.value_bytes;
    if (all % 16 == 0) {
      copy(reinterpret_cast<uint4*>(to), reinterpret_cast<const uint4*>(from));
    } else {
      copy(to, from);
    }
  }

  const Search p;
  Shared<kMany>& shared;
  char* ring_;
  float* products_;
};

template <unike_scan kScan, bool kMany, bool kRanged>
__global__ void __launch_bounds__(kThreads, Shape<kMany>::kResident) cosine_topk_kernel(const Search search) {
  extern __shared__ __align__(128) char ring[];
  __shared__ Shared<kMany> shared;
  Block<kScan, kMany, kRanged>(search, shared, ring).run();
}

// That for few queries or for many, with ranges or without.
template <unike_scan kScan>
const void* kernel_of(bool many, bool ranged) {
  const auto address = [](auto* kernel) { return reinterpret_cast<const void*>(kernel); };
  if (ranged) return address(many ? &cosine_topk_kernel<kScan, true, true> : &cosine_topk_kernel<kScan, false, true>);
  return address(many ? &cosine_topk_kernel<kScan, true, false> : &cosine_topk_kernel<kScan, false, false>);
}

}  // namespace unike::cuda
