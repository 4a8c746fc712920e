// Keys of prompts, one prompt after the other; its words and tokens are shared by the threads.
//
// Words are read first: each is spelled and projected once, whatever tokens it is cut into, beside the projections of the
// embeddings; eight words or tokens share what is read of the weights. Then each token looks at its neighbours and is weighted by all queries. What a query
// sees is linear in embeddings and spellings: it averages these, and only the averages are multiplied by its values.
#include "unike/prompt_key.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>

#include "common/checked.h"
#include "common/parallel.h"
#include "common/status.h"
#include "common/workspace.h"
#include "cpu/isa.h"

namespace unike {
namespace {

constexpr int64_t kSpelling = UNIKE_SPELLING, kRow = UNIKE_TOKEN_CHARACTERS + 2;
constexpr int64_t kTokens = 8;  // of a group, or words
constexpr int kLongestRun = 4;
constexpr uint64_t kBuckets = 1 << 13;                            // of runs, each with signs of its own
constexpr uint64_t kWordBegins = 0x110000, kWordEnds = 0x110001;  // no characters
constexpr uint64_t kPrime = 1000003;

int64_t padded(int64_t n) { return (n + 3) / 4 * 4; }
int64_t groups_of(int64_t n) { return (n + kTokens - 1) / kTokens; }

uint64_t bucket_of(uint64_t hash) {
  hash *= 0x9E3779B97F4A7C15;
  hash = (hash ^ hash >> 30) * 0xBF58476D1CE4E5B9;
  return hash >> 33 & (kBuckets - 1);
}

// 64 bits that look random, for each number.
uint64_t splitmix64(uint64_t x) {
  x = (x + 1) * 0x9E3779B97F4A7C15;
  x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9;
  x = (x ^ x >> 27) * 0x94D049BB133111EB;
  return x ^ x >> 31;
}

// The eight bits of a byte, the highest first, as eight bytes of 0 or 1.
constexpr auto kBits = [] {
  std::array<uint64_t, 256> spread{};
  for (uint64_t byte = 0; byte < 256; ++byte) {
    for (int bit = 0; bit < 8; ++bit) spread[byte] |= (byte >> (7 - bit) & 1) << 8 * bit;
  }
  return spread;
}();

// The sum of the signs of a word's runs, character by character.
class Spelling {
 public:
  void add(uint64_t character) {
    for (int n = kLongestRun - 1; n > 0; --n) hashes_[n] = hashes_[n - 1] * kPrime + character + 1;
    hashes_[0] = character + 1;
    length_ = std::min(length_ + 1, kLongestRun);
    for (int n = character < kWordBegins ? 0 : 1; n < length_; ++n) {  // a mark alone is no run
      const uint64_t bucket = bucket_of(hashes_[n] + static_cast<uint64_t>(n));
      for (uint64_t part = 0; part < 4; ++part) {
        uint64_t signs = splitmix64(4 * bucket + part);
        for (uint64_t i = 8 * part; i < 8 * part + 8; ++i, signs >>= 8) ones_[i] += kBits[signs & 255];
      }
      if (++runs_ == 255) flush();  // a count of ones has a byte
    }
  }

  // Scaled to norm 16; zeros for a word without runs.
  void write(float* out) {
    flush();
    double squares = 0;
    for (int64_t i = 0; i < kSpelling; ++i) squares += static_cast<double>(sums_[i]) * sums_[i];
    const float norm = std::max(static_cast<float>(std::sqrt(squares)), 1e-12f);
    for (int64_t i = 0; i < kSpelling; ++i) out[i] = static_cast<float>(sums_[i]) / norm * 16.0f;
  }

 private:
  void flush() {
    uint8_t ones[kSpelling];
    std::memcpy(ones, ones_, sizeof ones);
    for (int64_t i = 0; i < kSpelling; ++i) sums_[i] += 2 * ones[i] - runs_;
    std::fill_n(ones_, kSpelling / 8, 0);
    runs_ = 0;
  }

