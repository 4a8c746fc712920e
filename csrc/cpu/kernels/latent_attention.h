// Attention over the retrieved entries, gate and blend for a few tokens, compiled once for each ISA.
//
// A token gathers its k entries by id: a pass over the keys gives the logits, a pass over the values the sum (where keys
// and values are one table its rows come from the L2 cache the second time: 640 KB at k = 40, d = 4096). Enc_sem is the
// larger part of the arithmetic, 2 r d multiply-adds a token over 8 r d bytes of weights: a group of tokens shares each
// weight that is read.
#pragma once

#include "cpu/kernels/activation.h"
#include "cpu/kernels/vector.h"
#include "cpu/latent_attention.h"

namespace unike {
namespace {

// out[t, i] = b[i] + sum over j of w[i, j] x[t, j]. A token's sum has the same order whatever T is.
template <int64_t T>
void linear(const float* x, int64_t in, const float* w, const float* b, int64_t rows, float* out) {
  for (int64_t i = 0; i < rows; ++i) {
    const float* weights = w + i * in;
    Vec s[T] = {};
    int64_t j = 0;
    for (; j + kLanes <= in; j += kLanes) {
      const Vec v = load(weights + j);
      for (int64_t t = 0; t < T; ++t) s[t] += v * load(x + t * in + j);
    }
    for (int64_t t = 0; t < T; ++t) {
      float tail = 0.0f;
      for (int64_t l = j; l < in; ++l) tail += weights[l] * x[t * in + l];
      out[t * rows + i] = b[i] + (sum(s[t]) + tail);
    }
  }
}

void linear(const float* x, int64_t in, const float* w, const float* b, int64_t rows, int64_t tokens, float* out) {
  static_assert(LatentProblem::kTokens == 4);
  const auto run = tokens == 1 ? linear<1> : tokens == 2 ? linear<2> : tokens == 3 ? linear<3> : linear<4>;
  run(x, in, w, b, rows, out);
}

// h_know of one token; false if it has no entry.
bool attend(const LatentProblem& p, int64_t t, float* weights, float* know) {
  const unike_memory_f32& memory = *p.memory;
  const int64_t* ids = p.ids + t / (p.m / p.id_rows) * p.k;
  __builtin_memset(know, 0, p.d * sizeof(float));
  bool found = false;
  for (int64_t h = 0; h < memory.heads; ++h) {
    const float* query = p.queries + (t * memory.heads + h) * memory.width;
    float largest = -__builtin_inff();
    for (int64_t i = 0; i < p.k; ++i) {
      if (ids[i] < 0) continue;
      found = true;
      weights[i] = p.blend->scale * dot(query, memory.keys + (ids[i] * memory.heads + h) * memory.width, memory.width);
      largest = weights[i] > largest ? weights[i] : largest;
    }
    float total = 0.0f;
    for (int64_t i = 0; i < p.k; ++i) {
      if (ids[i] >= 0) total += weights[i] = ::expf(weights[i] - largest);
    }
    for (int64_t i = 0; i < p.k; ++i) {
      if (ids[i] >= 0) axpy(weights[i] / total, memory.values + (ids[i] * memory.heads + h) * p.d, know, p.d);
    }
  }
  return found;
}

float inverse(float x) { return x == 0.0f ? 0.0f : 1.0f / x; }

float norm(const float* x, int64_t n) { return ::sqrtf(dot(x, x, n)); }

void blend_token(const LatentProblem& p, int64_t t, float alpha, const float* know) {
  const float* h = p.inputs + t * p.inputs_stride;
  float* out = p.out + t * p.out_stride;
  const float stretch = p.blend->match_norm ? norm(h, p.d) * inverse(norm(know, p.d)) : 1.0f;
  const float share = p.blend->eq7 ? 1.0f - alpha : alpha;
  for (int64_t i = 0; i < p.d; ++i) out[i] = (1.0f - share) * h[i] + share * (know[i] * stretch);
}

void latent_attention(const LatentProblem& p, int64_t start, int64_t stop, float* scratch) {
  const unike_blend& blend = *p.blend;
  const unike_semantic_encoder_f32& encoder = *p.encoder;
  const int64_t tokens = stop - start;
  float* weights = scratch;
  float* know = weights + p.k;
  float* sem = know + LatentProblem::kTokens * p.d;
  float* hidden = sem + LatentProblem::kTokens * p.d;
  bool found[LatentProblem::kTokens];
  for (int64_t t = 0; t < tokens; ++t) found[t] = attend(p, start + t, weights, know + t * p.d);
  if (!blend.alpha) {
    linear(know, p.d, encoder.w1, encoder.b1, encoder.r, tokens, hidden);
    for (int64_t i = 0; i < tokens * encoder.r; ++i) hidden[i] = activate(UNIKE_GELU, hidden[i]);
    linear(hidden, encoder.r, encoder.w2, encoder.b2, p.d, tokens, sem);
  }
  for (int64_t t = 0; t < tokens; ++t) {
    const int64_t token = start + t;
    const float* h = p.inputs + token * p.inputs_stride;
    float* out = p.out + token * p.out_stride;
    if (!found[t]) {
      if (out != h) __builtin_memcpy(out, h, p.d * sizeof(float));
      p.alpha_out[token] = 0.0f;
      continue;
    }
    float alpha;
    if (blend.alpha) {
      alpha = blend.alpha[blend.alphas == 1 ? 0 : token];
    } else {
      const float* anchor = blend.anchor ? blend.anchor + token / (p.m / blend.anchors) * p.d : h;
      const float* s = sem + t * p.d;
      alpha = dot(s, anchor, p.d) * inverse(norm(s, p.d)) * inverse(norm(anchor, p.d));
      alpha = alpha < 0.0f ? 0.0f : alpha > 1.0f ? 1.0f : alpha;
    }
    p.alpha_out[token] = alpha;
    blend_token(p, token, alpha, know + t * p.d);
  }
}

}  // namespace
}  // namespace unike
