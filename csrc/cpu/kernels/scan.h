// Canonical arithmetic, and the packing and scanning of keys and queries, compiled once for each ISA. ../EXACTNESS.md
// says what the numbers mean and proves the bounds.
#pragma once

#include <math.h>  // the plain C functions: see vector.h

#include "cpu/kernels/dot_tile.h"
#include "cpu/scan_kernels.h"
#if defined(__AMX_INT8__)
#include "cpu/kernels/amx_tile.h"
#endif

namespace unike {
namespace {

constexpr int64_t kBytes = kLanes * sizeof(float);  // of a register

// float64 registers, two for one of float32.
constexpr int kWide = kLanes / 2;
using Wide = double __attribute__((vector_size(kWide * sizeof(double))));
typedef float Narrow __attribute__((vector_size(kWide * sizeof(float)), aligned(4), may_alias));

inline Wide widen(const float* p) { return __builtin_convertvector(*reinterpret_cast<const Narrow*>(p), Wide); }
inline Wide widen(const BFloat16* p) {
  double wide[kWide];
  for (int j = 0; j < kWide; ++j) wide[j] = get(p + j);
  Wide v;
  __builtin_memcpy(&v, wide, sizeof v);
  return v;
}

// The two halves of a register as float64.
struct Pair {
  Wide half[2];
};
inline Pair widen(Vec v) {
  float lanes[kLanes];
  __builtin_memcpy(lanes, &v, sizeof v);
  return {{widen(lanes), widen(lanes + kWide)}};
}

inline double total(Wide v) {
  for (int width = kWide / 2; width > 0; width /= 2) {
    for (int j = 0; j < width; ++j) v[j] += v[j + width];
  }
  return v[0];
}
inline double total(const Pair& p) { return total(p.half[0] + p.half[1]); }

// Calls body(i, x) with the elements i, ..., i + kLanes - 1 of a row, zeros behind its end.
template <typename T, typename Body>
inline void each_vector(const T* x, int64_t d, const Body& body) {
  int64_t i = 0;
  for (; i + kLanes <= d; i += kLanes) body(i, x + i);
  if (i < d) {
    T rest[kLanes] = {};
    __builtin_memcpy(rest, x + i, (d - i) * sizeof(T));
    body(i, rest);
  }
}

// The canonical sums of the products of `query` with K keys, all of T or float. The products of float32 values are exact in
// float64, so that a fused multiply-add gives the same bits.
// `ahead`: null, or K keys that come next, to be fetched from memory meanwhile.
template <int K, typename T>
inline void canonical_dots(const T* query, const T* const* keys, int64_t d, const T* const* ahead, double* out) {
  constexpr int kParts = 16 / kWide;
  Wide s[K][kParts] = {};
  int64_t i = 0;
  for (; i + 16 <= d; i += 16) {
    if (ahead != nullptr) {
      for (int k = 0; k < K; ++k) __builtin_prefetch(ahead[k] + i);
    }
    for (int part = 0; part < kParts; ++part) {
      const Wide q = widen(query + i + part * kWide);
      for (int k = 0; k < K; ++k) s[k][part] += q * widen(keys[k] + i + part * kWide);
    }
  }
  for (int k = 0; k < K; ++k) {
    double lane[16];
    __builtin_memcpy(lane, s[k], sizeof lane);
    for (int64_t j = i; j < d; ++j) {
      lane[j - i] += static_cast<double>(get(query + j)) * static_cast<double>(get(keys[k] + j));
    }
    for (int width = 8; width > 0; width /= 2) {
      for (int j = 0; j < width; ++j) lane[j] += lane[j + width];
    }
    out[k] = lane[0];
  }
}

void canonical(const float* query, const float* const* keys, int64_t count, int64_t d, float* out) {
  constexpr int64_t kGroup = 4;
  const auto key = [&](int64_t i) { return keys[i < count ? i : count - 1]; };  // the last one fills the group
  for (int64_t i = 0; i < count; i += kGroup) {
    const float *group[kGroup], *ahead[kGroup];
    double sums[kGroup];
    for (int64_t k = 0; k < kGroup; ++k) {
      group[k] = key(i + k);
      ahead[k] = key(i + kGroup + k);
    }
    canonical_dots<kGroup, float>(query, group, d, i + kGroup < count ? ahead : nullptr, sums);
    for (int64_t k = 0; k < kGroup && i + k < count; ++k) out[i + k] = static_cast<float>(sums[k]) + 0.0f;
  }
}

template <typename T>
void normalize(const void* row, int64_t d, float* out) {
  const T* x = static_cast<const T*>(row);
  double squares;
  canonical_dots<1, T>(x, &x, d, nullptr, &squares);
  // Squares of finite float32 values cannot overflow a float64 sum, nor underflow to zero.
  if (!(squares - squares == 0.0)) {
    for (int64_t i = 0; i < d; ++i) out[i] = __builtin_nanf("");
  } else if (squares == 0.0) {
    for (int64_t i = 0; i < d; ++i) out[i] = 0.0f;
  } else {
    const double norm = ::sqrt(squares);
    for (int64_t i = 0; i < d; ++i) out[i] = static_cast<float>(static_cast<double>(get(x + i)) / norm);
  }
}

inline Vec abs(Vec v) { return (Vec)((Bits)v & 0x7fffffff); }
inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }
template <int W = kLanes / 2>
inline float largest_of(Vec v) {
  if constexpr (W > 0) {
    return largest_of<W / 2>(larger(v, shuffle(v, v, [](int l) { return (l + W) % static_cast<int>(kLanes); })));
  } else {
    return v[0];
  }
}

// To the nearest integer, for |v| < 2^22.
inline Vec nearest(Vec v) { return (v + 0x1.8p23f) - 0x1.8p23f; }

inline float raised(double value) { return static_cast<float>(value * (1 + 0x1p-20)); }

// sum a_i b_i in float64.
double wide_dot(const float* a, const float* b, int64_t d) {
  Wide s{};
  int64_t i = 0;
  for (; i + kWide <= d; i += kWide) s += widen(a + i) * widen(b + i);
  double tail = 0.0;
  for (; i < d; ++i) tail += static_cast<double>(a[i]) * static_cast<double>(b[i]);
  return total(s) + tail;
}

// rest = x - b u up to a whole register, zeros behind the end; returns the largest |rest|.
float subtract(const float* x, float b, const float* u, int64_t d, float* rest) {
  Vec largest{};
  each_vector(x, d, [&](int64_t i, const float* part) {
    float direction[kLanes] = {};
    __builtin_memcpy(direction, u + i, (d - i < kLanes ? d - i : kLanes) * sizeof(float));
    const Vec v = load(part) - b * load(direction);
    store(rest + i, v);
    largest = larger(largest, abs(v));
  });
  return largest_of(largest);
}

void take_out(const float* x, const float* u, int64_t d, float* rest, QueryBounds* bounds) {
  bounds->projection = u ? static_cast<float>(wide_dot(x, u, d)) : 0.0f;
  subtract(x, bounds->projection, u ? u : x, d, rest);
  bounds->residual = raised(::sqrt(wide_dot(rest, rest, d)));
}

// How many steps of a code of 127 steps a value is: 1 / step, and 0 where there is nothing to quantise.
inline float step_of(float largest) { return largest > 0x1p-60f ? largest / 127.0f : 0.0f; }
inline float inverse_of(float step) { return step > 0.0f ? 1.0f / step : 0.0f; }

void quantize(const float* rest, int64_t d, int8_t* high, int8_t* low, QueryBounds* bounds) {
  typedef int8_t Codes __attribute__((vector_size(kLanes), aligned(1), may_alias));
  Vec largest{};
  for (int64_t i = 0; i < d; i += kLanes) largest = larger(largest, abs(load(rest + i)));
  const float step = step_of(largest_of(largest)), inverse = inverse_of(step);
  Ints high_sum{}, low_sum{};
  Pair left_by_high{}, left_by_low{};
  for (int64_t i = 0; i < d; i += kLanes) {
    const Vec steps = load(rest + i) * inverse, h = nearest(steps), l = nearest((steps - h) * kLowSteps);
    const Ints high_codes = __builtin_convertvector(h, Ints), low_codes = __builtin_convertvector(l, Ints);
    *reinterpret_cast<Codes*>(high + i) = __builtin_convertvector(high_codes, Codes);
    *reinterpret_cast<Codes*>(low + i) = __builtin_convertvector(low_codes, Codes);
    high_sum += high_codes;
    low_sum += low_codes;
    const Pair w = widen(load(rest + i)), hs = widen(h), ls = widen(l);
    for (int part = 0; part < 2; ++part) {
      const Wide after_high = w.half[part] - hs.half[part] * step;
      const Wide after_low = after_high - ls.half[part] * (static_cast<double>(step) / kLowSteps);
      left_by_high.half[part] += after_high * after_high;
      left_by_low.half[part] += after_low * after_low;
    }
  }
  bounds->scale = step;
  bounds->norm = raised(::sqrt(total(left_by_high)));
  bounds->low_norm = raised(::sqrt(total(left_by_low)));
  bounds->high_offset = bounds->low_offset = 0;
  for (int j = 0; j < kLanes; ++j) {
    bounds->high_offset += Bytes::kOffset * high_sum[j];
    bounds->low_offset += Bytes::kOffset * low_sum[j];
  }
}

void narrow(const float* rest, int64_t d, BFloat16* codes, QueryBounds* bounds) {
  Pair left{};
  for (int64_t i = 0; i < d; i += kLanes) {
    const Vec w = load(rest + i);
    store(codes + i, w);
    const Pair z = widen(w - load(codes + i));  // exact
    for (int part = 0; part < 2; ++part) left.half[part] += z.half[part] * z.half[part];
  }
  bounds->scale = 1.0f;
  bounds->norm = bounds->low_norm = raised(::sqrt(total(left)));
}

// How the codes of a scan are made and read: of the values v, in steps of 1 / inverse.
template <typename T>
struct HalfCodes {
  using Code = T;
  static float scale(float) { return 1.0f; }
  static void encode(Vec v, float, T* codes) { store(codes, v); }
  static Vec decode(const T* codes) { return load(codes); }
};
struct ByteCodes {
  using Code = uint8_t;
  typedef uint8_t Codes __attribute__((vector_size(kLanes), aligned(1), may_alias));
  static float scale(float largest) { return step_of(largest); }
  static void encode(Vec v, float inverse, uint8_t* codes) {
    const Ints steps = __builtin_convertvector(nearest(v * inverse), Ints) + kCodeOffset;
    *reinterpret_cast<Codes*>(codes) = __builtin_convertvector(steps, Codes);
  }
  static Vec decode(const uint8_t* codes) {
    const Ints steps = __builtin_convertvector(*reinterpret_cast<const Codes*>(codes), Ints) - kCodeOffset;
    return __builtin_convertvector(steps, Vec);
  }
};

template <typename C>
KeyBounds pack_key(const float* x, const float* u, double uu, int64_t d, float* rest, void* row) {
  auto* codes = static_cast<typename C::Code*>(row);
  const double xu = wide_dot(x, u, d);
  const float scale = C::scale(subtract(x, static_cast<float>(uu > 0 ? xu / uu : 0.0), u, d, rest));
  const float inverse = inverse_of(scale);
  Pair cu{}, cc{};
  each_vector(u, d, [&](int64_t i, const float* direction) {
    C::encode(load(rest + i), inverse, codes + i);
    const Pair c = widen(C::decode(codes + i)), u_i = widen(load(direction));
    for (int part = 0; part < 2; ++part) {
      cu.half[part] += c.half[part] * u_i.half[part];
      cc.half[part] += c.half[part] * c.half[part];
    }
  });
  const int64_t length = padded_bytes(sizeof(typename C::Code), d) / static_cast<int64_t>(sizeof(typename C::Code));
  for (int64_t i = (d + kLanes - 1) / kLanes * kLanes; i < length; i += kLanes) C::encode(Vec{}, inverse, codes + i);
  // Once more along u, now that the codes are known: nothing of the residual is left there.
  const double codes_projection = scale * total(cu);
  const auto b = static_cast<float>(uu > 0 ? (xu - codes_projection) / uu : 0.0);
  Pair rr{};
  each_vector(x, d, [&](int64_t i, const float* part) {
    float direction[kLanes] = {};
    __builtin_memcpy(direction, u + i, (d - i < kLanes ? d - i : kLanes) * sizeof(float));
    const Pair value = widen(load(part)), u_i = widen(load(direction)), c = widen(C::decode(codes + i));
    for (int half = 0; half < 2; ++half) {
      const Wide r = value.half[half] - u_i.half[half] * b - c.half[half] * scale;
      rr.half[half] += r * r;
    }
  });
  return {scale, static_cast<float>(b + codes_projection), raised(::sqrt(total(rr))),
          raised(scale * ::sqrt(total(cc)))};
}

void pack_leading(const float* y, int64_t p, void* column, KeyBounds* bounds) {
  Vec largest{};
  for (int64_t i = 0; i < p; i += kLanes) largest = larger(largest, abs(load(y + i)));
  const float scale = step_of(largest_of(largest)), inverse = inverse_of(scale);
  Pair rr{}, cc{};
  for (int64_t i = 0; i < p; i += kLanes) {
    uint8_t codes[kLanes];
    ByteCodes::encode(load(y + i), inverse, codes);
    for (int64_t j = 0; j < kLanes; j += 4) {
      __builtin_memcpy(static_cast<uint8_t*>(column) + (i + j) * kTile, codes + j, 4);
    }
    const Pair value = widen(load(y + i)), c = widen(ByteCodes::decode(codes));
    for (int half = 0; half < 2; ++half) {
      const Wide r = value.half[half] - c.half[half] * scale;
      rr.half[half] += r * r;
      cc.half[half] += c.half[half] * c.half[half];
    }
  }
  bounds->scale = scale;
  bounds->residual = raised(::sqrt(total(rr)));
  bounds->norm = raised(scale * ::sqrt(total(cc)));
}

// Transposes the bounds of kTile keys.
void load_bounds(const KeyBounds* keys, TileBounds* out) {
  static_assert(sizeof(KeyBounds) == 4 * sizeof(float));
  constexpr int kHalf = kLanes / 2;
  // Of two registers: the first and second numbers of their keys, the others; the lower halves, the upper ones.
  const auto even = [](int l) { return 4 * (l % kHalf) + l / kHalf; };
  const auto odd = [](int l) { return 4 * (l % kHalf) + l / kHalf + 2; };
  const auto low = [](int l) { return l % kHalf + l / kHalf * kLanes; };
  const auto high = [](int l) { return l % kHalf + l / kHalf * kLanes + kHalf; };
  const auto* numbers = reinterpret_cast<const float*>(keys);
  for (int64_t i = 0; i < kTile; i += kLanes) {
    Vec v[4];
    for (int part = 0; part < 4; ++part) v[part] = load(numbers + 4 * i + part * kLanes);
    const Vec first[2] = {shuffle(v[0], v[1], even), shuffle(v[2], v[3], even)};
    const Vec second[2] = {shuffle(v[0], v[1], odd), shuffle(v[2], v[3], odd)};
    store(out->scale + i, shuffle(first[0], first[1], low));
    store(out->projection + i, shuffle(first[0], first[1], high));
    store(out->residual + i, shuffle(second[0], second[1], low));
    store(out->norm + i, shuffle(second[0], second[1], high));
    store(out->tail + i, Vec{});
  }
}

inline unsigned lanes_set(Ints mask) {
#if defined(__AVX512DQ__)
  return _mm512_movepi32_mask((__m512i)mask);
#elif defined(__AVX2__)
  return _mm256_movemask_ps((__m256)mask);
#elif defined(__SSE2__)
  return _mm_movemask_ps((__m128)mask);
#else
  unsigned bits = 0;
  for (int j = 0; j < kLanes; ++j) bits |= (mask[j] & 1u) << j;
  return bits;
#endif
}

// Wraps: lanes beyond the keys of a tile hold anything.
inline Vec without(Ints products, int32_t offset) {
  return __builtin_convertvector((Ints)((Bits)products - static_cast<uint32_t>(offset)), Vec);
}

float upper_bounds(const void* high, const int32_t* low, bool integers, const TileBounds& keys,
                   const QueryBounds& query, int64_t first, int64_t last, float* out) {
  const float left = low ? query.low_norm : query.norm;
  for (int64_t i = 0; i < kTile; i += kLanes) {
    const Ints raw = load_ints(static_cast<const int32_t*>(high) + i);
    Vec product = integers ? without(raw, query.high_offset) : (Vec)raw;
    if (low) product += without(load_ints(low + i), query.low_offset) * (1.0f / kLowSteps);
    const Vec score = query.projection * load(keys.projection + i) + query.scale * load(keys.scale + i) * product;
    const Vec error = query.residual * load(keys.residual + i) + left * load(keys.norm + i) + query.slack;
    store(out + i, score + (error + query.tail * load(keys.tail + i)));
  }
  for (int64_t i = 0; i < first; ++i) out[i] = -__builtin_inff();
  for (int64_t i = last; i < kTile; ++i) out[i] = -__builtin_inff();
  Vec most = load(out);
  for (int64_t i = kLanes; i < kTile; i += kLanes) most = larger(most, load(out + i));
  return largest_of(most);
}

int64_t at_least(const float* x, int64_t n, float threshold, int32_t* out) {
  int64_t count = 0;
  const auto add = [&](Vec v, int64_t i, unsigned lanes) {
    unsigned set = lanes_set((Ints)(v >= threshold)) & lanes;
#if defined(__AVX512F__)
    const __m512i of_lanes = _mm512_add_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                              _mm512_set1_epi32(static_cast<int32_t>(i)));
    _mm512_storeu_si512(out + count, _mm512_maskz_compress_epi32(static_cast<__mmask16>(set), of_lanes));
    count += __builtin_popcount(set);
#else
    for (; set != 0; set &= set - 1) out[count++] = static_cast<int32_t>(i) + __builtin_ctz(set);
#endif
  };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) add(load(x + i), i, ~0u);
  if (i < n) add(load_first(x + i, n - i), i, (1u << (n - i)) - 1);
  return count;
}