  uint64_t hashes_[kLongestRun] = {};  // of the last 1 to 4 characters
  int length_ = 0, runs_ = 0;
  uint64_t ones_[kSpelling / 8] = {};
  int32_t sums_[kSpelling] = {};
};

class PromptKeys {
 public:
  PromptKeys(const unike_prompt_encoder& encoder, int64_t tokens, const RowKernels& kernels, int threads,
             Workspace& workspace)
      : of_(encoder), tokens_(tokens), kernels_(kernels), threads_(threads) {
    const int64_t n = of_.blocks, h = of_.hidden, seen = n * of_.heads;
    ld_ = padded(times(n, h));
    token_rows_ = take_rows(workspace, of_.token, n * h, of_.e);
    word_rows_ = take_rows(workspace, of_.word, n * h, kSpelling);
    conv_rows_ = take_rows(workspace, of_.conv, n * h, times(3, h));
    query_rows_ = take_rows(workspace, of_.query, seen, h);
    token_values_ = take_rows(workspace, of_.token_value, times(seen, of_.width), of_.e);
    word_values_ = take_rows(workspace, of_.word_value, times(seen, of_.width), kSpelling);
    there_ = workspace.take<int64_t>(tokens);
    words_ = workspace.take<int64_t>(plus(tokens, 1));
    word_of_ = workspace.take<int64_t>(tokens);
    states_ = workspace.take<float>(times(tokens, of_.e));
    spelled_ = workspace.take<float>(times(tokens, kSpelling));
    of_token_ = workspace.take<float>(times(tokens, ld_));
    of_word_ = workspace.take<float>(times(tokens, ld_));
    hidden_ = workspace.take<float>(times(n, tokens + 2, h));
    weights_ = workspace.take<float>(times(seen, tokens));
    rows_ = workspace.take<const void*>(times(threads, tokens));
    scratch_size_ = std::max(
        {times(2, kTokens, ld_) + times(kTokens, padded(of_.heads)), of_.e + kSpelling + 2 * padded(of_.width)});
    scratch_ = workspace.take<float>(times(threads, scratch_size_));
  }

  void run(const unike_vocabulary& vocabulary, const int64_t* ids, const void* embeddings, unike_dtype dtype,
           int64_t stride, const uint8_t* within, float* key) {
    find_words(vocabulary, ids, within);
    const int64_t groups = groups_of(count_), of_words = groups_of(words_count_), n = of_.blocks, h = of_.hidden;
    const int threads = useful_threads(static_cast<double>(count_) * static_cast<double>(n * h * of_.e), threads_);
    parallel_for(of_words + groups, threads, [&](int64_t task, int) {
      if (task < of_words) return read_words(vocabulary, ids, task);
      read_tokens(task - of_words, embeddings, dtype, stride);
    });
    std::fill_n(hidden_, n * (tokens_ + 2) * h, 0.0f);
    parallel_for(groups, threads, [&](int64_t group, int) { add_words(group); });
    parallel_for(groups, threads, [&](int64_t group, int thread) { weigh(group, thread); });
    parallel_for(n * of_.heads, threads, [&](int64_t query, int thread) { see(query, key, thread); });
    const int64_t width = of_.heads * of_.width;
    for (int64_t b = 0; b < n; ++b) {
      float* part = key + b * width;
      const float norm = std::max(std::sqrt(kernels_.dot(part, part, width)), 1e-12f);
      for (int64_t i = 0; i < width; ++i) part[i] /= norm;
    }
  }

 private:
  // Pointers to the rows of a matrix.
  const void** take_rows(Workspace& workspace, const float* matrix, int64_t n, int64_t width) {
    const void** rows = workspace.take<const void*>(n);
    for (int64_t i = 0; rows != nullptr && i < n; ++i) rows[i] = matrix + i * width;
    return rows;
  }

  float* hidden(int64_t block, int64_t token) const {
    return hidden_ + (block * (tokens_ + 2) + 1 + token) * of_.hidden;
  }
  float* scratch(int thread) const { return scratch_ + thread * scratch_size_; }

