// The latent attention, forward and backward: what is computed, in which order, and what the threads share.
//
// A block of tokens goes through three steps. Each token gathers its k entries: a pass over the keys gives the logits, one
// over the values h_know, and one over the projected values the hidden layer of Enc_sem, whose first weights need not be
// read then. (Where keys and values are one table, its rows come from the L2 cache the second time: 640 KB at k = 40,
// d = 4096.) Then the second weights of Enc_sem are read once for all tokens of the block, 64 rows at a time, of whose
// products only two sums a token are kept: with the anchor, and of squares. The last step is the gate and the blend.
//
// Every sum has an order of its own, whatever the threads do, and whichever tokens share the block. So tokens that have found
// nothing take no part: their rows are copied, and blocks are made of the others.
#include "unike/latent_attention.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "common/checked.h"
#include "common/parallel.h"
#include "common/status.h"
#include "common/workspace.h"
#include "cpu/isa.h"

namespace unike {
namespace {

constexpr int64_t kTokenBlock = 128;
// Rows of a weight matrix that are multiplied together.
constexpr int64_t kWeightRows = 64;
// Where there are fewer tokens than twice the threads, these share the entries and the columns of a token.
constexpr int64_t kEntries = 8;
constexpr int64_t kColumns = 512;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

float inverse(float x) { return x == 0.0f ? 0.0f : 1.0f / x; }

struct Problem {
  const unike_latent_inputs& in;
  const unike_memory& memory;
  const unike_semantic_encoder& encoder;
  const unike_blend* blend;  // null while the workspace is measured
};

// What one token of the block has.
struct Token {
  int64_t index;  // among all
  const float *query, *h, *anchor;
  int64_t entries;  // that it found
  float alpha, cosine;
};

class LatentAttention {
 public:
  LatentAttention(const Problem& p, const RowKernels& kernels, int threads, bool backward, Workspace& workspace)
      : in_(p.in),
        memory_(p.memory),
        encoder_(p.encoder),
        blend_(p.blend),
        kernels_(kernels),
        threads_(threads),
        query_size_(times(p.memory.heads, p.memory.width)),
        block_(std::min(p.in.m, kTokenBlock)),
        padded_k_(ceil_div(p.in.k, 4) * 4),
        rows_(std::max(p.in.k, backward ? std::max(p.in.d, p.encoder.r) : 0)),
        tiles_(ceil_div(p.in.d, kWeightRows)) {
    const auto rows = [&](int64_t size) { return workspace.take<float>(times(block_, size)); };
    order_ = workspace.take<int64_t>(in_.m);
    tokens_ = workspace.take<Token>(block_);
    ids_ = workspace.take<int64_t>(times(block_, in_.k));
    weights_ = rows(times(memory_.heads, padded_k_));
    know_ = rows(in_.d);
    hidden_ = rows(encoder_.r);
    parts_ = rows(2 * tiles_);
    if (in_.queries.dtype != UNIKE_F32) queries_ = rows(query_size_);
    if (in_.inputs.dtype != UNIKE_F32) inputs_ = rows(in_.d);
    products_ = workspace.take<float>(times(threads, block_, kWeightRows));
    pointers_ = workspace.take<const void*>(times(threads, rows_));
    if (!backward) {
      outputs_ = workspace.take<float>(times(threads, in_.d));
      return;
    }
    activated_ = rows(encoder_.r);
    sem_ = rows(in_.d);
    grad_know_ = rows(in_.d);
    grads_ = rows(in_.d);
    grad_weights_ = rows(times(memory_.heads, padded_k_));
  }

