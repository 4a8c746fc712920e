// Dot products of many rows with many others: the micro-kernel of the scan and of the semantic encoder. Rows stay as they
// lie in memory.
//
// dot_blocks: a register block has the products of kQueries rows with kKeys others, 24 sums of 32 registers: ten loads feed 24
// multiply-adds, which hide each other's latency; at the end the four sums of a query are folded together. Rows are taken
// in chunks of 4 KB: those of a group of queries stay in the L1 cache for all keys of the tile, and the keys' chunks
// (256 KB for 64 keys) come from the L2 cache for all groups but the first. That one fetches ahead.
//
// dot_columns: for many queries, codes whose products an instruction sums four by four are transposed on their way from
// memory, so that each lane has the sum of a key and nothing is folded together.
//
// dot_tile: a few queries, all in the L1 cache, wait for the keys. Where these lie in memory one behind the other, they are read
// one after the other, as memory delivers a single stream faster than four that are a row apart, and far ahead.
#pragma once

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "cpu/kernels/vector.h"
#include "cpu/scan_kernels.h"

namespace unike {
namespace {

constexpr int64_t kChunkBytes = 4096;
constexpr int64_t kStreamBytes = 32768;  // of queries in the L1 cache
constexpr int kKeys = 4;
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kQueries = 6;  // of 32 registers 4 + 1 for the operands
#else
constexpr int kQueries = 2;  // of 16
#endif

constexpr int64_t kColumns = 640;       // codes of a key that are transposed at once: 40 KB of a tile, in the L1 cache
constexpr int64_t kColumnQueries = 12;  // for fewer, transposing takes longer than folding

using FourFloats = float __attribute__((vector_size(16)));
using FourInts = int32_t __attribute__((vector_size(16)));

// How rows are multiplied: kStep elements of a key with kStep of a query, into one register of sums.
template <typename T>
struct Floats {
  using Key = T;
  using Query = float;
  using Sum = Vec;
  using Element = float;
  using Four = FourFloats;
  static constexpr int64_t kStep = kLanes;
  static constexpr bool kPadded = false;
  static constexpr bool kFours = false;

  static Vec load_key(const T* p) { return load(p); }
  static Vec load_query(const float* p) { return load(p); }
  static Vec load_first(const auto* p, int64_t n) { return unike::load_first(p, n); }
  static Vec add_product(Vec sum, Vec key, Vec query) { return sum + key * query; }
};

#if defined(__AVX512BF16__)
// Queries in bfloat16 too: each instruction adds the products of 32 pairs, twice as many as of float32.
struct Pairs {
  using Key = BFloat16;
  using Query = BFloat16;
  using Sum = Vec;
  using Element = float;
  using Four = FourFloats;
  static constexpr int64_t kStep = 32;
  static constexpr bool kPadded = true;  // rows are whole steps long
  static constexpr bool kFours = false;

  static __m512i load_key(const BFloat16* p) { return _mm512_loadu_si512(p); }
  static __m512i load_query(const BFloat16* p) { return _mm512_loadu_si512(p); }
  static Vec add_product(Vec sum, __m512i key, __m512i query) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(key), "v"(query));
    return sum;
  }
};
#endif

struct Bytes {
  using Key = uint8_t;
  using Query = int8_t;
  using Sum = Ints;
  using Element = int32_t;
  using Four = FourInts;
  static constexpr bool kPadded = true;

