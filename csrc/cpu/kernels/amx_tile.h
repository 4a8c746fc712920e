// Products of many int8 queries with keys, 16 x 16 at a time, by the tile registers of AMX. Keys come from memory as they
// lie there, 16 rows to a register; queries are arranged once for all keys, as the instruction wants its other operand:
// four codes of 16 queries, then their next four. Two registers of keys with two of queries make four of sums, enough to
// hide the latency of the products.
#pragma once

#include <immintrin.h>

#include "cpu/kernels/dot_tile.h"

namespace unike {
namespace {

constexpr int64_t kAmxRows = 16, kAmxCodes = 64;  // of a register
constexpr int64_t kAmxGroup = 2 * kAmxRows;       // queries, or keys, that are multiplied together

// Codes of `count` queries, and zeros for those that are null and up to a multiple of kAmxGroup, as [queries / 16, length / 4,
// 16, 4].
void arrange(const void* const* queries, int64_t count, int64_t length, void* out) {
  for (int64_t first = 0; first < (count + kAmxGroup - 1) / kAmxGroup * kAmxGroup; first += kAmxRows) {
    auto* columns = static_cast<int8_t*>(out) + first * length;
    for (int64_t start = 0; start < length; start += kAmxCodes) {
      Ints rows[kAmxRows];
      for (int64_t l = 0; l < kAmxRows; ++l) {
        const auto* query = static_cast<const int8_t*>(first + l < count ? queries[first + l] : nullptr);
        rows[l] = query != nullptr ? load_ints(query + start) : Ints{};
      }
      transpose(rows);
      for (int64_t l = 0; l < kAmxRows; ++l) store_ints(columns + (start + 4 * l) * kAmxRows, rows[l]);
    }
  }
}

// The registers 0 to 3 as sums [32 keys, 32 queries], transposed.
inline void store_sums(int32_t* out) {
  alignas(64) int32_t sums[2][2][kAmxRows][kAmxRows];
  _tile_stored(0, sums[0][0], 64);
  _tile_stored(1, sums[0][1], 64);
  _tile_stored(2, sums[1][0], 64);
  _tile_stored(3, sums[1][1], 64);
  for (int64_t key = 0; key < 2; ++key) {
    for (int64_t query = 0; query < 2; ++query) {
      Ints rows[kAmxRows];
      for (int64_t l = 0; l < kAmxRows; ++l) rows[l] = load_ints(sums[key][query][l]);
      transpose(rows);
      for (int64_t l = 0; l < kAmxRows; ++l) {
        store_ints(out + (query * kAmxRows + l) * kTile + key * kAmxRows, rows[l]);
      }
    }
  }
}

// Eight registers of 16 rows of 64 bytes. Not a local: GCC takes _tile_loadconfig for a reader of eight bytes, and drops what is
// stored behind these.
struct TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {kAmxRows, kAmxRows, kAmxRows, kAmxRows, kAmxRows, kAmxRows, kAmxRows, kAmxRows};
};
static_assert(sizeof(TileConfig) == 64);
constexpr TileConfig kTileConfig;

// out[q * kTile + i] = queries[q] . keys[i] for kTile keys that lie one behind the other, with more behind them.
void arranged_tile(const void* arranged, int64_t count, const void* keys, int64_t length, int32_t* out) {
  _tile_loadconfig(&kTileConfig);
  const int64_t groups = (count + kAmxGroup - 1) / kAmxGroup;
  for (int64_t i = 0; i < kTile; i += kAmxGroup) {
    const auto* of_keys = static_cast<const uint8_t*>(keys) + i * length;
    const uint8_t* next = of_keys + kTile * length;
    for (int64_t group = 0; group < groups; ++group) {
      const auto* queries = static_cast<const int8_t*>(arranged) + group * kAmxGroup * length;
      // Each group fetches its share of the keys that come next.
      const int64_t first = kAmxGroup * group / groups, last = kAmxGroup * (group + 1) / groups;
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (int64_t start = 0; start < length; start += kAmxCodes) {
        _tile_loadd(4, of_keys + start, length);
        _tile_loadd(6, queries + start * kAmxRows, 64);
        _tile_loadd(5, of_keys + kAmxRows * length + start, length);
        _tile_loadd(7, queries + (length + start) * kAmxRows, 64);
        _tile_dpbusd(0, 4, 6);
        _tile_dpbusd(1, 4, 7);
        _tile_dpbusd(2, 5, 6);
        _tile_dpbusd(3, 5, 7);
        for (int64_t l = first; l < last; ++l) __builtin_prefetch(next + l * length + start, 0, 2);
      }
      store_sums(out + group * kAmxGroup * kTile + i);
    }
  }
  _tile_release();
}

// See ScanKernels.
int64_t multiply_add_tiles(int64_t rounds) {
  _tile_loadconfig(&kTileConfig);
  for (int64_t round = 0; round < rounds; ++round) {
    _tile_dpbusd(0, 4, 6);
    _tile_dpbusd(1, 4, 7);
    _tile_dpbusd(2, 5, 6);
    _tile_dpbusd(3, 5, 7);
  }
  _tile_release();
  return rounds * 4 * kAmxRows * kAmxRows * kAmxCodes;
}

}  // namespace
}  // namespace unike