  void forward(unike_rows_out out, float* alpha_out) {
    const int64_t row_bytes = in_.d * size_of(out.dtype);
    const auto row_of = [&](int64_t token) {
      return static_cast<char*>(out.data) + token * out.stride * size_of(out.dtype);
    };
    find_active();
    each_inactive([&](int64_t token) {
      if (alpha_out != nullptr) alpha_out[token] = 0.0f;
      const void* given = row(in_.inputs.data, in_.inputs.dtype, token * in_.inputs.stride);
      if (given != row_of(token)) std::copy_n(static_cast<const char*>(given), row_bytes, row_of(token));
    });
    for (first_ = 0; first_ < active_; first_ += block_) {
      count_ = std::min(block_, active_ - first_);
      attend();
      if (blend_->alpha == nullptr) {
        hidden_layer();
        activate(hidden_);
        each_weight_tile([&](int64_t tile, int thread) { measure_tile(tile, thread, hidden_, nullptr); });
      }
      parallel_for(count_, threads_of(in_.d), [&](int64_t t, int thread) {
        gate(t);
        const int64_t token = tokens_[t].index;
        if (alpha_out != nullptr) alpha_out[token] = tokens_[t].alpha;
        blend_token(t, out.dtype, row_of(token), outputs_ + thread * in_.d);
      });
    }
  }

  struct Gradients {
    unike_rows grad;
    const float* grad_alpha;
    float *queries, *inputs, *given, *anchor;
  };

  void backward(const Gradients& g) {
    find_active();
    each_inactive([&](int64_t token) {
      load_gradient(g, token, g.inputs + token * in_.d);
      std::fill_n(g.queries + token * query_size_, query_size_, 0.0f);
      if (g.anchor != nullptr) std::fill_n(g.anchor + token * in_.d, in_.d, 0.0f);
      if (g.given != nullptr) g.given[token] = 0.0f;
    });
    for (first_ = 0; first_ < active_; first_ += block_) {
      count_ = std::min(block_, active_ - first_);
      attend();
      const bool computed = blend_->alpha == nullptr;
      if (computed) {
        hidden_layer();
        std::copy_n(hidden_, count_ * encoder_.r, activated_);
        activate(activated_);
        each_weight_tile([&](int64_t tile, int thread) { measure_tile(tile, thread, activated_, sem_); });
      }
      parallel_for(count_, threads_of(8 * in_.d), [&](int64_t t, int) {
        gate(t);
        through_blend(t, g);
      });
      if (computed) through_encoder();
      parallel_for(count_, threads_of(in_.k * (in_.d + query_size_)), [&](int64_t t, int thread) {
        through_attention(t, thread, g.queries + tokens_[t].index * query_size_);
      });
    }
  }

 private:
  // Orders the tokens: those with an entry, then the others.
  void find_active() {
    active_ = 0;
    int64_t inactive = in_.m;
    for (int64_t token = 0; token < in_.m; ++token) {
      const int64_t* ids = ids_of(token);
      const bool found = std::any_of(ids, ids + in_.k, [](int64_t id) { return id >= 0; });
      order_[found ? active_++ : --inactive] = token;
    }
  }

  // Calls body(token) for the tokens without an entry.
  void each_inactive(const auto& body) const {
    constexpr int64_t kRun = 64;
    const int64_t count = in_.m - active_;
    const int threads = useful_threads(static_cast<double>(count) * static_cast<double>(in_.d), threads_);
    parallel_for(ceil_div(count, kRun), threads, [&](int64_t run, int) {
      for (int64_t i = run * kRun; i < std::min(count, (run + 1) * kRun); ++i) body(order_[active_ + i]);
    });
  }

  const int64_t* ids_of(int64_t token) const { return in_.ids + token / (in_.m / in_.id_rows) * in_.k; }

  // Threads for work that takes so many multiply-adds for each token.
  int threads_of(int64_t per_token) const {
    return useful_threads(static_cast<double>(count_) * static_cast<double>(per_token), threads_);
  }

  const void* row(const void* table, unike_dtype dtype, int64_t element) const {
    return static_cast<const char*>(table) + element * size_of(dtype);
  }

  const void** pointers(int thread) const { return pointers_ + thread * rows_; }

