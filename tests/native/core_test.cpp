// Every function of the core on small random problems, against loops in double: run under the sanitizers, for each
// instruction set of this machine and 1 to 3 threads. All arrays have exactly the size that they need.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#include "unike/cosine_topk.h"
#include "unike/extra_neurons.h"
#include "unike/latent_attention.h"
#include "unike/prompt_key.h"

namespace {

using Floats = std::vector<float>;
using Ids = std::vector<int64_t>;

constexpr uint64_t kBits = 0x41e8152aa7c3fa52;  // of the results of bits()

std::mt19937 random_bits(1);

Floats numbers(int64_t n, float scale = 1.0f) {
  std::normal_distribution<float> normal;
  Floats x(n);
  for (float& value : x) value = scale * normal(random_bits);
  return x;
}

int64_t pick(int64_t from, int64_t to) { return std::uniform_int_distribution<int64_t>(from, to)(random_bits); }

void expect(bool condition, const char* what) {
  if (condition) return;
  std::printf("FAILED: %s (%s)\n", what, unike_last_error());
  std::exit(1);
}

void ok(unike_status status, const char* what) { expect(status == UNIKE_OK, what); }

void near(double got, double wanted, double tolerance, const char* what) {
  if (!(std::abs(got - wanted) <= tolerance)) {
    std::printf("%s: %.9g instead of %.9g\n", what, got, wanted);
    expect(false, what);
  }
}

// float32 numbers and the same rounded to bfloat16, as they lie in memory.
struct Table {
  unike_dtype dtype;
  Floats wide;
  std::vector<uint16_t> narrow;

