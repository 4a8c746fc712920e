// What the exact top-k hands to the kernels of an ISA.
#pragma once

#include <cstdint>

#include "common/half.h"
#include "unike/cosine_topk.h"

namespace unike {

// Keys that are scored together.
constexpr int64_t kTile = 64;

// Codes of int8 keys are stored with this added, as the instructions want one operand unsigned.
constexpr int kCodeOffset = 128;

// Bytes of a packed row of d elements.
static inline int64_t padded_bytes(int64_t element, int64_t d) { return (element * d + 63) / 64 * 64; }

// Steps of a query's low codes in one of its high codes.
constexpr float kLowSteps = 254.0f;

// A key as the scan knows it: x = b u + scale c + r, with u the direction and c the codes.
struct KeyBounds {
  float scale;
  float projection;  // b + scale (u.c)
  float residual;    // >= |r|
  float norm;        // >= |scale c|
};
static_assert(sizeof(KeyBounds) == UNIKE_KEY_BOUNDS * sizeof(float));

// The bounds of a tile of keys, transposed; tail: of what lies outside of the leading directions, 0 for all of a key.
struct TileBounds {
  float scale[kTile], projection[kTile], residual[kTile], norm[kTile], tail[kTile];
};
static_assert(sizeof(TileBounds) == UNIKE_LEADING_BOUNDS * kTile * sizeof(float));

// A query as the scan knows it: q = projection u + w, with w = scale (high + low / kLowSteps) + z for an int8 scan. The
// score of a key is projection key.projection + scale key.scale (codes . key codes), within residual key.residual +
// norm key.norm + tail key.tail + slack.
struct QueryBounds {
  float scale, projection;
  float residual;        // >= |w|
  float norm, low_norm;  // >= |z| without and with the low codes, or the rounding of float products
  float tail;            // >= what lies outside of the leading directions; 0 for all of a query
  float slack;
  int32_t high_offset, low_offset;  // the part of the raw products with keys that comes from kCodeOffset
};

// Products of many int8 queries, whose codes are laid out once for all keys. Null: `tile` is what there is.
struct Arranged {
  int64_t group = 0;  // queries that are multiplied together
  // The codes of `count` queries, null for one that sees no keys, into room for whole groups.
  void (*arrange)(const void* const* queries, int64_t count, int64_t length, void* out) = nullptr;
  // out[q * kTile + i] = queries[q] . keys[i] for kTile keys that lie one behind the other, with more behind them; out has
  // room for whole groups.
  void (*tile)(const void* arranged, int64_t count, const void* keys, int64_t length, int32_t* out) = nullptr;
};

struct ScanKernels {
  // The unit row of x, in canonical arithmetic.
  void (*normalize[2])(const void* x, int64_t d, float* out);  // by unike_dtype

  // Packs a unit row, with uu = u.u, into `codes` padded to unike_code_bytes; rest: d floats, padded to 64 bytes.
  KeyBounds (*pack_key[4])(const float* x, const float* u, double uu, int64_t d, float* rest, void* codes);  // by scan

  // Packs what a unit row is in p leading directions as one of the columns [p / 4, kTile, 4]; projection is left.
  void (*pack_leading)(const float* y, int64_t p, void* column, KeyBounds* bounds);

  // Takes u (null: nothing) out of a unit row. rest = w, padded to 64 bytes; fills in projection and residual.
  void (*take_out)(const float* x, const float* u, int64_t d, float* rest, QueryBounds* bounds);
  // Quantises w, padded to 64 bytes, into high and low; fills in the scale, the norms and the offsets.
  void (*quantize)(const float* rest, int64_t d, int8_t* high, int8_t* low, QueryBounds* bounds);

  // Rounds w, padded to 64 bytes, to bfloat16; fills in the scale and the norms. For bfloat16 scans that want it.
  void (*narrow)(const float* rest, int64_t d, BFloat16* codes, QueryBounds* bounds);
  bool narrow_queries;

  // out[q * kTile + i] = queries[q] . keys[i], int32 for UNIKE_SCAN_I8 (of signed query codes and offset key codes), else
  // float32. queries: count rows of float32, int8 or narrow bfloat16; keys: n <= kTile rows, as packed; all of `length` elements.
  // prefetch_next: the keys lie in memory at equal distances, and more follow.
  using Tile = void (*)(const void* const* queries, int64_t count, const void* const* keys, int64_t n, int64_t length,
                        bool prefetch_next, void* out);
  Tile tile[4];  // by scan
  // The same for kTile keys of leading codes [length / 4, kTile, 4].
  void (*leading_tile)(const void* const* queries, int64_t count, const void* columns, int64_t length, int32_t* out);

  Arranged arranged;

  // Transposes the bounds of kTile keys, which have no tails.
  void (*load_bounds)(const KeyBounds* keys, TileBounds* out);

  // out[i] = the upper bound of the score of key i of a tile for first <= i < last, else -inf; returns the largest. high: the
  // raw products of the tile; low: those with the low codes, or null.
  float (*upper_bounds)(const void* high, const int32_t* low, bool integers, const TileBounds& keys,
                        const QueryBounds& query, int64_t first, int64_t last, float* out);

  // Writes the i < n with x[i] >= threshold, and returns how many there are; n <= kTile.
  int64_t (*at_least)(const float* x, int64_t n, float threshold, int32_t* out);

  // out[i] = the canonical product of `query` and keys[i], rounded to float32, -0.0 as 0.0.
  void (*canonical)(const float* query, const float* const* keys, int64_t count, int64_t d, float* out);

  // For the bounds of a machine: something that depends on all bytes, and how many multiply-adds were done in registers,
  // by scan.
  uint64_t (*read)(const void* data, int64_t bytes);
  int64_t (*multiply_add[4])(int64_t rounds);

  // No float32 product of `tile` sums more than d / lanes + kDepth rounded values one after the other.
  int lanes;
};
constexpr int64_t kDepth = 64;

}  // namespace unike