  // h_know of all tokens and, from projected values, the hidden layer without its bias.
  void attend() {
    const int64_t heads = memory_.heads, d = in_.d, r = encoder_.r;
    for (int64_t t = 0; t < count_; ++t) load_token(t);
    std::fill_n(know_, count_ * d, 0.0f);
    std::fill_n(hidden_, count_ * r, 0.0f);
    const int threads = threads_of(in_.k * (query_size_ + heads * d));
    if (count_ >= 2 * threads) {
      parallel_for(count_, threads, [&](int64_t t, int thread) {
        for (int64_t head = 0; head < heads; ++head) {
          score(t, head, 0, in_.k, thread);
          normalize(t, head);
          add_values(t, head, 0, d, thread);
          add_projected(t, head, thread);
        }
      });
      return;
    }
    const int64_t parts = ceil_div(in_.k, kEntries), slices = ceil_div(d, kColumns);
    parallel_for(count_ * heads * parts, threads, [&](int64_t task, int thread) {
      const int64_t part = task % parts, head = task / parts % heads, t = task / parts / heads;
      score(t, head, part * kEntries, (part + 1) * kEntries, thread);
    });
    for (int64_t i = 0; i < count_ * heads; ++i) normalize(i / heads, i % heads);
    parallel_for(count_ * (slices + 1), threads, [&](int64_t task, int thread) {
      const int64_t slice = task % (slices + 1), t = task / (slices + 1);
      for (int64_t head = 0; head < heads; ++head) {
        if (slice == slices) {
          add_projected(t, head, thread);
        } else {
          add_values(t, head, slice * kColumns, std::min(d, (slice + 1) * kColumns), thread);
        }
      }
    });
  }

  void load_token(int64_t t) {
    const int64_t token = order_[first_ + t], d = in_.d;
    const auto as_float = [&](const unike_rows& table, int64_t size, float* converted) {
      const void* data = row(table.data, table.dtype, token * table.stride);
      if (table.dtype == UNIKE_F32) return static_cast<const float*>(data);
      kernels_.load_row[table.dtype](data, size, converted + t * size);
      return static_cast<const float*>(converted + t * size);
    };
    Token& of = tokens_[t];
    of.index = token;
    of.query = as_float(in_.queries, query_size_, queries_);
    of.h = as_float(in_.inputs, d, inputs_);
    of.anchor = blend_->anchor ? blend_->anchor + token / (in_.m / blend_->anchors) * d : of.h;
    const int64_t* given = ids_of(token);
    of.entries =
        std::copy_if(given, given + in_.k, ids_ + t * in_.k, [](int64_t id) { return id >= 0; }) - (ids_ + t * in_.k);
  }

  float* weights(int64_t t, int64_t head) const { return weights_ + (t * memory_.heads + head) * padded_k_; }

  // Pointers to what the entries from, ..., to - 1 of a token have in a table of rows [heads, size].
  int64_t entries(int64_t t, int64_t head, int64_t from, int64_t to, const void* table, unike_dtype dtype, int64_t size,
                  int64_t column, const void** out) const {
    to = std::min(to, tokens_[t].entries);
    for (int64_t i = from; i < to; ++i) {
      out[i - from] = row(table, dtype, (ids_[t * in_.k + i] * memory_.heads + head) * size + column);
    }
    return std::max<int64_t>(0, to - from);
  }

  void score(int64_t t, int64_t head, int64_t from, int64_t to, int thread) const {
    const void** keys = pointers(thread);
    const int64_t n = entries(t, head, from, to, memory_.keys, memory_.dtype, memory_.width, 0, keys);
    const float* query = tokens_[t].query + head * memory_.width;
    if (n > 0)
      kernels_.dots[memory_.dtype](&query, 1, keys, n, memory_.width, false, weights(t, head) + from, padded_k_);
  }

  // softmax(scale * logits).
  void normalize(int64_t t, int64_t head) const {
    float* w = weights(t, head);
    float* end = w + tokens_[t].entries;
    float largest = -std::numeric_limits<float>::infinity(), total = 0.0f;
    for (float* x = w; x < end; ++x) largest = std::max(largest, *x *= blend_->scale);
    for (float* x = w; x < end; ++x) total += * x = std::exp(*x - largest);
    for (float* x = w; x < end; ++x) *x /= total;
  }