  Table(Floats x, unike_dtype of) : dtype(of), wide(std::move(x)) {
    if (dtype == UNIKE_F32) return;
    for (float& value : wide) {
      uint32_t bits;
      __builtin_memcpy(&bits, &value, 4);
      bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
      narrow.push_back(static_cast<uint16_t>(bits));
      bits <<= 16;
      __builtin_memcpy(&value, &bits, 4);
    }
  }
  const void* data() const { return dtype == UNIKE_F32 ? static_cast<const void*>(wide.data()) : narrow.data(); }
  unike_rows rows(int64_t stride) const { return {data(), dtype, stride}; }
};

struct Outputs {
  unike_dtype dtype;
  Floats wide;
  std::vector<uint16_t> narrow;
  Outputs(int64_t n, unike_dtype of) : dtype(of), wide(of == UNIKE_F32 ? n : 0), narrow(of == UNIKE_F32 ? 0 : n) {}
  unike_rows_out rows(int64_t stride) {
    return {dtype == UNIKE_F32 ? static_cast<void*>(wide.data()) : narrow.data(), dtype, stride};
  }
  double at(int64_t i) const {
    if (dtype == UNIKE_F32) return wide[i];
    const uint32_t bits = static_cast<uint32_t>(narrow[i]) << 16;
    float value;
    __builtin_memcpy(&value, &bits, 4);
    return value;
  }
};

void topk(unike_scan scan, int threads) {
  const int64_t n = pick(0, 300), d = pick(1, 90), m = pick(0, 150), k = pick(1, 40);
  Floats rows(n * d), direction(d, 0.0f);
  ok(unike_normalize_rows(Table(numbers(n * d), UNIKE_F32).rows(d), n, d, rows.data(), threads), "normalize");
  if (n > 2) std::copy_n(rows.data(), d, rows.data() + (n - 1) * d);  // a tie
  Floats mean = numbers(d);
  ok(unike_normalize_rows({mean.data(), UNIKE_F32, d}, 1, d, direction.data(), 1), "direction");
  std::vector<char> codes(n * unike_code_bytes(scan, d));
  Floats bounds(n * UNIKE_KEY_BOUNDS);
  unike_keys keys{n, d, rows.data(), d, scan, codes.data(), bounds.data(), direction.data(), {}};
  if (scan != UNIKE_SCAN_F32) {
    std::vector<char> room(unike_pack_keys_workspace(d, threads));
    ok(unike_pack_keys(rows.data(), n, d, d, scan, direction.data(), codes.data(), bounds.data(), room.data(),
                       static_cast<int64_t>(room.size()), threads),
       "pack");
  }
  const Table queries(numbers(m * d), pick(0, 1) ? UNIKE_F32 : UNIKE_BF16);
  Ids ranges(2 * m), ids(m * k);
  for (int64_t q = 0; q < m; ++q) {
    ranges[2 * q] = pick(0, n);
    ranges[2 * q + 1] = pick(ranges[2 * q], n);
  }
  Floats scores(m * k);
  std::vector<char> room(unike_cosine_topk_workspace(&keys, m, k, threads));
  const bool ranged = pick(0, 1);
  ok(unike_cosine_topk(&keys, queries.rows(d), m, k, ranged ? ranges.data() : nullptr, scores.data(), ids.data(),
                       room.data(), static_cast<int64_t>(room.size()), threads),
     "search");
  for (int64_t q = 0; q < m; ++q) {
    const float* query = queries.wide.data() + q * d;
    double norm = 0;
    for (int64_t i = 0; i < d; ++i) norm += static_cast<double>(query[i]) * query[i];
    const int64_t start = ranged ? ranges[2 * q] : 0, stop = ranged ? ranges[2 * q + 1] : n;
    std::vector<std::pair<double, int64_t>> wanted;
    for (int64_t id = start; id < stop; ++id) {
      double dot = 0;
      for (int64_t i = 0; i < d; ++i) dot += static_cast<double>(query[i]) * rows[id * d + i];
      wanted.push_back({-dot / std::sqrt(norm), id});
    }
    std::sort(wanted.begin(), wanted.end());
    for (int64_t i = 0; i < k; ++i) {
      const bool there = i < stop - start;
      if (there) near(scores[q * k + i], -wanted[i].first, 1e-6, "score");
      expect(there ? start <= ids[q * k + i] && ids[q * k + i] < stop : ids[q * k + i] == -1, "id");
    }
  }
}

double gelu(double x) { return 0.5 * x * (1 + std::erf(x / std::sqrt(2.0))); }

void attention(int threads) {
  const int64_t n = pick(1, 60), d = pick(1, 80), heads = pick(1, 2), width = heads == 1 ? d : pick(1, 9);
  const int64_t k = pick(1, 12), m = pick(0, 140), r = pick(1, 70);
  const bool shared = heads == 1 && pick(0, 1), fold = pick(0, 1), given = pick(0, 3) == 0;
  const auto dtype = [] { return pick(0, 1) ? UNIKE_F32 : UNIKE_BF16; };
  const unike_dtype of_memory = dtype();
  const Table keys(numbers(n * heads * width), of_memory), values(numbers(n * heads * d), of_memory);
  const Table& read = shared ? keys : values;
  const unike_dtype of_weights = dtype();
  const Table w1(numbers(r * d, 0.2f), of_weights), w2(numbers(d * r, 0.2f), of_weights);
  const Floats b1 = numbers(r), b2 = numbers(d);
  Floats projected(n * heads * r, 0.0f);
  for (int64_t row = 0; row < n * heads; ++row) {
    for (int64_t j = 0; j < r; ++j) {
      double sum = 0;
      for (int64_t i = 0; i < d; ++i) sum += static_cast<double>(w1.wide[j * d + i]) * read.wide[row * d + i];
      projected[row * r + j] = static_cast<float>(sum);
    }
  }
  const Table queries(numbers(m * heads * width), dtype()), inputs(numbers(m * d), dtype());
  Ids ids(m * k);
  for (int64_t& id : ids) id = pick(-1, n - 1);
  if (m > 0) std::fill_n(ids.begin(), k, -1);
  const Floats alphas = {0.3f};
  const unike_latent_inputs in{m, d, queries.rows(heads * width), inputs.rows(d), ids.data(), m, k};
  const unike_memory memory{n, heads, width, of_memory, keys.data(), read.data(), fold ? projected.data() : nullptr};
  const unike_semantic_encoder encoder{r, of_weights, fold ? nullptr : w1.data(), b1.data(), w2.data(), b2.data()};
  const bool eq7 = pick(0, 1), match = pick(0, 1);
  const unike_blend blend{0.4f, eq7, match, given ? alphas.data() : nullptr, 1, nullptr, 0};
  Outputs out(m * d, inputs.dtype);
  Floats alpha(m);
  std::vector<char> room(unike_latent_attention_workspace(&in, &memory, &encoder, threads));
  ok(unike_latent_attention(&in, &memory, &encoder, &blend, out.rows(d), alpha.data(), room.data(),
                            static_cast<int64_t>(room.size()), threads),
     "latent attention");
  for (int64_t t = 0; t < m; ++t) {
    const float* h = inputs.wide.data() + t * d;
    std::vector<double> know(d, 0.0), hidden(r), sem(d);
    bool found = false;
    for (int64_t head = 0; head < heads; ++head) {
      double total = 0;
      std::vector<double> weights(k, 0.0), sum(d, 0.0);
      for (int64_t i = 0; i < k; ++i) {
        const int64_t id = ids[t * k + i];
        if (id < 0) continue;
        found = true;
        double logit = 0;
        for (int64_t c = 0; c < width; ++c) {
          logit += 0.4 * queries.wide[(t * heads + head) * width + c] * keys.wide[(id * heads + head) * width + c];
        }
        total += weights[i] = std::exp(logit);
        for (int64_t j = 0; j < d; ++j) sum[j] += weights[i] * read.wide[(id * heads + head) * d + j];
      }
      for (int64_t j = 0; j < d; ++j) know[j] += total > 0 ? sum[j] / total : 0.0;
    }
    if (!found) {
      expect(alpha[t] == 0.0f && out.at(t * d) == h[0] && out.at(t * d + d - 1) == h[d - 1], "an untouched token");
      continue;
    }
    double against = 0, sem_squares = 0, h_squares = 0, know_squares = 0;
    for (int64_t j = 0; j < r; ++j) {
      hidden[j] = b1[j];
      for (int64_t i = 0; i < d; ++i) hidden[j] += w1.wide[j * d + i] * know[i];
      hidden[j] = gelu(hidden[j]);
    }
    for (int64_t i = 0; i < d; ++i) {
      sem[i] = b2[i];
      for (int64_t j = 0; j < r; ++j) sem[i] += w2.wide[i * r + j] * hidden[j];
      against += sem[i] * h[i];
      sem_squares += sem[i] * sem[i];
      h_squares += static_cast<double>(h[i]) * h[i];
      know_squares += know[i] * know[i];
    }
    const double computed = std::clamp(against / std::sqrt(sem_squares * h_squares), 0.0, 1.0);
    const double wanted = given ? 0.3 : computed, share = eq7 ? 1 - wanted : wanted;
    near(alpha[t], wanted, 2e-4, "alpha");
    const double stretch = match ? std::sqrt(h_squares / know_squares) : 1.0, size = 1 + std::sqrt(h_squares);
    for (int64_t i = 0; i < d; ++i) {
      const double exact = (1 - share) * h[i] + share * stretch * know[i];
      near(out.at(t * d + i), exact, (inputs.dtype == UNIKE_F32 ? 1e-3 : 1e-2) * size, "shifted");
    }
  }
  // The backward pass is compared with autograd in Python; here only its memory and threads are of interest.
  Floats grad_alpha = numbers(m), to_queries(m * heads * width), to_inputs(m * d), to_alpha(m);
  std::vector<char> back(unike_latent_attention_backward_workspace(&in, &memory, &encoder, threads));
  ok(unike_latent_attention_backward(&in, &memory, &encoder, &blend, inputs.rows(d), grad_alpha.data(),
                                     to_queries.data(), to_inputs.data(), given ? to_alpha.data() : nullptr, nullptr,
                                     back.data(), static_cast<int64_t>(back.size()), threads),
     "latent attention backward");
}

void neurons(int threads) {
  const int64_t d = pick(1, 90), edits = pick(1, 5), rows = pick(1, 6), m = rows * pick(0, 30);
  const bool gated = pick(0, 1);
  Ids indptr = {0}, row_indptr = {0}, row_edits;
  for (int64_t e = 0; e < edits; ++e) indptr.push_back(indptr.back() + pick(0, 7));
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t e = edits - 1; e >= 0; --e) {  // in another order than the pool's
      if (pick(0, 1)) row_edits.push_back(e);
    }
    row_indptr.push_back(static_cast<int64_t>(row_edits.size()));
  }
  const int64_t p = indptr.back();
  const unike_dtype of_pool = pick(0, 1) ? UNIKE_F32 : UNIKE_BF16, of_states = pick(0, 1) ? UNIKE_F32 : UNIKE_BF16;
  const Table keys(numbers(p * d, 0.2f), of_pool), up(numbers(p * d, 0.2f), of_pool), values(numbers(p * d), of_pool);
  const Table zeta(numbers(edits * d), of_pool), x(numbers(m * d), of_states), base(numbers(m * d), of_states);
  const Floats bias = numbers(p), up_bias = numbers(p), beta = numbers(edits);
  const unike_edit_pool pool{p,
                             edits,
                             rows,
                             of_pool,
                             keys.data(),
                             bias.data(),
                             gated ? up.data() : nullptr,
                             gated ? up_bias.data() : nullptr,
                             values.data(),
                             zeta.data(),
                             beta.data(),
                             indptr.data(),
                             row_indptr.data(),
                             row_edits.data(),
                             nullptr};
  Outputs out(m * d, of_states);
  std::vector<char> room(unike_add_extra_neurons_workspace(m, d, &pool, threads));
  ok(unike_add_extra_neurons(x.rows(d), base.rows(d), m, d, &pool, UNIKE_SILU, out.rows(d), room.data(),
                             static_cast<int64_t>(room.size()), threads),
     "extra neurons");
  for (int64_t t = 0; t < m; ++t) {
    const int64_t row = t / (m / rows);
    std::vector<double> wanted(base.wide.begin() + t * d, base.wide.begin() + (t + 1) * d);
    for (int64_t s = row_indptr[row]; s < row_indptr[row + 1]; ++s) {
      const int64_t e = row_edits[s];
      for (int64_t j = indptr[e]; j < indptr[e + 1]; ++j) {
        double gate = bias[j], factor = up_bias[j];
        for (int64_t i = 0; i < d; ++i) {
          gate += keys.wide[j * d + i] * x.wide[t * d + i];
          factor += up.wide[j * d + i] * x.wide[t * d + i];
        }
        const double o = gate / (1 + std::exp(-gate)) * (gated ? factor : 1.0);
        for (int64_t i = 0; i < d; ++i) wanted[i] += o * (values.wide[j * d + i] + beta[e] * zeta.wide[e * d + i]);
      }
    }
    for (int64_t i = 0; i < d; ++i) {
      const double tolerance = of_states == UNIKE_F32 ? 1e-3 : 1e-2 * (1 + std::abs(wanted[i]));
      near(out.at(t * d + i), wanted[i], tolerance, "edited");
    }
  }
  Floats gx(m * d), gk(p * d), gb(p), gu(p * d), gc(p), gv(p * d), gz(edits * d), gbeta(edits);
  const unike_extra_gradients gradients{
      gx.data(), gk.data(), gb.data(),   gated ? gu.data() : nullptr, gated ? gc.data() : nullptr,
      gv.data(), gz.data(), gbeta.data()};
  std::vector<char> back(unike_add_extra_neurons_backward_workspace(m, d, &pool, threads));
  ok(unike_add_extra_neurons_backward(base.rows(d), x.rows(d), m, d, &pool, UNIKE_SILU, &gradients, back.data(),
                                      static_cast<int64_t>(back.size()), threads),
     "extra neurons backward");
}