  const int64_t* marks_of(const unike_vocabulary& vocabulary, int64_t id) const {
    const int64_t* marks = vocabulary.marks + 3 * known(vocabulary, id);
    if (marks[0] < 0 || marks[0] > UNIKE_TOKEN_CHARACTERS) {
      refuse("vocabulary.marks", "at most UNIKE_TOKEN_CHARACTERS characters of a token", marks[0]);
    }
    return marks;
  }
  static int64_t known(const unike_vocabulary& vocabulary, int64_t id) {
    return id < 0 || id >= vocabulary.tokens ? vocabulary.tokens - 1 : id;
  }

  // The prompt's tokens, and the words that these are cut from: word w has the tokens words_[w], ..., words_[w + 1] - 1 of
  // there_, which lie side by side.
  void find_words(const unike_vocabulary& vocabulary, const int64_t* ids, const uint8_t* within) {
    count_ = words_count_ = 0;
    bool open = false;
    for (int64_t t = 0; t < tokens_; ++t) {
      if (within[t] == 0) {
        open = false;
        continue;
      }
      const int64_t* marks = marks_of(vocabulary, ids[t]);
      if (!open || marks[1] == 0) words_[words_count_++] = count_;
      open = marks[2] != 0;
      word_of_[count_] = words_count_ - 1;
      there_[count_++] = t;
    }
    words_[words_count_] = count_;
  }

  // Spells a group of words, and projects them.
  void read_words(const unike_vocabulary& vocabulary, const int64_t* ids, int64_t group) {
    const int64_t first = group * kTokens, count = std::min(kTokens, words_count_ - first);
    const float* spelled[kTokens];
    for (int64_t i = 0; i < count; ++i) {
      float* word = spelled_ + (first + i) * kSpelling;
      spell(vocabulary, ids, first + i, word);
      spelled[i] = word;
    }
    kernels_.dots[UNIKE_F32](spelled, count, word_rows_, of_.blocks * of_.hidden, kSpelling, true,
                             of_word_ + first * ld_, ld_);
  }

  void spell(const unike_vocabulary& vocabulary, const int64_t* ids, int64_t word, float* out) const {
    Spelling spelling;
    bool begun = false;
    for (int64_t i = words_[word]; i < words_[word + 1]; ++i) {
      const int64_t id = known(vocabulary, ids[there_[i]]), length = vocabulary.marks[3 * id];
      if (length > 0 && !begun) spelling.add(kWordBegins);
      begun |= length > 0;
      for (int64_t c = 1; c <= length; ++c) {
        spelling.add(static_cast<uint64_t>(vocabulary.characters[id * kRow + c]));
      }
    }
    if (begun) spelling.add(kWordEnds);
    spelling.write(out);
  }

  // Brings a group of embeddings to mean 0, spread 1 and norm sqrt(e), and projects them.
  void read_tokens(int64_t group, const void* embeddings, unike_dtype dtype, int64_t stride) {
    const int64_t first = group * kTokens, count = std::min(kTokens, count_ - first), e = of_.e;
    const float* x[kTokens];
    for (int64_t i = 0; i < count; ++i) {
      float* state = states_ + (first + i) * e;
      x[i] = state;
      const int64_t at = there_[first + i] * stride * size_of(dtype);
      kernels_.load_row[dtype](static_cast<const char*>(embeddings) + at, e, state);
      for (int64_t j = 0; j < e; ++j) state[j] = (state[j] - of_.mean[j]) * of_.inverse_spread[j];
      const float size = kernels_.dot(state, state, e) / static_cast<float>(e);
      const float scale = 1.0f / std::sqrt(size + 1.17549435e-38f);  // 0 stays 0
      for (int64_t j = 0; j < e; ++j) state[j] *= scale;
    }
    kernels_.dots[UNIKE_F32](x, count, token_rows_, of_.blocks * of_.hidden, e, true, of_token_ + first * ld_, ld_);
  }