  void add_values(int64_t t, int64_t head, int64_t from, int64_t to, int thread) const {
    const void** values = pointers(thread);
    const int64_t n = entries(t, head, 0, in_.k, memory_.values, memory_.dtype, in_.d, from, values);
    kernels_.add_gathered[memory_.dtype](weights(t, head), values, n, to - from, know_ + t * in_.d + from);
  }

  void add_projected(int64_t t, int64_t head, int thread) const {
    if (memory_.projected == nullptr || blend_->alpha != nullptr) return;
    const void** rows = pointers(thread);
    const int64_t n = entries(t, head, 0, in_.k, memory_.projected, UNIKE_F32, encoder_.r, 0, rows);
    kernels_.add_gathered[UNIKE_F32](weights(t, head), rows, n, encoder_.r, hidden_ + t * encoder_.r);
  }

  // out[t] = x[t] . rows[from + i] for the tokens of the block and the rows of a tile of weights [n, size].
  int64_t multiply(const float* x, const void* table, int64_t n, int64_t size, int64_t tile, float* out) const {
    const float* tokens[kTokenBlock];
    const void* rows[kWeightRows];
    const int64_t from = tile * kWeightRows, count = std::min(kWeightRows, n - from);
    for (int64_t t = 0; t < count_; ++t) tokens[t] = x + t * size;
    for (int64_t i = 0; i < count; ++i) rows[i] = row(table, encoder_.dtype, (from + i) * size);
    kernels_.dots[encoder_.dtype](tokens, count_, rows, count, size, true, out, kWeightRows);
    return count;
  }

  // The hidden layer before its activation.
  void hidden_layer() {
    const int64_t r = encoder_.r;
    if (memory_.projected == nullptr) {
      parallel_for(ceil_div(r, kWeightRows), threads_of(r * in_.d), [&](int64_t tile, int thread) {
        float* out = products_ + thread * block_ * kWeightRows;
        const int64_t count = multiply(know_, encoder_.w1, r, in_.d, tile, out);
        for (int64_t t = 0; t < count_; ++t) {
          std::copy_n(out + t * kWeightRows, count, hidden_ + t * r + tile * kWeightRows);
        }
      });
    }
    for (int64_t t = 0; t < count_; ++t) {
      for (int64_t i = 0; i < r; ++i) hidden_[t * r + i] += encoder_.b1[i];
    }
  }

  void activate(float* hidden) const {
    parallel_for(count_, threads_of(16 * encoder_.r),
                 [&](int64_t t, int) { kernels_.gelu(hidden + t * encoder_.r, encoder_.r); });
  }

  void each_weight_tile(const auto& body) const { parallel_for(tiles_, threads_of(encoder_.r * in_.d), body); }

  // What a tile of Enc_sem(h_know) adds to its products with the anchor and with itself; keeps it in `sem` if given.
  void measure_tile(int64_t tile, int thread, const float* hidden, float* sem) const {
    float* out = products_ + thread * block_ * kWeightRows;
    const int64_t from = tile * kWeightRows, n = multiply(hidden, encoder_.w2, in_.d, encoder_.r, tile, out);
    for (int64_t t = 0; t < count_; ++t) {
      float* products = out + t * kWeightRows;
      float* parts = parts_ + (t * tiles_ + tile) * 2;
      kernels_.measure(products, encoder_.b2 + from, tokens_[t].anchor + from, n, parts, parts + 1);
      if (sem != nullptr) std::copy_n(products, n, sem + t * in_.d + from);
    }
  }

  float norm(const float* x) const { return std::sqrt(kernels_.dot(x, x, in_.d)); }

  void gate(int64_t t) const {
    Token& of = tokens_[t];
    if (blend_->alpha != nullptr) {
      of.alpha = blend_->alpha[blend_->alphas == 1 ? 0 : of.index];
    } else {
      float against = 0.0f, squares = 0.0f;
      for (int64_t tile = 0; tile < tiles_; ++tile) {
        against += parts_[(t * tiles_ + tile) * 2];
        squares += parts_[(t * tiles_ + tile) * 2 + 1];
      }
      of.cosine = against * inverse(std::sqrt(squares)) * inverse(norm(of.anchor));
      of.alpha = of.cosine < 0.0f ? 0.0f : of.cosine > 1.0f ? 1.0f : of.cosine;  // NaN stays NaN
    }
  }