  static int32_t load_int(const int8_t* p) {
    int32_t four;
    __builtin_memcpy(&four, p, sizeof four);
    return four;
  }
#if defined(__ARM_FEATURE_DOTPROD) && !defined(__ARM_FEATURE_MATMUL_INT8)
  static constexpr int kOffset = 0;  // both operands are signed there
#else
  static constexpr int kOffset = kCodeOffset;
#endif
#if defined(__AVX512VNNI__)
  static constexpr int64_t kStep = 64;
  static __m512i load_key(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static __m512i load_query(const int8_t* p) { return _mm512_loadu_si512(p); }
  static Ints add_product(Ints sum, __m512i key, __m512i query) {
    // GCC 12 copies the sums of its own _mm512_dpbusd_epi32 back and forth, at half the speed.
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(key), "v"(query));
    return sum;
  }
  static __m512i repeat(const int8_t* p) { return _mm512_set1_epi32(load_int(p)); }
#elif defined(__AVXVNNI__)
  static constexpr int64_t kStep = 32;
  static __m256i load_key(const uint8_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
  static __m256i load_query(const int8_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
  static Ints add_product(Ints sum, __m256i key, __m256i query) {
    asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(key), "x"(query));
    return sum;
  }
  static __m256i repeat(const int8_t* p) { return _mm256_set1_epi32(load_int(p)); }
#elif defined(__AVX512BW__)
  static constexpr int64_t kStep = 32;
  static __m512i load_key(const uint8_t* p) { return _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)p)); }
  static __m512i load_query(const int8_t* p) { return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)p)); }
  static Ints add_product(Ints sum, __m512i key, __m512i query) { return sum + (Ints)_mm512_madd_epi16(key, query); }
#elif defined(__AVX2__)
  static constexpr int64_t kStep = 16;
  static __m256i load_key(const uint8_t* p) { return _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)p)); }
  static __m256i load_query(const int8_t* p) { return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p)); }
  static Ints add_product(Ints sum, __m256i key, __m256i query) { return sum + (Ints)_mm256_madd_epi16(key, query); }
#elif defined(__SSE2__)
  static constexpr int64_t kStep = 8;
  static __m128i load_key(const uint8_t* p) {
    return _mm_unpacklo_epi8(_mm_loadl_epi64((const __m128i*)p), _mm_setzero_si128());
  }
  static __m128i load_query(const int8_t* p) {
    const __m128i codes = _mm_loadl_epi64((const __m128i*)p);
    return _mm_srai_epi16(_mm_unpacklo_epi8(codes, codes), 8);
  }
  static Ints add_product(Ints sum, __m128i key, __m128i query) { return sum + (Ints)_mm_madd_epi16(key, query); }
#elif defined(__ARM_FEATURE_MATMUL_INT8)
  static constexpr int64_t kStep = 16;
  static uint8x16_t load_key(const uint8_t* p) { return vld1q_u8(p); }
  static int8x16_t load_query(const int8_t* p) { return vld1q_s8(p); }
  static Ints add_product(Ints sum, uint8x16_t key, int8x16_t query) {
    return (Ints)vusdotq_s32((int32x4_t)sum, key, query);
  }
  static int8x16_t repeat(const int8_t* p) { return vreinterpretq_s8_s32(vdupq_n_s32(load_int(p))); }
#elif defined(__ARM_FEATURE_DOTPROD)
  static constexpr int64_t kStep = 16;
  static int8x16_t load_key(const uint8_t* p) {
    return vreinterpretq_s8_u8(veorq_u8(vld1q_u8(p), vdupq_n_u8(kCodeOffset)));
  }
  static int8x16_t load_query(const int8_t* p) { return vld1q_s8(p); }
  static Ints add_product(Ints sum, int8x16_t key, int8x16_t query) {
    return (Ints)vdotq_s32((int32x4_t)sum, key, query);
  }
  static int8x16_t repeat(const int8_t* p) { return vreinterpretq_s8_s32(vdupq_n_s32(load_int(p))); }
#elif defined(__aarch64__)
  static constexpr int64_t kStep = 8;
  static int16x8_t load_key(const uint8_t* p) { return vreinterpretq_s16_u16(vmovl_u8(vld1_u8(p))); }
  static int16x8_t load_query(const int8_t* p) { return vmovl_s8(vld1_s8(p)); }
  static Ints add_product(Ints sum, int16x8_t key, int16x8_t query) {
    const int32x4_t low = vmlal_s16((int32x4_t)sum, vget_low_s16(key), vget_low_s16(query));
    return (Ints)vmlal_high_s16(low, key, query);
  }
