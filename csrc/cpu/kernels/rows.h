// Rows of float32 or BFloat16 as the operators use them: converted, weighted and summed. Compiled once for each ISA.
#pragma once

#include "cpu/kernels/dot_tile.h"
#include "cpu/kernels/gelu.h"
#include "cpu/row_kernels.h"

namespace unike {
namespace {

template <typename T>
void load_row(const void* row, int64_t d, float* out) {
  const T* x = static_cast<const T*>(row);
  int64_t i = 0;
  for (; i + kLanes <= d; i += kLanes) store(out + i, load(x + i));
  for (; i < d; ++i) out[i] = get(x + i);
}

template <typename T>
void store_row(const float* row, int64_t d, void* out) {
  T* y = static_cast<T*>(out);
  int64_t i = 0;
  for (; i + kLanes <= d; i += kLanes) store(y + i, load(row + i));
  for (; i < d; ++i) put(y + i, row[i]);
}

// sums[t] += sum over j of weights[t][j] rows[j], over d columns, for kTokens sums and all n rows in their order: four
// registers of columns at a time, so that a row that is read serves all sums.
template <typename T, int kTokens, int kVectors>
inline void add_columns(const float* const* weights, const T* const* rows, int64_t n, int64_t column,
                        float* const* sums) {
  Vec s[kTokens][kVectors];
  for (int t = 0; t < kTokens; ++t) {
    for (int v = 0; v < kVectors; ++v) s[t][v] = load(sums[t] + column + v * kLanes);
  }
  for (int64_t j = 0; j < n; ++j) {
    for (int v = 0; v < kVectors; ++v) {
      const Vec x = load(rows[j] + column + v * kLanes);
      for (int t = 0; t < kTokens; ++t) s[t][v] += weights[t][j] * x;
    }
  }
  for (int t = 0; t < kTokens; ++t) {
    for (int v = 0; v < kVectors; ++v) store(sums[t] + column + v * kLanes, s[t][v]);
  }
}

template <typename T, int kTokens>
void add_rows(const float* const* weights, const T* const* rows, int64_t n, int64_t d, float* const* sums) {
  int64_t i = 0;
  for (; i + 4 * kLanes <= d; i += 4 * kLanes) add_columns<T, kTokens, 4>(weights, rows, n, i, sums);
  for (; i + kLanes <= d; i += kLanes) add_columns<T, kTokens, 1>(weights, rows, n, i, sums);
  for (; i < d; ++i) {
    for (int t = 0; t < kTokens; ++t) {
      for (int64_t j = 0; j < n; ++j) sums[t][i] += weights[t][j] * get(rows[j] + i);
    }
  }
}

template <typename T, int kRows>
inline void add_group(const float* weights, const T* const* rows, int64_t d, float* sum) {
  int64_t i = 0;
  for (; i + kLanes <= d; i += kLanes) {
    Vec s = load(sum + i);
    for (int j = 0; j < kRows; ++j) s += weights[j] * load(rows[j] + i);
    store(sum + i, s);
  }
  for (; i < d; ++i) {
    for (int j = 0; j < kRows; ++j) sum[i] += weights[j] * get(rows[j] + i);
  }
}

// The same for one sum of rows that come from memory: four rows at a time from end to end.
template <typename T>
void add_gathered(const float* weights, const T* const* rows, int64_t n, int64_t d, float* sum) {
  int64_t j = 0;
  for (; j + 8 <= n; j += 8) add_group<T, 8>(weights + j, rows + j, d, sum);
  for (; j + 4 <= n; j += 4) add_group<T, 4>(weights + j, rows + j, d, sum);
  for (; j < n; ++j) add_group<T, 1>(weights + j, rows + j, d, sum);
}

template <typename T>
void dots(const float* const* x, int64_t tokens, const void* const* rows, int64_t n, int64_t d, bool prefetch_next,
          float* out, int64_t ld) {
  dot_blocks<Floats<T>>(x, tokens, reinterpret_cast<const T* const*>(rows), n, d, prefetch_next, out, ld);
}

template <typename T>
void add_rows_of(const float* const* weights, int64_t tokens, const void* const* rows, int64_t n, int64_t d,
                 float* const* sums) {
  const auto* table = reinterpret_cast<const T* const*>(rows);
  int64_t t = 0;
  for (; t + 4 <= tokens; t += 4) add_rows<T, 4>(weights + t, table, n, d, sums + t);
  for (; t < tokens; ++t) add_rows<T, 1>(weights + t, table, n, d, sums + t);
}

template <typename T>
void add_gathered_of(const float* weights, const void* const* rows, int64_t n, int64_t d, float* sum) {
  add_gathered(weights, reinterpret_cast<const T* const*>(rows), n, d, sum);
}

float dot_of(const float* a, const float* b, int64_t d) { return dot(a, b, d); }

void gelu_of(float* x, int64_t n) {
  apply(x, n, [](Vec v) { return gelu(v); });
}

void times_gelu_slope(float* x, const float* at, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(x + i, load(x + i) * gelu_slope(load(at + i)));
  if (i < n) {
    float rest[kLanes] = {};
    __builtin_memcpy(rest, at + i, (n - i) * sizeof(float));
    store(rest, gelu_slope(load(rest)));
    for (int64_t j = i; j < n; ++j) x[j] *= rest[j - i];
  }
}

void measure(float* x, const float* bias, const float* anchor, int64_t n, float* against, float* squares) {
  Vec a{}, s{};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Vec v = load(x + i) + load(bias + i);
    store(x + i, v);
    a += v * load(anchor + i);
    s += v * v;
  }
  float a_rest = 0.0f, s_rest = 0.0f;
  for (; i < n; ++i) {
    x[i] += bias[i];
    a_rest += x[i] * anchor[i];
    s_rest += x[i] * x[i];
  }
  *against = sum(a) + a_rest;
  *squares = sum(s) + s_rest;
}

void blend(const float* a, float own, const float* b, float other, int64_t d, float* out) {
  int64_t i = 0;
  for (; i + kLanes <= d; i += kLanes) store(out + i, own * load(a + i) + other * load(b + i));
  for (; i < d; ++i) out[i] = own * a[i] + other * b[i];
}

constexpr RowKernels rows{
    {load_row<float>, load_row<BFloat16>},
    {store_row<float>, store_row<BFloat16>},
    {dots<float>, dots<BFloat16>},
    {add_rows_of<float>, add_rows_of<BFloat16>},
    {add_gathered_of<float>, add_gathered_of<BFloat16>},
    dot_of,
    gelu_of,
    times_gelu_slope,
    measure,
    blend,
};

}  // namespace
}  // namespace unike