  // What becomes of h_know: its share of the output, and |h| / |h_know|.
  float share(int64_t t) const { return blend_->eq7 ? 1.0f - tokens_[t].alpha : tokens_[t].alpha; }
  float stretch(int64_t t) const {
    return blend_->match_norm ? norm(tokens_[t].h) * inverse(norm(know_ + t * in_.d)) : 1.0f;
  }

  void blend_token(int64_t t, unike_dtype dtype, void* out, float* scratch) const {
    const float part = share(t);
    float* result = dtype == UNIKE_F32 ? static_cast<float*>(out) : scratch;
    kernels_.blend(tokens_[t].h, 1.0f - part, know_ + t * in_.d, part * stretch(t), in_.d, result);
    if (result == scratch) kernels_.store_row[dtype](result, in_.d, out);
  }

  // The gradient to a token's output, as float32.
  void load_gradient(const Gradients& g, int64_t token, float* out) const {
    kernels_.load_row[g.grad.dtype](row(g.grad.data, g.grad.dtype, token * g.grad.stride), in_.d, out);
  }

  // grad_know, and grad_sem in place of sem; the gradients to h, alpha and the anchor are complete then.
  void through_blend(int64_t t, const Gradients& to) const {
    const Token& of = tokens_[t];
    const int64_t d = in_.d, token = of.index;
    const float* know = know_ + t * d;
    float *g = grads_ + t * d, *grad_know = grad_know_ + t * d, *grad_h = to.inputs + token * d;
    load_gradient(to, token, g);
    float* grad_anchor = to.anchor ? to.anchor + token * d : nullptr;
    if (grad_anchor != nullptr) std::fill_n(grad_anchor, d, 0.0f);
    if (to.given != nullptr) to.given[token] = 0.0f;
    const float part = share(t), scale = stretch(t), sign = blend_->eq7 ? -1.0f : 1.0f;
    const float g_know = kernels_.dot(g, know, d), g_h = kernels_.dot(g, of.h, d);
    const float grad_gate = sign * (g_know * scale - g_h) + to.grad_alpha[token];
    float to_h = 0.0f, to_know = 0.0f;  // what the norms add: multiples of h and of h_know
    if (blend_->match_norm) {
      const float projection = part * g_know, inverse_know = inverse(norm(know));
      to_h = projection * inverse_know * inverse(norm(of.h));
      to_know = -scale * projection * inverse_know * inverse_know;
    }
    kernels_.blend(g, 1.0f - part, of.h, to_h, d, grad_h);
    kernels_.blend(g, part * scale, know, to_know, d, grad_know);
    if (blend_->alpha != nullptr) {
      if (to.given != nullptr) to.given[token] = grad_gate;
      return;
    }
    float* sem = sem_ + t * d;
    const float grad_cosine = of.cosine >= 0.0f && of.cosine <= 1.0f ? grad_gate : 0.0f;
    const float inverse_sem = inverse(norm(sem)), inverse_anchor = inverse(norm(of.anchor));
    const float both = grad_cosine * inverse_sem * inverse_anchor;
    const float own_anchor = -grad_cosine * of.cosine * inverse_anchor * inverse_anchor;
    const float own_sem = -grad_cosine * of.cosine * inverse_sem * inverse_sem;
    if (grad_anchor != nullptr) {
      kernels_.blend(sem, both, of.anchor, own_anchor, d, grad_anchor);
    } else {
      kernels_.blend(sem, both, of.anchor, own_anchor, d, g);  // g has been used
      kernels_.blend(grad_h, 1.0f, g, 1.0f, d, grad_h);
    }
    kernels_.blend(of.anchor, both, sem, own_sem, d, sem);
  }

