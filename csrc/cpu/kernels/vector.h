// The few float32 primitives of the kernels, in the vector types of GCC and clang: one register of SSE,
// AVX2, AVX-512 or AdvSIMD. Rows may be
// stored as float or BFloat16: they are loaded as float32, and stored rounded to nearest, ties to even.
//
// Files that include this are compiled once for each ISA. Everything lives in an unnamed namespace, and no inline
// function of the standard library is used: the linker could take the copy that the CPU does not have.
#pragma once

#if defined(__F16C__)
#include <immintrin.h>
#endif

#include <cstdint>
#include <utility>

#include "common/half.h"

namespace unike {
namespace {

#if defined(__AVX512F__)
constexpr int64_t kLanes = 16;
#elif defined(__AVX2__)
constexpr int64_t kLanes = 8;
#else
constexpr int64_t kLanes = 4;
#endif
using Vec = float __attribute__((vector_size(kLanes * sizeof(float))));
// As they lie in memory. With typedef: clang drops the alignment of an alias by `using`, without a word.
typedef float Unaligned __attribute__((vector_size(kLanes * sizeof(float)), aligned(4), may_alias));
typedef uint16_t Halves __attribute__((vector_size(kLanes * sizeof(uint16_t)), aligned(2), may_alias));
static_assert(alignof(Unaligned) == alignof(float) && alignof(Halves) == alignof(uint16_t));

using Ints = int32_t __attribute__((vector_size(kLanes * sizeof(int32_t))));
using Bits = uint32_t __attribute__((vector_size(kLanes * sizeof(uint32_t))));

// The lanes lane(0), lane(1), ... of a and b, those of b counted from kLanes on; `lane`: without captures.
template <typename V, typename Lane, int... l>
inline V shuffle(V a, V b, Lane, std::integer_sequence<int, l...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, Lane{}(l)...);
#else  // GCC has the other one from 12 on
  return __builtin_shuffle(a, b, Ints{Lane{}(l)...});
#endif
}
template <typename V, typename Lane>
inline V shuffle(V a, V b, Lane lane) {
  return shuffle(a, b, lane, std::make_integer_sequence<int, kLanes>{});
}

inline Vec load(const float* p) { return *reinterpret_cast<const Unaligned*>(p); }
inline void store(float* p, Vec v) { *reinterpret_cast<Unaligned*>(p) = v; }

inline Ints load_ints(const void* p) {
  Ints v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
inline void store_ints(void* p, Ints v) { __builtin_memcpy(p, &v, sizeof v); }

// One element as float32, and back.
inline float get(const float* p) { return *p; }
inline float get(const BFloat16* p) { return __builtin_bit_cast(float, static_cast<uint32_t>(p->bits) << 16); }
inline float get(const Float16* p) {
  const uint32_t sign = (p->bits & 0x8000u) << 16, rest = (p->bits & 0x7fffu) << 13;
  uint32_t bits;
  if (rest >= 0x0f800000) {  // infinities and NaNs
    bits = rest | 0x7f800000;
  } else if (rest >= 0x00800000) {
    bits = rest + (112u << 23);
  } else {  // below the normal numbers
    bits = __builtin_bit_cast(uint32_t, __builtin_bit_cast(float, rest + (113u << 23)) - 0x1p-14f);
  }
  return __builtin_bit_cast(float, sign | bits);
}
inline void put(float* p, float x) { *p = x; }
inline void put(BFloat16* p, float x) {
  const auto bits = __builtin_bit_cast(uint32_t, x);
  p->bits = static_cast<uint16_t>(x != x ? (bits >> 16) | 0x40 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline void put(Float16* p, float x) {
  const auto all = __builtin_bit_cast(uint32_t, x);
  const uint32_t sign = all >> 16 & 0x8000, rest = all & 0x7fffffff;
  uint32_t bits;
  if (rest > 0x7f800000) {
    bits = 0x7e00 | (rest >> 13 & 0x3ff);  // NaN
  } else if (rest >= 0x47800000) {
    bits = 0x7c00;
  } else if (rest >= 0x38800000) {
    bits = (rest - (112u << 23) + 0xfff + (rest >> 13 & 1)) >> 13;
  } else {  // the last place of 0.5 is the unit below the normal numbers
    bits = __builtin_bit_cast(uint32_t, __builtin_bit_cast(float, rest) + 0.5f) - 0x3f000000;
  }
  p->bits = static_cast<uint16_t>(sign | bits);
}

inline Vec load(const BFloat16* p) {
  return (Vec)(__builtin_convertvector(*reinterpret_cast<const Halves*>(p), Bits) << 16);
}
inline Vec load(const Float16* p) {
#if defined(__AVX512F__)
  return (Vec)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  return (Vec)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  const Bits half = __builtin_convertvector(*reinterpret_cast<const Halves*>(p), Bits);
  const Bits sign = (half & 0x8000) << 16, rest = (half & 0x7fff) << 13;
  const Bits tiny = (Bits)((Vec)(rest + (113u << 23)) - 0x1p-14f);  // below the normal numbers
  const Bits large = rest >= 0x0f800000 ? rest | 0x7f800000 : rest + (112u << 23);
  return (Vec)(sign | (rest < 0x00800000 ? tiny : large));
#endif
}
inline void store(BFloat16* p, Vec v) {
  const Bits bits = (Bits)v;
  const Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Bits quiet = (bits >> 16) | 0x40;  // rounding could turn a NaN into an infinity
  *reinterpret_cast<Halves*>(p) = __builtin_convertvector((Bits)(v != v) ? quiet : rounded, Halves);
}
inline void store(Float16* p, Vec v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_maskz_cvtps_ph(0xffff, v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int j = 0; j < kLanes; ++j) put(p + j, v[j]);
#endif
}

// The first n < kLanes elements, zeros behind them, of which no memory is read.
inline Vec load_first(const float* p, int64_t n) {
#if defined(__AVX512F__)
  return (Vec)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p);
#elif defined(__AVX2__)
  const Ints lanes{0, 1, 2, 3, 4, 5, 6, 7};
  return (Vec)_mm256_maskload_ps(p, (__m256i)(lanes < static_cast<int32_t>(n)));
#else
  float first[kLanes] = {};
  for (int64_t j = 0; j < n; ++j) first[j] = p[j];
  return load(first);
#endif
}
template <typename T>
inline Vec load_first(const T* p, int64_t n) {
  T first[kLanes] = {};
  for (int64_t j = 0; j < n; ++j) first[j] = p[j];
  return load(first);
}

inline float sum(Vec v) {
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int j = 0; j < width; ++j) v[j] += v[j + width];
  }
  return v[0];
}

// Four accumulators hide the latency of the additions.
template <typename A, typename B>
inline float dot(const A* a, const B* b, int64_t n) {
  Vec s0{}, s1{}, s2{}, s3{};
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    s0 += load(a + i) * load(b + i);
    s1 += load(a + i + kLanes) * load(b + i + kLanes);
    s2 += load(a + i + 2 * kLanes) * load(b + i + 2 * kLanes);
    s3 += load(a + i + 3 * kLanes) * load(b + i + 3 * kLanes);
  }
  for (; i + kLanes <= n; i += kLanes) s0 += load(a + i) * load(b + i);
  float tail = 0.0f;
  for (; i < n; ++i) tail += get(a + i) * get(b + i);
  return sum((s0 + s1) + (s2 + s3)) + tail;
}

}  // namespace
}  // namespace unike