// A prompt's key is its own, whatever is beside it and however many threads; parts are of norm 1.
void prompt_keys(int threads) {
  const int64_t m = 5, tokens = pick(9, 70), e = pick(1, 90), blocks = 2, hidden = pick(1, 70), heads = pick(1, 5);
  const int64_t width = pick(1, 40), n = blocks * hidden, seen = blocks * heads, values = seen * width, v = 7;
  const int64_t part = heads * width, row = UNIKE_TOKEN_CHARACTERS + 2;
  const Floats mean = numbers(e), spread = numbers(e), token = numbers(n * e, 0.1f), word = numbers(n * 256, 0.1f);
  const Floats bias = numbers(n), conv = numbers(n * 3 * hidden, 0.2f), conv_bias = numbers(n);
  const Floats query = numbers(seen * hidden, 0.5f);
  const Floats token_value = numbers(values * e, 0.1f), word_value = numbers(values * 256, 0.1f);
  const unike_prompt_encoder encoder{e,           blocks,           hidden,            heads,
                                     width,       mean.data(),      spread.data(),     token.data(),
                                     word.data(), bias.data(),      conv.data(),       conv_bias.data(),
                                     query.data(), token_value.data(), word_value.data()};
  Ids characters(v * row), marks(v * 3, 0), ids(m * tokens);
  for (int64_t& c : characters) c = pick(97, 122);
  for (int64_t i = 0; i + 1 < v; ++i) {
    marks[3 * i] = pick(0, UNIKE_TOKEN_CHARACTERS);
    marks[3 * i + 1] = marks[3 * i] > 0 && i % 3 != 0;
    marks[3 * i + 2] = marks[3 * i] > 0 && i % 2 == 0;
  }
  const unike_vocabulary vocabulary{v, characters.data(), marks.data()};
  for (int64_t& id : ids) id = pick(-1, v + 1);
  std::vector<uint8_t> within(m * tokens, 1);
  for (uint8_t& there : within) there = pick(0, 3) > 0;
  for (int64_t i = 1; i < m; ++i) within[i * tokens] = 1;
  std::fill_n(within.data(), tokens, uint8_t{0});  // a prompt without tokens
  const Table embeddings(numbers(m * tokens * e), UNIKE_BF16);
  Floats keys(m * blocks * part), alone(blocks * part);
  const auto run = [&](int64_t first, int64_t count, int with, Floats& to) {
    std::vector<char> room(unike_prompt_keys_workspace(&encoder, tokens, with));
    unike_rows rows = embeddings.rows(e);
    rows.data = static_cast<const char*>(rows.data) + first * tokens * e * 2;
    ok(unike_prompt_keys(&encoder, &vocabulary, count, tokens, ids.data() + first * tokens, rows,
                         within.data() + first * tokens, to.data(), room.data(), static_cast<int64_t>(room.size()), with),
       "prompt keys");
  };
  run(0, m, threads, keys);
  for (int64_t i = 0; i < m; ++i) {
    run(i, 1, 1, alone);
    expect(std::equal(alone.begin(), alone.end(), keys.begin() + i * blocks * part), "a prompt's key alone");
    for (int64_t b = 0; b < blocks; ++b) {
      double squares = 0;
      for (int64_t j = 0; j < part; ++j) squares += alone[b * part + j] * alone[b * part + j];
      near(squares, i == 0 ? 0.0 : 1.0, 1e-4, "the norm of a part");
    }
  }
}