  // sums[t] += the product of x[t] with all rows of a table [n, size], for the tokens of the block.
  void add_product(const float* x, const void* table, int64_t n, int64_t size, float* sums) const {
    const int64_t slices = ceil_div(size, kWeightRows);
    parallel_for(slices, threads_of(n * size), [&](int64_t slice, int thread) {
      const float* weights[kTokenBlock];
      float* out[kTokenBlock];
      const void** rows = pointers(thread);
      const int64_t from = slice * kWeightRows;
      for (int64_t t = 0; t < count_; ++t) {
        weights[t] = x + t * n;
        out[t] = sums + t * size + from;
      }
      for (int64_t j = 0; j < n; ++j) rows[j] = row(table, encoder_.dtype, j * size + from);
      kernels_.add_rows[encoder_.dtype](weights, count_, rows, n, std::min(kWeightRows, size - from), out);
    });
  }

  // From grad_sem to the hidden layer (in `activated_`) and, unless the projected values stand for it, to h_know.
  void through_encoder() {
    const int64_t r = encoder_.r;
    std::fill_n(activated_, count_ * r, 0.0f);
    add_product(sem_, encoder_.w2, in_.d, r, activated_);
    parallel_for(count_, threads_of(16 * r),
                 [&](int64_t t, int) { kernels_.times_gelu_slope(activated_ + t * r, hidden_ + t * r, r); });
    if (memory_.projected == nullptr) add_product(activated_, encoder_.w1, r, in_.d, grad_know_);
  }

  void through_attention(int64_t t, int thread, float* grad_query) const {
    const int64_t n = tokens_[t].entries, d = in_.d, r = encoder_.r;
    const void** rows = pointers(thread);
    std::fill_n(grad_query, query_size_, 0.0f);
    for (int64_t head = 0; head < memory_.heads; ++head) {
      const float *grad_know = grad_know_ + t * d, *grad_hidden = activated_ + t * r, *w = weights(t, head);
      float* grads = grad_weights_ + (t * memory_.heads + head) * padded_k_;
      entries(t, head, 0, n, memory_.values, memory_.dtype, d, 0, rows);
      kernels_.dots[memory_.dtype](&grad_know, 1, rows, n, d, false, grads, padded_k_);
      if (memory_.projected != nullptr && blend_->alpha == nullptr) {
        float* through_hidden = products_ + thread * block_ * kWeightRows;
        for (int64_t from = 0; from < n; from += kWeightRows) {
          const int64_t count = entries(t, head, from, from + kWeightRows, memory_.projected, UNIKE_F32, r, 0, rows);
          kernels_.dots[UNIKE_F32](&grad_hidden, 1, rows, count, r, false, through_hidden, kWeightRows);
          for (int64_t i = 0; i < count; ++i) grads[from + i] += through_hidden[i];
        }
      }
      float mean = 0.0f;
      for (int64_t i = 0; i < n; ++i) mean += w[i] * grads[i];
      for (int64_t i = 0; i < n; ++i) grads[i] = blend_->scale * w[i] * (grads[i] - mean);
      entries(t, head, 0, n, memory_.keys, memory_.dtype, memory_.width, 0, rows);
      kernels_.add_gathered[memory_.dtype](grads, rows, n, memory_.width, grad_query + head * memory_.width);
    }
  }

  const unike_latent_inputs& in_;
  const unike_memory& memory_;
  const unike_semantic_encoder& encoder_;
  const unike_blend* blend_;
  const RowKernels& kernels_;
  int threads_;
  int64_t query_size_;  // heads * width
  int64_t block_;       // tokens that the workspace has room for
  int64_t padded_k_;
  int64_t rows_;                   // that a thread points to at a time
  int64_t tiles_;                  // of the second weights
  int64_t active_ = 0;             // tokens with an entry
  int64_t first_ = 0, count_ = 0;  // those of the block at work

