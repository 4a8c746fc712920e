// The plan of a search for the tests: the argument of a kernel as the library would make it, with memory of the tests' own for
// the state and each part of the workspace, so that every access beyond a part is found.
#include "cuda/plan.h"

#include <cstring>

using namespace unike::cuda;

extern "C" {

// What a test fills in by hand.
struct Request {
  unike_keys keys;
  unike_rows queries;
  int64_t m, k;
  const int64_t* ranges;
  float* scores;
  int64_t* ids;
  const char* values;
  int64_t value_bytes;
  char* gathered;
  Counters* state;
  int multiprocessors, blocks_of_each;
};

// Bytes of each part of the workspace.
void workspace_parts(const Request* r, int64_t* bytes) {
  unike::Workspace none;
  const Search s = plan(r->keys, r->m, r->k, {r->multiprocessors, r->blocks_of_each}, none).search;
  const int64_t m = s.m, whole = (m + 15) / 16 * 16;
  const int64_t parts[] = {m * static_cast<int64_t>(sizeof(DeviceQueryBounds)),
                           m * s.d * 4,
                           (is_many(m) ? whole : m) * s.slabs * slab_columns(r->keys.scan) * 2,
                           m * s.groups * s.slots * 4,
                           m * s.groups * 4,
                           m * s.groups * s.capacity * static_cast<int64_t>(sizeof(unike::Candidate))};
  std::memcpy(bytes, parts, sizeof parts);
}

// What its queries scan.
int scan_of(const Request* r) { return scanned_by(r->keys, r->m).scan; }

int64_t search_bytes() { return sizeof(Search); }

// launch: blocks, threads, bytes of shared memory, whether for many queries, groups, capacity, slots.
void make_search(const Request* r, void* const* parts, void* search, int64_t* launch) {
  unike::Workspace none;
  Launch l = plan(r->keys, r->m, r->k, {r->multiprocessors, r->blocks_of_each}, none);
  Search& s = l.search;
  s.queries = r->queries;
  s.ranges = r->ranges;
  s.scores = r->scores;
  s.ids = r->ids;
  s.values = r->values;
  s.value_bytes = r->value_bytes;
  s.gathered = r->gathered;
  s.counters = r->state;
  s.query_bounds = static_cast<DeviceQueryBounds*>(parts[0]);
  s.units = static_cast<float*>(parts[1]);
  s.codes = static_cast<uint16_t*>(parts[2]);
  s.lower = static_cast<float*>(parts[3]);
  s.counts = static_cast<int*>(parts[4]);
  s.candidates = static_cast<unike::Candidate*>(parts[5]);
  std::memcpy(search, &s, sizeof s);
  const int64_t shape[] = {l.blocks, kThreads, l.shared_bytes, l.many, s.groups, s.capacity, s.slots};
  std::memcpy(launch, shape, sizeof shape);
}

}  // extern "C"