#else
  static constexpr int64_t kStep = kLanes;
  typedef uint8_t Unsigned __attribute__((vector_size(kLanes), aligned(1), may_alias));
  typedef int8_t Signed __attribute__((vector_size(kLanes), aligned(1), may_alias));
  static Ints load_key(const uint8_t* p) {
    return __builtin_convertvector(*reinterpret_cast<const Unsigned*>(p), Ints);
  }
  static Ints load_query(const int8_t* p) { return __builtin_convertvector(*reinterpret_cast<const Signed*>(p), Ints); }
  static Ints add_product(Ints sum, Ints key, Ints query) { return sum + key * query; }
#endif
  static constexpr bool kFours = kStep == 4 * kLanes;  // each lane of a sum adds the products of four neighbours
};

// The products of a register of keys, each lane with four codes of one, and four codes of a query.
struct Columns {
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__) || defined(__ARM_FEATURE_DOTPROD)
  static auto load_keys(const uint8_t* p) { return Bytes::load_key(p); }
  static auto repeat(const int8_t* p) { return Bytes::repeat(p); }
  static Ints add_products(Ints sum, auto keys, auto query) { return Bytes::add_product(sum, keys, query); }
#else
  // Codes 0 and 2, and 1 and 3, as numbers of 16 bits.
  struct Halved {
    Ints even, odd;
  };
  static Halved load_keys(const uint8_t* p) {
    const Bits four = (Bits)load_ints(p);
    return {(Ints)(four & 0x00ff00ff), (Ints)(four >> 8 & 0x00ff00ff)};
  }
  static Halved repeat(const int8_t* p) {
    const auto two = [](int a, int b) {
      return Ints{} + static_cast<int32_t>((a & 0xffff) | static_cast<uint32_t>(b) << 16);
    };
    return {two(p[0], p[2]), two(p[1], p[3])};
  }
  static Ints add_products(Ints sum, const Halved& keys, const Halved& query) {
    return sum + (multiply(keys.even, query.even) + multiply(keys.odd, query.odd));
  }
  static Ints multiply(Ints a, Ints b) {
#if defined(__AVX512BW__)
    return (Ints)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    return (Ints)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
    return (Ints)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
    return (a & 0xffff) * ((b << 16) >> 16) + (a >> 16) * (b >> 16);
#endif
  }
#endif
};

// Four sums, those of the lanes of s[0], ..., s[3].
template <typename C>
inline typename C::Four fold(const typename C::Sum* s) {
  // Within each 128 bits: (a0 b0 a1 b1) of a and b, then (a0 a1 b0 b1); and the same two numbers further on.
  const auto single = [](int l) { return l % 2 * kLanes + l / 4 * 4 + l % 4 / 2; };
  const auto pairs = [](int l) { return l % 4 / 2 * kLanes + l / 4 * 4 + l % 2; };
  const auto halve = [](typename C::Sum a, typename C::Sum b, auto low) {
    return shuffle(a, b, low) + shuffle(a, b, [](int l) { return decltype(low){}(l) + 2; });
  };
  const typename C::Sum quads = halve(halve(s[0], s[1], single), halve(s[2], s[3], single), pairs);
  typename C::Four parts[kLanes / 4];
  __builtin_memcpy(parts, &quads, sizeof parts);
  for (int width = kLanes / 8; width > 0; width /= 2) {
    for (int j = 0; j < width; ++j) parts[j] += parts[j + width];
  }
  return parts[0];
}

