// A search as the host plans it and the kernel of cosine_topk.cuh reads it.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/scan_kernels.h"
#include "cuda/candidate.h"

namespace unike::cuda {

constexpr int kThreads = 512, kWarps = kThreads / 32;

// Shared memory for two chunks of the queries, each as many columns as fit.
constexpr int kRing = 64 << 10;

// The tile of a block: kQueries by kRows keys. Every 16 keys are shared by kSplits warps, each with slabs of its own: few
// queries leave room for few keys to a block, and then it takes more warps to keep enough bytes in flight.
template <bool kMany>
struct Shape {
  static constexpr int kQueries = kMany ? 128 : 8;
  static constexpr int kRows = kMany ? 128 : 64;
  static constexpr int kSplits = kWarps / (kRows / 16);
  // Blocks that a multiprocessor has registers for; with one, each thread has twice the bytes on their way.
  static constexpr int kResident = kMany ? 1 : 2;
  static constexpr int kColumns = kRing / 4 / kQueries;  // of a chunk, 2 bytes each
  static constexpr int kProductStride = kRows + 8;       // what a warp writes at once then falls into 32 banks
  static constexpr int kProductBytes = kQueries * kProductStride * 4;
  // Few queries stay in the ring from tile to tile; the products of many take its place.
  static constexpr int kSharedBytes = kMany ? std::max(kRing, kProductBytes) : kRing + kProductBytes;
};

// Keys are read in slabs of 64 bytes.
constexpr int kSlabBytes = 64;
constexpr int slab_columns(unike_scan scan) { return scan == UNIKE_SCAN_F32 ? 16 : scan == UNIKE_SCAN_I8 ? 64 : 32; }

// A query as the scan knows it: q = projection u + w, and the products are made with codes c' = w - z. The score of a
// key is projection key.projection + key.scale (c' . codes), within residual key.residual + norm key.norm + slack.
struct alignas(16) DeviceQueryBounds {
  float projection;
  float residual;  // >= |w|
  float norm;      // >= |z| + what summing the products may lose of |c'|
  float slack;
};

struct Barrier {
  unsigned arrived, generation;
};

// How the blocks of a launch find one another. Zero before the first launch; a launch leaves it ready for the next one.
struct Counters {
  unsigned claimed;        // pieces of the preparation of the queries
  unsigned coded, normed;  // queries whose codes, whose unit rows are there
  Barrier barriers[2];
};

struct Search {
  int64_t n;
  int d, m, k;
  int groups;    // blocks that share the keys, all with the same queries
  int slots;     // of a group, for each query: lower bounds of the scores of different keys
  int capacity;  // of a group's candidates of a query

  const char* scanned;    // the codes, or the rows
  int64_t scanned_bytes;  // from one key to the next
  int slabs;              // of a key
  const KeyBounds* bounds;
  const float* direction;  // null where the rows are scanned
  const float* rows;       // null: scores are those of the scan
  int64_t stride;
  float rounding;  // of the sum of products, relative to the norms
  float residual;  // of rows that are scanned

  unike_rows queries;
  const int64_t* ranges;
  float* scores;
  int64_t* ids;
  const char* values;  // null: nothing is gathered
  int64_t value_bytes;
  char* gathered;

  Counters* counters;
  DeviceQueryBounds* query_bounds;  // [m]
  float* units;                     // [m, d]
  uint16_t* codes;                  // [m up to whole tiles of 8 or 16, columns of all slabs]
  float* lower;                     // [m, groups, slots]
  int* counts;                      // [m, groups]
  Candidate* candidates;            // [m, groups, capacity]
};

}  // namespace unike::cuda