// Large enough for several threads, several blocks and several prunings.
void large_topk(int threads) {
  const int64_t n = 5000, d = 100, m = 300, k = 40;
  Floats rows(n * d), direction(d, 0.0f), scores(m * k), alone(m * k);
  ok(unike_normalize_rows(Table(numbers(n * d), UNIKE_F32).rows(d), n, d, rows.data(), threads), "normalize");
  std::vector<char> codes(n * unike_code_bytes(UNIKE_SCAN_I8, d)), room(unike_pack_keys_workspace(d, threads));
  Floats bounds(n * UNIKE_KEY_BOUNDS), queries = numbers(m * d);
  ok(unike_pack_keys(rows.data(), n, d, d, UNIKE_SCAN_I8, direction.data(), codes.data(), bounds.data(), room.data(),
                     static_cast<int64_t>(room.size()), threads),
     "pack");
  Ids ids(m * k), ids_alone(m * k);
  const unike_keys packed{n, d, rows.data(), d, UNIKE_SCAN_I8, codes.data(), bounds.data(), direction.data(), {}};
  const unike_keys plain{n, d, rows.data(), d, UNIKE_SCAN_F32, nullptr, nullptr, nullptr, {}};
  for (const int64_t count : {m, int64_t{3}}) {
    for (const auto& [keys, with, to_scores, to_ids] : {std::tuple(&packed, threads, scores.data(), ids.data()),
                                                        std::tuple(&plain, 1, alone.data(), ids_alone.data())}) {
      room.resize(unike_cosine_topk_workspace(keys, count, k, with));
      ok(unike_cosine_topk(keys, {queries.data(), UNIKE_F32, d}, count, k, nullptr, to_scores, to_ids, room.data(),
                           static_cast<int64_t>(room.size()), with),
         "search");
    }
    expect(ids == ids_alone && scores == alone, "both scans give the same");
  }
  // Calls side by side, each with threads of its own.
  std::vector<std::thread> callers;
  std::vector<Ids> results(3, Ids(m * k));
  for (Ids& result : results) {
    callers.emplace_back([&] {
      Floats own(m * k);
      std::vector<char> memory(unike_cosine_topk_workspace(&packed, m, k, 2));
      ok(unike_cosine_topk(&packed, {queries.data(), UNIKE_F32, d}, m, k, nullptr, own.data(), result.data(),
                           memory.data(), static_cast<int64_t>(memory.size()), 2),
         "a search beside others");
    });
  }
  for (std::thread& caller : callers) caller.join();
  for (const Ids& result : results) {
    expect(result == ids, "the same ids side by side");
  }
}