// out[q * ld + i] = queries[q] . keys[i] over `length` elements, for Q queries and kKeys keys, or is raised by it.
// `ahead`: null, or the keys that come next, to be fetched from memory meanwhile.
template <typename C, int Q>
inline void dot_block(const typename C::Query* const* queries, const typename C::Key* const* keys, int64_t length,
                      const typename C::Key* const* ahead, bool add, typename C::Element* out, int64_t ld) {
  typename C::Sum s[Q][kKeys];
  for (int q = 0; q < Q; ++q) {
    for (int i = 0; i < kKeys; ++i) s[q][i] = typename C::Sum{};
  }
  int64_t j = 0;
  for (; j + C::kStep <= length; j += C::kStep) {
    decltype(C::load_key(keys[0])) key[kKeys];
    for (int i = 0; i < kKeys; ++i) key[i] = C::load_key(keys[i] + j);
    if (ahead != nullptr) {
      for (int i = 0; i < kKeys; ++i) __builtin_prefetch(ahead[i] + j);
    }
    for (int q = 0; q < Q; ++q) {
      const auto query = C::load_query(queries[q] + j);
      for (int i = 0; i < kKeys; ++i) s[q][i] = C::add_product(s[q][i], key[i], query);
    }
  }
  if constexpr (!C::kPadded) {
    if (j < length) {
      Vec key[kKeys];
      for (int i = 0; i < kKeys; ++i) key[i] = C::load_first(keys[i] + j, length - j);
      for (int q = 0; q < Q; ++q) {
        const Vec query = C::load_first(queries[q] + j, length - j);
        for (int i = 0; i < kKeys; ++i) s[q][i] = C::add_product(s[q][i], key[i], query);
      }
    }
  }
  for (int q = 0; q < Q; ++q) {
    const typename C::Four products = fold<C>(s[q]);
    typename C::Four sum{};
    if (add) __builtin_memcpy(&sum, out + q * ld, sizeof sum);
    sum += products;
    __builtin_memcpy(out + q * ld, &sum, sizeof sum);
  }
}

// out[q * ld + i] = queries[q] . keys[i] for Q queries. What lies behind a key is wanted next.
template <typename C, int Q>
void dot_stream(const typename C::Query* const* queries, const typename C::Key* const* keys, int64_t n, int64_t length,
                typename C::Element* out, int64_t ld) {
  constexpr int kFours = (Q + 3) / 4;     // sums are folded four at a time
  constexpr int kParts = Q <= 2 ? 4 : 2;  // of each sum, to hide the latency of the additions
  constexpr int64_t kAhead = 8192 / sizeof(typename C::Key);
  const typename C::Query* query[Q];
  for (int q = 0; q < Q; ++q) query[q] = queries[q];
  for (int64_t i = 0; i < n; ++i) {
    const typename C::Key* key = keys[i];
    typename C::Sum s[kParts][kFours * 4];
    for (int part = 0; part < kParts; ++part) {
      for (int q = 0; q < kFours * 4; ++q) s[part][q] = typename C::Sum{};
    }
    const auto step = [&](int part, int64_t j) {
      const auto k = C::load_key(key + j);
      __builtin_prefetch(key + j + kAhead);
      for (int q = 0; q < Q; ++q) s[part][q] = C::add_product(s[part][q], k, C::load_query(query[q] + j));
    };
    int64_t j = 0;
    for (; j + kParts * C::kStep <= length; j += kParts * C::kStep) {
      for (int part = 0; part < kParts; ++part) step(part, j + part * C::kStep);
    }
    for (; j + C::kStep <= length; j += C::kStep) step(0, j);
    if constexpr (!C::kPadded) {
      if (j < length) {
        const Vec k = C::load_first(key + j, length - j);
        for (int q = 0; q < Q; ++q) s[0][q] = C::add_product(s[0][q], k, C::load_first(query[q] + j, length - j));
      }
    }
    for (int q = 0; q < Q; ++q) {
      for (int part = 1; part < kParts; ++part) s[0][q] += s[part][q];
    }
    for (int four = 0; four < kFours; ++four) {
      const typename C::Four products = fold<C>(s[0] + four * 4);
      for (int q = four * 4; q < Q && q < four * 4 + 4; ++q) out[q * ld + i] = products[q % 4];
    }
  }
}

// Calls body with `count`, 1, ..., Q, as a compile-time constant.
template <int Q = kQueries, typename Body>
inline void with_constant(int64_t count, const Body& body) {
  if constexpr (Q > 1) {
    if (count < Q) return with_constant<Q - 1>(count, body);
  }
  body.template operator()<Q>();
}

