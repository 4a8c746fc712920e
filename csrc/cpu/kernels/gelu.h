// GELU and its slope for many values at a time, in float32.
#pragma once

#include "cpu/kernels/vector.h"

namespace unike {
namespace {

inline Vec fill(float x) { return Vec{} + x; }
inline Vec at_most(Vec v, float limit) { return v < limit ? v : fill(limit); }
inline Vec at_least(Vec v, float limit) { return v > limit ? v : fill(limit); }

// c[0] x^(n-1) + c[1] x^(n-2) + ...
template <int n>
inline Vec polynomial(Vec x, const float (&c)[n]) {
  Vec p = fill(c[0]);
  for (int i = 1; i < n; ++i) p = p * x + c[i];
  return p;
}

// Within 5e-7: a rational approximation on [-4, 4], beyond which erf is 1 in float32.
inline Vec erf(Vec x) {
  x = at_least(at_most(x, 4.0f), -4.0f);
  constexpr float kAbove[] = {-2.72614225801306e-10f, 2.77068142495902e-08f,  -2.10102402082508e-06f,
                              -5.69250639462346e-05f, -7.34990630326855e-04f, -2.95459980854025e-03f,
                              -1.60960333262415e-02f};
  constexpr float kBelow[] = {-1.45660718464996e-05f, -2.13374055278905e-04f, -1.68282697438203e-03f,
                              -7.37332916720468e-03f, -1.42647390514189e-02f};
  const Vec y = x * x;
  return x * polynomial(y, kAbove) / polynomial(y, kBelow);
}

// exp(x) for x <= 0, within 3e-7 of its value: 2^n times a polynomial of the rest.
inline Vec exp_of_negative(Vec x) {
  x = at_least(x, -87.0f);
  const Vec n = (x * 1.44269504f + 0x1.8p23f) - 0x1.8p23f;
  const Vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  constexpr float kOverFactorials[] = {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f,
                                       4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
  const Vec p = polynomial(r, kOverFactorials) * r * r + r + 1.0f;
  return (Vec)((Ints)p + (__builtin_convertvector(n, Ints) << 23));
}

inline Vec gelu(Vec x) { return 0.5f * x * (1.0f + erf(x * 0.70710678f)); }

inline Vec gelu_slope(Vec x) {
  return 0.5f * (1.0f + erf(x * 0.70710678f)) + x * exp_of_negative(-0.5f * x * x) * 0.39894228f;
}

// x = f(x) for each of n values.
template <typename F>
inline void apply(float* x, int64_t n, const F& f) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(x + i, f(load(x + i)));
  if (i < n) {
    float rest[kLanes] = {};
    __builtin_memcpy(rest, x + i, (n - i) * sizeof(float));
    store(rest, f(load(rest)));
    __builtin_memcpy(x + i, rest, (n - i) * sizeof(float));
  }
}

}  // namespace
}  // namespace unike