template <typename C>
void tile(const void* const* queries, int64_t count, const void* const* keys, int64_t n, int64_t length,
          bool prefetch_next, void* out) {
  dot_tile<C>(reinterpret_cast<const typename C::Query* const*>(queries), count,
              reinterpret_cast<const typename C::Key* const*>(keys), n, length, prefetch_next,
              static_cast<typename C::Element*>(out));
}

// What is read next lies behind the columns.
void leading_tile(const void* const* queries, int64_t count, const void* columns, int64_t length, int32_t* out) {
  const auto* codes = static_cast<const uint8_t*>(columns);
  const uint8_t* next = codes + kTile * length;
  const auto fetch = [&] {
    for (int64_t i = 0; i < 4 * kTile; i += 64) __builtin_prefetch(next + i);
    next += 4 * kTile;
  };
  columns_tile(reinterpret_cast<const int8_t* const*>(queries), count, 0, codes, length, fetch, false, out);
}

uint64_t read(const void* data, int64_t bytes) {
  const auto* p = static_cast<const char*>(data);
  Ints s[4] = {};
  int64_t i = 0;
  for (; i + 4 * kBytes <= bytes; i += 4 * kBytes) {
    __builtin_prefetch(p + i + 8192);
    for (int part = 0; part < 4; ++part) s[part] ^= load_ints(p + i + part * kBytes);
  }
  uint64_t rest = 0;
  for (; i < bytes; ++i) rest ^= static_cast<uint64_t>(p[i]);
  const Ints all = (s[0] ^ s[1]) ^ (s[2] ^ s[3]);
  for (int j = 0; j < kLanes; ++j) rest ^= static_cast<uint32_t>(all[j]);
  return rest;
}