  void add_words(int64_t group) {
    const int64_t h = of_.hidden;
    for (int64_t i = group * kTokens; i < std::min(count_, (group + 1) * kTokens); ++i) {
      const float *token = of_token_ + i * ld_, *word = of_word_ + word_of_[i] * ld_;
      for (int64_t b = 0; b < of_.blocks; ++b) {
        float* out = hidden(b, there_[i]);
        for (int64_t j = 0; j < h; ++j) out[j] = token[b * h + j] + of_.bias[b * h + j] + word[b * h + j];
      }
    }
  }

  // The logits of all queries for a group of tokens.
  void weigh(int64_t group, int thread) {
    const int64_t first = group * kTokens, count = std::min(kTokens, count_ - first), h = of_.hidden;
    const int64_t heads = of_.heads, ld = padded(h), query_ld = padded(heads);
    float *around = scratch(thread), *token = around + kTokens * ld, *logits = token + kTokens * ld;
    for (int64_t b = 0; b < of_.blocks; ++b) {
      const float* x[kTokens];
      for (int64_t i = 0; i < count; ++i) x[i] = hidden(b, there_[first + i] - 1);  // three rows, one behind the other
      kernels_.dots[UNIKE_F32](x, count, conv_rows_ + b * h, h, 3 * h, true, around, ld);
      for (int64_t i = 0; i < count; ++i) {
        float* row = around + i * ld;
        for (int64_t j = 0; j < h; ++j) row[j] += of_.conv_bias[b * h + j];
        kernels_.gelu(row, h);
        for (int64_t j = 0; j < h; ++j) token[i * ld + j] = x[i][h + j] + row[j];
        kernels_.gelu(token + i * ld, h);
        x[i] = token + i * ld;
      }
      kernels_.dots[UNIKE_F32](x, count, query_rows_ + b * heads, heads, h, true, logits, query_ld);
      for (int64_t i = 0; i < count; ++i) {
        for (int64_t k = 0; k < heads; ++k) {
          weights_[(b * heads + k) * tokens_ + first + i] = logits[i * query_ld + k];
        }
      }
    }
  }

  // What a query sees: the averages of all tokens by its weights, and their values.
  void see(int64_t query, float* key, int thread) {
    const int64_t c = of_.width;
    float *weights = weights_ + query * tokens_, *out = key + query * c;
    if (count_ == 0) {
      std::fill_n(out, c, 0.0f);
      return;
    }
    const float most = *std::max_element(weights, weights + count_);
    float total = 0.0f;
    for (int64_t i = 0; i < count_; ++i) total += weights[i] = std::exp(weights[i] - most);
    for (int64_t i = 0; i < count_; ++i) weights[i] /= total;

    const void** rows = rows_ + thread * tokens_;
    float *state = scratch(thread), *spelled = state + of_.e, *values = spelled + kSpelling;
    std::fill_n(state, of_.e + kSpelling, 0.0f);
    for (int64_t i = 0; i < count_; ++i) rows[i] = states_ + i * of_.e;
    kernels_.add_gathered[UNIKE_F32](weights, rows, count_, of_.e, state);
    for (int64_t i = 0; i < count_; ++i) rows[i] = spelled_ + word_of_[i] * kSpelling;
    kernels_.add_gathered[UNIKE_F32](weights, rows, count_, kSpelling, spelled);
    kernels_.dots[UNIKE_F32](&state, 1, token_values_ + query * c, c, of_.e, true, values, padded(c));
    float* of_words = values + padded(c);
    kernels_.dots[UNIKE_F32](&spelled, 1, word_values_ + query * c, c, kSpelling, true, of_words, padded(c));
    for (int64_t i = 0; i < c; ++i) out[i] = values[i] + of_words[i];
  }

  const unike_prompt_encoder& of_;
  int64_t tokens_, ld_;
  const RowKernels& kernels_;
  int threads_;
  int64_t count_ = 0, words_count_ = 0;  // of the prompt