// out[q * ld + i] = queries[q] . keys[i]; ld >= n, rounded up to a multiple of kKeys. A sum has the same order whatever the
// numbers of rows are. `prefetch_next`: the keys lie in memory at equal distances, and more follow.
template <typename C>
void dot_blocks(const typename C::Query* const* queries, int64_t count, const typename C::Key* const* keys, int64_t n,
                int64_t length, bool prefetch_next, typename C::Element* out, int64_t ld) {
  constexpr int64_t kChunk = kChunkBytes / sizeof(typename C::Key);
  const auto key = [&](int64_t i) {
    return keys[i < n ? i : n - 1];
  };  // the last one stands for those that are not there
  // A group of queries with the keys from, ..., to - 1, in the columns of a chunk. Out of line: two copies of all its cases
  // are slower than a call.
  const auto group = [&](int64_t q, int64_t from, int64_t to, int64_t start) __attribute__((noinline)) {
    const int64_t chunk = length - start < kChunk ? length - start : kChunk;
    const typename C::Query* query[kQueries];
    for (int64_t l = 0; l < kQueries; ++l) query[l] = queries[q + l < count ? q + l : q] + start;
    with_constant(count - q < kQueries ? count - q : kQueries, [&]<int Q> {
      for (int64_t i = from; i < to; i += kKeys) {
        const bool last = i + kKeys >= n;
        const typename C::Key *block[kKeys], *ahead[kKeys];
        for (int64_t l = 0; l < kKeys; ++l) {
          block[l] = key(i + l) + start;
          ahead[l] = last && n > 1 ? block[l] + (keys[1] - keys[0]) * kKeys : key(i + kKeys + l) + start;
        }
        const bool fetch = q == 0 && (!last || prefetch_next);
        dot_block<C, Q>(query, block, chunk, fetch ? ahead : nullptr, start > 0, out + q * ld + i, ld);
      }
    });
  };
  if (count <= kQueries && count * length * static_cast<int64_t>(sizeof(typename C::Query)) <= kStreamBytes) {
    // Nothing is read twice but the queries, which stay in the L1 cache: each block of keys from end to end.
    for (int64_t i = 0; i < n; i += kKeys) {
      for (int64_t start = 0; start < length; start += kChunk) group(0, i, i + kKeys, start);
    }
    return;
  }
  for (int64_t start = 0; start < length; start += kChunk) {
    for (int64_t q = 0; q < count; q += kQueries) group(q, 0, n, start);
  }
}

// Transposes kLanes rows of kLanes numbers.
template <int W = kLanes / 2>
inline void transpose(Ints* rows) {
  const auto first = [](int l) { return l & W ? kLanes + l - W : l; };
  const auto second = [](int l) { return l & W ? kLanes + l : l + W; };
  for (int i = 0; i < kLanes; ++i) {
    if (i & W) continue;
    const Ints a = rows[i], b = rows[i + W];
    rows[i] = shuffle(a, b, first);
    rows[i + W] = shuffle(a, b, second);
  }
  if constexpr (W > 1) transpose<W / 2>(rows);
}

// The codes start, ..., start + chunk - 1 of n <= kTile keys as columns [chunk / 4, kTile, 4]; the last key stands for those
// that are not there.
template <typename C>
inline void transpose_keys(const typename C::Key* const* keys, int64_t n, int64_t start, int64_t chunk,
                           typename C::Key* columns) {
  for (int64_t i = 0; i < kTile; i += kLanes) {
    for (int64_t j = 0; j < chunk; j += C::kStep) {
      Ints rows[kLanes];
      for (int64_t l = 0; l < kLanes; ++l) rows[l] = load_ints(keys[i + l < n ? i + l : n - 1] + start + j);
      transpose(rows);
      for (int64_t l = 0; l < kLanes; ++l) store_ints(columns + (j + 4 * l) * kTile + 4 * i, rows[l]);
    }
  }
}

// out[q * kTile + i], for Q queries and kKeys registers of keys, of the columns [steps, kTile, 4], or is raised by it. Calls
// fetch() at each step.
template <int Q>
inline void columns_block(const int8_t* const* queries, const uint8_t* columns, int64_t steps, const auto& fetch,
                          bool add, int32_t* out) {
  Ints s[Q][kKeys];
  for (int q = 0; q < Q; ++q) {
    for (int i = 0; i < kKeys; ++i) s[q][i] = add ? load_ints(out + q * kTile + i * kLanes) : Ints{};
  }
  for (int64_t step = 0; step < steps; ++step) {
    decltype(Columns::load_keys(columns)) keys[kKeys];
    for (int i = 0; i < kKeys; ++i) keys[i] = Columns::load_keys(columns + 4 * (step * kTile + i * kLanes));
    fetch();
    for (int q = 0; q < Q; ++q) {
      const auto query = Columns::repeat(queries[q] + 4 * step);
      for (int i = 0; i < kKeys; ++i) s[q][i] = Columns::add_products(s[q][i], keys[i], query);
    }
  }
  for (int q = 0; q < Q; ++q) {
    for (int i = 0; i < kKeys; ++i) store_ints(out + q * kTile + i * kLanes, s[q][i]);
  }
}

