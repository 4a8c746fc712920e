// How a search is laid out over a device and its workspace. Plain C++: nothing here needs CUDA.
#pragma once

#include "common/workspace.h"
#include "cuda/search.h"

namespace unike::cuda {

struct Device {
  int multiprocessors;
  int blocks;  // that are resident on each, of the shape for few queries
};

struct Launch {
  Search search;
  bool many;  // the shape
  int blocks, shared_bytes;
};

constexpr bool is_many(int64_t queries) { return queries > Shape<false>::kQueries; }

// What m queries scan. int8 codes leave ten times as many candidates as the rows do: of 15,000 keys about 1,000 of d float32 each,
// which for many queries are more bytes than those of all rows.
unike_keys scanned_by(const unike_keys& keys, int64_t m);

// How many of m queries share a launch.
int64_t queries_of_launch(const unike_keys& keys, int64_t m, int64_t k, const Device& device);

// A launch for m queries, at most queries_of_launch(). What it writes, queries, ranges and counters are for the caller to
// fill in.
Launch plan(const unike_keys& keys, int64_t m, int64_t k, const Device& device, Workspace& workspace);

}  // namespace unike::cuda