// Keys near a space of few dimensions, whose directions few queries read first.
void leading_topk(int threads) {
  const int64_t n = 3 * 64 * 9 + pick(1, 63), d = pick(66, 150), p = 64, k = pick(1, 12), most = 9;
  std::vector<double> axes((1 + p) * d);  // by Gram and Schmidt
  Floats directions((1 + p) * d);
  for (int64_t j = 0; j <= p; ++j) {
    double* axis = axes.data() + j * d;
    const Floats start = numbers(d);
    std::copy(start.begin(), start.end(), axis);
    for (int round = 0; round < 2; ++round) {
      for (int64_t l = 0; l < j; ++l) {
        double dot = 0;
        for (int64_t i = 0; i < d; ++i) dot += axis[i] * axes[l * d + i];
        for (int64_t i = 0; i < d; ++i) axis[i] -= dot * axes[l * d + i];
      }
    }
    double squares = 0;
    for (int64_t i = 0; i < d; ++i) squares += axis[i] * axis[i];
    for (int64_t i = 0; i < d; ++i) axis[i] /= std::sqrt(squares);
    for (int64_t i = 0; i < d; ++i) directions[j * d + i] = static_cast<float>(axis[i]);
  }
  const auto near_the_space = [&](int64_t rows) {
    Floats x = numbers(rows * d);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t i = 0; i < d; ++i) x[r * d + i] *= 0.05f;
      for (int64_t j = 0; j <= p; j += 5) {
        const float much = numbers(1)[0];
        for (int64_t i = 0; i < d; ++i) x[r * d + i] += much * directions[j * d + i];
      }
    }
    return x;
  };
  Floats raw = near_the_space(n), queries = near_the_space(most), rows(n * d), bounds(n * UNIKE_KEY_BOUNDS);
  ok(unike_normalize_rows({raw.data(), UNIKE_F32, d}, n, d, rows.data(), threads), "normalize");
  std::copy_n(rows.data(), d, rows.data() + 70 * d);  // a tie
  std::fill_n(rows.data() + 71 * d, d, 0.0f);
  queries[(most - 1) * d] = std::nanf("");
  std::vector<char> codes(n * unike_code_bytes(UNIKE_SCAN_I8, d)), room(unike_pack_keys_workspace(d, threads));
  ok(unike_pack_keys(rows.data(), n, d, d, UNIKE_SCAN_I8, directions.data(), codes.data(), bounds.data(), room.data(),
                     static_cast<int64_t>(room.size()), threads),
     "pack");
  const int64_t tiles = (n + 63) / 64, first = pick(0, n);
  std::vector<char> leading_codes(unike_leading_bytes(n, p));
  Floats leading_bounds(tiles * 64 * UNIKE_LEADING_BOUNDS);
  for (const auto& [from, to] : {std::pair(int64_t{0}, first), std::pair(first, n)}) {
    ok(unike_pack_leading(rows.data() + from * d, from, to - from, d, d, p, directions.data(), leading_codes.data(),
                          leading_bounds.data(), threads),
       "pack leading");
  }
  unike_keys led{n, d, rows.data(), d, UNIKE_SCAN_I8, codes.data(), bounds.data(), directions.data(), {}};
  led.leading = {p, directions.data(), leading_codes.data(), leading_bounds.data()};
  const unike_keys plain{n, d, rows.data(), d, UNIKE_SCAN_F32, nullptr, nullptr, nullptr, {}};
  Ids ranges(2 * most);
  for (int64_t q = 0; q < most; ++q) {
    ranges[2 * q] = pick(0, n);
    ranges[2 * q + 1] = pick(ranges[2 * q], n);
  }
  for (int64_t m = 1; m <= most; ++m) {
    for (const int64_t* seen : {static_cast<const int64_t*>(nullptr), static_cast<const int64_t*>(ranges.data())}) {
      Floats scores[2] = {Floats(m * k), Floats(m * k)};
      Ids ids[2] = {Ids(m * k), Ids(m * k)};
      for (int i = 0; i < 2; ++i) {
        const unike_keys& keys = i == 0 ? led : plain;
        room.resize(unike_cosine_topk_workspace(&keys, m, k, threads));
        ok(unike_cosine_topk(&keys, {queries.data() + (most - m) * d, UNIKE_F32, d}, m, k, seen, scores[i].data(),
                             ids[i].data(), room.data(), static_cast<int64_t>(room.size()), threads),
           "search");
      }
      expect(ids[0] == ids[1] && scores[0] == scores[1], "leading directions change nothing");
    }
  }
}