// The products of kRows keys with four queries, which stay in the L1 cache, into as many sums: enough to hide their latency.
template <typename C>
int64_t multiply_add(int64_t rounds) {
  constexpr int kRows = kLanes == 16 ? 4 : 2;
  alignas(64) typename C::Key keys[kRows * C::kStep] = {};
  alignas(64) typename C::Query queries[4 * C::kStep] = {};
  const typename C::Key* k = keys;
  const typename C::Query* q = queries;
  typename C::Sum s[kRows][4] = {};
  for (int64_t round = 0; round < rounds; ++round) {
    decltype(C::load_key(k)) key[kRows];
    for (int i = 0; i < kRows; ++i) key[i] = C::load_key(k + i * C::kStep);
    for (int j = 0; j < 4; ++j) {
      const auto query = C::load_query(q + j * C::kStep);
      for (int i = 0; i < kRows; ++i) s[i][j] = C::add_product(s[i][j], key[i], query);
    }
    asm volatile("" : "+r"(k), "+r"(q));  // others, as far as the compiler knows
  }
  typename C::Sum total{};
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < 4; ++j) total += s[i][j];
  }
  volatile float kept;
  __builtin_memcpy(const_cast<float*>(&kept), &total, sizeof kept);
  return rounds * kRows * 4 * C::kStep;
}