// out[q * kTile + i] = queries[q] . keys[i], from columns [length / 4, kTile, 4], or is raised by it. Calls fetch() many times.
void columns_tile(const int8_t* const* queries, int64_t count, int64_t start, const uint8_t* columns, int64_t length,
                  const auto& fetch, bool add, int32_t* out) {
  for (int64_t q = 0; q < count; q += kQueries) {
    const int8_t* query[kQueries];
    for (int64_t l = 0; l < kQueries; ++l) query[l] = queries[q + l < count ? q + l : q] + start;
    with_constant(count - q < kQueries ? count - q : kQueries, [&]<int Q> {
      for (int64_t i = 0; i < kTile; i += kKeys * kLanes) {
        columns_block<Q>(query, columns + 4 * i, length / 4, fetch, add, out + q * kTile + i);
      }
    });
  }
}

// out[q * kTile + i] = queries[q] . keys[i] for n <= kTile keys that lie in memory at equal distances, with more behind them.
template <typename C>
void dot_columns(const int8_t* const* queries, int64_t count, const uint8_t* const* keys, int64_t n, int64_t length,
                 int32_t* out) {
  alignas(64) uint8_t columns[kTile * kColumns];
  const int64_t stride = n > 1 ? keys[1] - keys[0] : 0;
  // Parts of nearly equal lengths, as each is computed while the next one comes from memory.
  const int64_t parts = (length + kColumns - 1) / kColumns;
  const auto begin = [&](int64_t part) { return length / 64 * part / parts * 64; };
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t start = begin(part), chunk = begin(part + 1) - start;
    transpose_keys<C>(keys, n, start, chunk, columns);
    // What is transposed next comes from memory meanwhile, some lines at each step.
    const bool last = part + 1 == parts;
    const uint8_t* next = last ? keys[0] + n * stride : keys[0] + begin(part + 1);
    const int64_t lines = (last ? begin(1) : begin(part + 2) - begin(part + 1)) / 64 * kTile;
    const int64_t steps = (count + kQueries - 1) / kQueries * (kTile / (kKeys * kLanes)) * chunk / 4;
    const int64_t at_once = (lines + steps - 1) / steps;
    int64_t line = 0;
    const auto fetch = [&] {
      for (const int64_t end = line + at_once < lines ? line + at_once : lines; line < end; ++line) {
        __builtin_prefetch(next + line % kTile * stride + line / kTile * 64, 0, 2);
      }
    };
    columns_tile(queries, count, start, columns, chunk, fetch, part > 0, out);
  }
}

// out[q * kTile + i] = queries[q] . keys[i] for n <= kTile keys; `prefetch_next` as in dot_blocks. A float sum may have
// another order for a few queries than for many.
template <typename C>
void dot_tile(const typename C::Query* const* queries, int64_t count, const typename C::Key* const* keys, int64_t n,
              int64_t length, bool prefetch_next, typename C::Element* out) {
  if constexpr (C::kFours) {
    if (prefetch_next && count >= kColumnQueries) return dot_columns<C>(queries, count, keys, n, length, out);
  }
  const bool in_cache = count * length * static_cast<int64_t>(sizeof(typename C::Query)) <= kStreamBytes;
  if (prefetch_next && count <= kQueries && in_cache) {
    with_constant(count, [&]<int Q> { dot_stream<C, Q>(queries, keys, n, length, out, kTile); });
  } else {
    dot_blocks<C>(queries, count, keys, n, length, prefetch_next, out, kTile);
  }
}

}  // namespace
}  // namespace unike