// The search's results are the same bits on every machine, from every compiler and with every scan.
void bits(unike_scan scan, int threads) {
  const int64_t n = 400, d = 70, m = 5, k = 9;
  std::mt19937 source(7);
  const auto number = [&] { return static_cast<float>(source() % 4001) / 1024.0f - 2.0f; };
  Floats raw(n * d), rows(n * d), queries(m * d), direction(d, 0.0f), bounds(n * UNIKE_KEY_BOUNDS), scores(m * k);
  for (float& x : raw) x = number();
  for (float& x : queries) x = number();
  Ids ids(m * k);
  ok(unike_normalize_rows({raw.data(), UNIKE_F32, d}, n, d, rows.data(), threads), "normalize");
  std::vector<char> codes(n * unike_code_bytes(scan, d)), room(unike_pack_keys_workspace(d, threads));
  if (scan != UNIKE_SCAN_F32) {
    ok(unike_pack_keys(rows.data(), n, d, d, scan, direction.data(), codes.data(), bounds.data(), room.data(),
                       static_cast<int64_t>(room.size()), threads),
       "pack");
  }
  const unike_keys keys{n, d, rows.data(), d, scan, codes.data(), bounds.data(), direction.data(), {}};
  room.resize(unike_cosine_topk_workspace(&keys, m, k, threads));
  ok(unike_cosine_topk(&keys, {queries.data(), UNIKE_F32, d}, m, k, nullptr, scores.data(), ids.data(), room.data(),
                       static_cast<int64_t>(room.size()), threads),
     "search");
  uint64_t hash = 14695981039346656037u;
  const auto add = [&](uint64_t value) { hash = (hash ^ value) * 1099511628211u; };
  for (int64_t i = 0; i < m * k; ++i) {
    uint32_t score;
    __builtin_memcpy(&score, &scores[i], sizeof score);
    add(score);
    add(static_cast<uint64_t>(ids[i]));
  }
  if (hash != kBits) std::printf("hash %#llx\n", static_cast<unsigned long long>(hash));
  expect(hash == kBits, "the bits of every machine");
}

}  // namespace

int main() {
  for (int i = 0; const char* isa = unike_available_isa(i); ++i) {
    ok(unike_set_isa(isa), isa);
    for (int round = 0; round < 12; ++round) {
      const int threads = 1 + round % 3;
      for (const unike_scan scan : {UNIKE_SCAN_F32, UNIKE_SCAN_F16, UNIKE_SCAN_BF16, UNIKE_SCAN_I8}) {
        topk(scan, threads);
        bits(scan, threads);
      }
      attention(threads);
      neurons(threads);
      prompt_keys(threads);
    }
    for (int threads = 1; threads <= 3; ++threads) leading_topk(threads);
    large_topk(3);
    std::printf("%s passed\n", isa);
  }
  return 0;
}