  int64_t* order_;  // [m]: the tokens with an entry, then the others
  Token* tokens_;
  int64_t* ids_;                                  // [block, k], without the -1
  float* weights_;                                // [block, heads, padded k]: logits, then softmax
  float* know_;                                   // [block, d]
  float* hidden_;                                 // [block, r]
  float* parts_;                                  // [block, tiles, 2]
  float *queries_ = nullptr, *inputs_ = nullptr;  // converted to float32
  float* products_;                               // [threads, block, kWeightRows]
  const void** pointers_;                         // [threads, rows]
  float* outputs_ = nullptr;                      // [threads, d]
  float *activated_ = nullptr, *sem_ = nullptr, *grad_know_ = nullptr, *grads_ = nullptr, *grad_weights_ = nullptr;
};

void check_sizes(const Problem& p) {
  const unike_latent_inputs& in = p.in;
  const unike_memory& memory = p.memory;
  check_size("m", in.m, 0);
  check_size("d", in.d, 1);
  check_size("k", in.k, 0);
  check_size("memory.n", memory.n, 0);
  check_size("memory.heads", memory.heads, 1);
  check_size("memory.width", memory.width, 1);
  check_size("encoder.r", p.encoder.r, 0);
  constexpr int64_t size = sizeof(int64_t);
  times(in.m, in.d, size);
  times(in.m, in.k, size);
  times(in.m, memory.heads, memory.width, size);
  times(p.encoder.r, in.d, size);
  for (const int64_t columns : {memory.width, in.d, p.encoder.r}) times(memory.n, memory.heads, columns, size);
}

// The rows of the tokens that are read.
struct TokenRows {
  Extent queries, inputs;
};

TokenRows check(const Problem& p) {
  check_sizes(p);
  const unike_latent_inputs& in = p.in;
  const unike_memory& memory = p.memory;
  const unike_blend& blend = *p.blend;
  const unike_semantic_encoder& encoder = p.encoder;
  const int64_t rows = memory.n * memory.heads, d = in.d, r = encoder.r;
  check_table("memory.keys", memory.keys, memory.dtype, rows * memory.width);
  check_table("memory.values", memory.values, memory.dtype, rows * d);
  if (memory.projected != nullptr) check_array("memory.projected", memory.projected, rows * r);
  check_dtype("encoder.dtype", encoder.dtype);
  const TokenRows tokens{check_rows("queries", in.queries, in.m, memory.heads * memory.width),
                         check_rows("inputs", in.inputs, in.m, d)};
  require(memory.keys != memory.values || rows == 0 || memory.width == in.d,
          "keys serve as values only where their width is d");
  require(in.m == 0 || (in.id_rows >= 1 && in.m % in.id_rows == 0), "the tokens cannot be split evenly among the ids");
  if (blend.alpha == nullptr) {
    require(encoder.w1 != nullptr || memory.projected != nullptr || r == 0,
            "w1 is needed where no projected values are given");
    if (memory.projected == nullptr) check_table("encoder.w1", encoder.w1, encoder.dtype, r * d);
    check_table("encoder.w2", encoder.w2, encoder.dtype, d * r);
    check_array("encoder.b1", encoder.b1, r);
    check_array("encoder.b2", encoder.b2, d);
  } else {
    check_size("blend.alphas", blend.alphas, 0);
    check_array("blend.alpha", blend.alpha, blend.alphas);
  }
  require(blend.alpha == nullptr || blend.alphas == 1 || blend.alphas == in.m, "alpha must have 1 or m values");
  require(blend.anchor == nullptr || (blend.anchors >= 1 && in.m % blend.anchors == 0),
          "the tokens cannot be split evenly among the anchors");
  if (blend.anchor != nullptr) check_array("blend.anchor", blend.anchor, times(blend.anchors, d));
  return tokens;
}

void check_ids(const unike_latent_inputs& in, int64_t n) {
  if (in.m == 0) return;
  check_array("ids", in.ids, times(in.id_rows, in.k));
  require(std::all_of(in.ids, in.ids + in.id_rows * in.k, [&](int64_t id) { return -1 <= id && id < n; }),
          "ids must be -1 or name entries of the memory");
}

int64_t workspace_bytes_of(const unike_latent_inputs* in, const unike_memory* memory,
                           const unike_semantic_encoder* encoder, int threads, bool backward) {
  return guarded_bytes([&] {
    require(in != nullptr && memory != nullptr && encoder != nullptr, "a null argument");
    const Problem problem{*in, *memory, *encoder, nullptr};
    check_sizes(problem);
    Workspace workspace;
    LatentAttention(problem, row_kernels(), threads_of_call(threads), backward, workspace);
    return workspace.bytes();
  });
}

}  // namespace
}  // namespace unike