  const void **token_rows_, **word_rows_, **conv_rows_, **query_rows_, **token_values_, **word_values_;
  int64_t *there_, *words_, *word_of_;  // positions of the tokens; [words + 1]; the word of each token
  float *states_, *spelled_;            // [tokens, e], [words, 256]
  float *of_token_, *of_word_;          // [tokens, n h], [words, n h]
  float* hidden_;                       // [n, 1 + tokens + 1, h], zeros where there is no token
  float* weights_;                      // [n H, tokens]
  const void** rows_;                   // [threads, tokens]
  float* scratch_;
  int64_t scratch_size_;
};

void check(const unike_prompt_encoder& of, int64_t tokens) {
  check_size("tokens", tokens, 0);
  check_size("encoder.e", of.e, 1);
  check_size("encoder.blocks", of.blocks, 1);
  check_size("encoder.hidden", of.hidden, 1);
  check_size("encoder.heads", of.heads, 1);
  check_size("encoder.width", of.width, 1);
  const int64_t n = times(of.blocks, of.hidden), seen = times(of.blocks, of.heads), values = times(seen, of.width);
  check_array("encoder.mean", of.mean, of.e);
  check_array("encoder.inverse_spread", of.inverse_spread, of.e);
  check_array("encoder.token", of.token, times(n, of.e));
  check_array("encoder.word", of.word, times(n, kSpelling));
  check_array("encoder.bias", of.bias, n);
  check_array("encoder.conv", of.conv, times(n, 3, of.hidden));
  check_array("encoder.conv_bias", of.conv_bias, n);
  check_array("encoder.query", of.query, times(seen, of.hidden));
  check_array("encoder.token_value", of.token_value, times(values, of.e));
  check_array("encoder.word_value", of.word_value, times(values, kSpelling));
}

}  // namespace
}  // namespace unike

extern "C" int64_t unike_prompt_keys_workspace(const unike_prompt_encoder* encoder, int64_t tokens, int threads) {
  using namespace unike;
  return guarded_bytes([&] {
    require(encoder != nullptr, "encoder must not be null");
    check(*encoder, tokens);
    Workspace workspace;
    PromptKeys(*encoder, tokens, row_kernels(), threads_of_call(threads), workspace);
    return workspace.bytes();
  });
}

extern "C" unike_status unike_prompt_keys(const unike_prompt_encoder* encoder, const unike_vocabulary* vocabulary,
                                          int64_t m, int64_t tokens, const int64_t* ids, unike_rows embeddings,
                                          const uint8_t* within, float* keys, void* workspace, int64_t workspace_bytes,
                                          int threads) {
  using namespace unike;
  return guarded([&] {
    require(encoder != nullptr && vocabulary != nullptr, "encoder and vocabulary must not be null");
    check_size("m", m, 0);
    check(*encoder, tokens);
    check_size("vocabulary.tokens", vocabulary->tokens, 1);
    check_array("vocabulary.characters", vocabulary->characters, times(vocabulary->tokens, kRow));
    check_array("vocabulary.marks", vocabulary->marks, times(vocabulary->tokens, 3));
    const int64_t all = times(m, tokens), width = times(encoder->blocks, encoder->heads, encoder->width);
    check_array("ids", ids, all);
    check_array("within", within, all);
    check_rows("embeddings", embeddings, all, encoder->e);
    check_array("keys", keys, times(m, width));
    if (m == 0) return;
    Workspace pieces(workspace, workspace_bytes);
    PromptKeys work(*encoder, tokens, row_kernels(), threads_of_call(threads), pieces);
    const int64_t bytes = embeddings.stride * size_of(embeddings.dtype);
    for (int64_t i = 0; i < m; ++i) {
      const void* first = static_cast<const char*>(embeddings.data) + i * tokens * bytes;
      work.run(*vocabulary, ids + i * tokens, first, embeddings.dtype, embeddings.stride, within + i * tokens,
               keys + i * width);
    }
  });
}