#if defined(__AVX512BF16__)
using BFloat16Scan = Pairs;
#else
using BFloat16Scan = Floats<BFloat16>;
#endif

#if defined(__AMX_INT8__)
constexpr Arranged arranged{kAmxGroup, arrange, arranged_tile};
constexpr auto multiply_add_bytes = multiply_add_tiles;
#else
constexpr Arranged arranged{};
constexpr auto multiply_add_bytes = multiply_add<Bytes>;
#endif

constexpr ScanKernels scan{
    {normalize<float>, normalize<BFloat16>},
    {nullptr, pack_key<HalfCodes<Float16>>, pack_key<HalfCodes<BFloat16>>, pack_key<ByteCodes>},
    pack_leading,
    take_out,
    quantize,
    narrow,
    sizeof(BFloat16Scan::Query) == sizeof(BFloat16),
    {tile<Floats<float>>, tile<Floats<Float16>>, tile<BFloat16Scan>, tile<Bytes>},
    leading_tile,
    arranged,
    load_bounds,
    upper_bounds,
    at_least,
    canonical,
    read,
    {multiply_add<Floats<float>>, multiply_add<Floats<Float16>>, multiply_add<BFloat16Scan>, multiply_add_bytes},
    kLanes};

}  // namespace
}  // namespace unike