extern "C" int64_t unike_latent_attention_workspace(const unike_latent_inputs* in, const unike_memory* memory,
                                                    const unike_semantic_encoder* encoder, int threads) {
  return unike::workspace_bytes_of(in, memory, encoder, threads, false);
}

extern "C" unike_status unike_latent_attention(const unike_latent_inputs* in, const unike_memory* memory,
                                               const unike_semantic_encoder* encoder, const unike_blend* blend,
                                               unike_rows_out out, float* alpha_out, void* workspace,
                                               int64_t workspace_bytes, int threads) {
  using namespace unike;
  return guarded([&] {
    require(in != nullptr && memory != nullptr && encoder != nullptr && blend != nullptr, "a null argument");
    const Problem problem{*in, *memory, *encoder, blend};
    const TokenRows read = check(problem);
    check_ids(*in, memory->n);
    const Extent written = check_rows_out("out", out, in->m, in->d);
    require(out.dtype == in->inputs.dtype, "out must have the dtype of the inputs");
    check_apart("out", written, read.inputs);
    check_apart("out", written, read.queries);
    if (blend->anchor != nullptr && in->m > 0) {
      const auto anchor = reinterpret_cast<uintptr_t>(blend->anchor);
      const auto bytes = static_cast<uintptr_t>(blend->anchors * in->d) * sizeof(float);
      require(written.end() <= anchor || anchor + bytes <= written.first, "out must not overlap the anchors");
    }
    if (alpha_out != nullptr) check_array("alpha_out", alpha_out, in->m);
    if (in->m == 0) return;
    Workspace pieces(workspace, workspace_bytes);
    LatentAttention(problem, row_kernels(), threads_of_call(threads), false, pieces).forward(out, alpha_out);
  });
}

extern "C" int64_t unike_latent_attention_backward_workspace(const unike_latent_inputs* in, const unike_memory* memory,
                                                             const unike_semantic_encoder* encoder, int threads) {
  return unike::workspace_bytes_of(in, memory, encoder, threads, true);
}

extern "C" unike_status unike_latent_attention_backward(const unike_latent_inputs* in, const unike_memory* memory,
                                                        const unike_semantic_encoder* encoder, const unike_blend* blend,
                                                        unike_rows grad, const float* grad_alpha, float* grad_queries,
                                                        float* grad_inputs, float* grad_given, float* grad_anchor,
                                                        void* workspace, int64_t workspace_bytes, int threads) {
  using namespace unike;
  return guarded([&] {
    require(in != nullptr && memory != nullptr && encoder != nullptr && blend != nullptr, "a null argument");
    const Problem problem{*in, *memory, *encoder, blend};
    check(problem);
    check_ids(*in, memory->n);
    const int64_t m = in->m, d = in->d;
    check_rows("grad", grad, m, d);
    check_array("grad_alpha", grad_alpha, m);
    check_array("grad_queries", grad_queries, m * memory->heads * memory->width);
    check_array("grad_inputs", grad_inputs, m * d);
    if (grad_given != nullptr) check_array("grad_given", grad_given, m);
    require((grad_anchor != nullptr) == (blend->anchor != nullptr) || m == 0,
            "grad_anchor must be given where there is an anchor, and only there");
    if (grad_anchor != nullptr) check_array("grad_anchor", grad_anchor, m * d);
    if (m == 0) return;
    Workspace pieces(workspace, workspace_bytes);
    LatentAttention(problem, row_kernels(), threads_of_call(threads), true, pieces)
        .backward({grad, grad_alpha, grad_queries, grad_inputs, grad_given, grad_anchor});
  });
}
