// Calls every function of the C ABI with arguments of which some are wrong: null or crooked pointers, enums that name
// nothing, strides, sizes near 2^62, lists that repeat or leave the range, workspaces that are missing or too small, rows
// that overlap. What is wrong must be refused, what is right must work, and the sanitizers see to the rest: all arrays have
// exactly the size that they need, and a workspace that of its function, however wrong the arguments.
//
//   abi_fuzz TRIES [SEED]
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "unike/cosine_topk.h"
#include "unike/extra_neurons.h"
#include "unike/latent_attention.h"
#include "unike/machine.h"
#include "unike/memory_attention.h"
#include "unike/prompt_key.h"

namespace {

std::mt19937_64 bits;

int64_t pick(int64_t from, int64_t to) { return std::uniform_int_distribution<int64_t>(from, to)(bits); }
bool one_in(int64_t n) { return pick(1, n) == 1; }

constexpr int64_t kMost = std::numeric_limits<int64_t>::max(), kLeast = std::numeric_limits<int64_t>::min();

// No memory has so many of anything.
int64_t monstrous() {
  const int64_t all[] = {kLeast,           -1,
                         -(1LL << 40),     (1LL << 48) + 1,
                         1LL << 59,        1LL << 60,
                         1LL << 61,        (1LL << 61) + 1,
                         (1LL << 62) - 1,  1LL << 62,
                         (1LL << 62) + 64, kMost - 63,
                         kMost};
  return all[pick(0, std::size(all) - 1)];
}

struct Mutation {
  std::string name;
  std::function<void()> apply;
};

std::map<std::string, int64_t> accepted, refused;

[[noreturn]] void fault(const std::string& what) {
  std::printf("FAILED: %s (%s)\n", what.c_str(), unike_last_error());
  std::exit(1);
}

// Not at a multiple of the size of any element.
template <typename P>
P crooked(P at) {
  return reinterpret_cast<P>(reinterpret_cast<uintptr_t>(at) | 1);
}

// One call: what may be wrong with it, and memory for its arguments.
class Call {
 public:
  explicit Call(std::string function) : function_(std::move(function)) {}

  template <typename T>
  T* array(int64_t n, int64_t least = 0, int64_t most = 0) {
    T* data = reinterpret_cast<T*>(bytes(n * static_cast<int64_t>(sizeof(T))));
    for (int64_t i = 0; i < n; ++i) {
      data[i] = least < most ? static_cast<T>(pick(least, most)) : static_cast<T>(pick(-9, 9)) / T{4};
    }
    return data;
  }
  void* table(int64_t n, unike_dtype dtype) {
    if (dtype == UNIKE_F32) return array<float>(n);
    return array<uint16_t>(n, 0x3f00, 0x3fff);
  }
  // Exactly so many, so that the sanitizer sees the next one.
  char* bytes(int64_t n) {
    memory_.emplace_back(static_cast<char*>(std::malloc(n)), std::free);
    return memory_.back().get();
  }

  void wrong(const std::string& name, std::function<void()> apply) { mutations_.push_back({name, std::move(apply)}); }
  template <typename P>
  void pointer(const std::string& name, P& at, int64_t count) {
    if (count == 0) return;
    wrong(name + " null", [&at] { at = nullptr; });
    if (alignof_of(at) > 1) {
      wrong(name + " crooked", [&at] { at = crooked(at); });
    }
  }
  void size(const std::string& name, int64_t& at) {
    wrong(name + " monstrous", [&at] { at = monstrous(); });
  }
  // Each of which could be, but not both: their product is 2^66.
  void product(const std::string& name, int64_t& a, int64_t& b) {
    wrong(name + " too much together", [&a, &b] { a = b = int64_t{1} << 33; });
  }
  template <typename E>
  void enumeration(const std::string& name, E& at) {
    wrong(name + " of no name", [&at] { at = static_cast<E>(std::vector<int>{9, -1, 5, 1 << 30}[pick(0, 3)]); });
  }
  template <typename Rows>
  void rows(const std::string& name, Rows& at, int64_t count, int64_t width) {
    pointer(name + ".data", at.data, count);
    enumeration(name + ".dtype", at.dtype);
    wrong(name + ".stride monstrous", [&at] { at.stride = monstrous(); });
    if (std::is_same_v<Rows, unike_rows_out> && count > 1 && width > 1) {
      wrong(name + ".stride too small", [&at, width] { at.stride = pick(0, width - 1); });
    }
  }

  // Runs it with up to two faults. needed(): the workspace function; run(workspace, its bytes).
  void go(bool empty, const std::function<int64_t()>& needed,
          const std::function<unike_status(void*, int64_t)>& run) {
    const int64_t usual = needed();
    if (usual < 0 || (usual == 0 && !empty)) fault(function_ + ": no workspace for right arguments");
    std::string faults;
    for (int64_t count = one_in(6) ? 0 : one_in(3) ? 2 : 1; count > 0 && !mutations_.empty(); --count) {
      std::swap(mutations_[pick(0, mutations_.size() - 1)], mutations_.back());  // no fault twice: two may undo each other
      mutations_.back().apply();
      faults += (faults.empty() ? "" : " and ") + mutations_.back().name;
      mutations_.pop_back();
    }
    int64_t given = needed();
    if (given < 0) fault(function_ + ": a negative workspace with " + faults);
    if (given == 0 || given > (int64_t{1} << 28)) given = usual;
    void* workspace = bytes(given + 1) + 1;  // of any alignment
    if (faults.empty() && empty) workspace = nullptr, given = 0;
    if (faults.empty() && !empty && one_in(4)) {
      if (one_in(2)) {
        workspace = nullptr, faults = "workspace null";
      } else {
        given = one_in(2) ? std::vector<int64_t>{-1, kLeast, kMost}[pick(0, 2)] : pick(0, 63);
        faults = "workspace of a wrong size";
      }
    }
    if (std::getenv("UNIKE_FUZZ_TELL") != nullptr) {  // for whoever looks for the call that crashed
      std::printf("%s with %s\n", function_.c_str(), faults.c_str());
      std::fflush(stdout);
    }
    const unike_status status = run(workspace, given);
    const std::string name = function_ + (faults.empty() ? "" : " with " + faults);
    if (faults.empty() && status != UNIKE_OK) fault(name + ": refused");
    if (!faults.empty() && status != UNIKE_INVALID_ARGUMENT) fault(name + ": status " + std::to_string(status));
    if (!faults.empty() && std::strlen(unike_last_error()) < 10) fault(name + ": no message");
    ++(faults.empty() ? accepted : refused)[function_];
  }

 private:
  template <typename P>
  static constexpr int64_t alignof_of(P*) {
    if constexpr (std::is_void_v<P>) {
      return 2;
    } else {
      return alignof(P);
    }
  }

  std::string function_;
  std::vector<Mutation> mutations_;
  std::vector<std::unique_ptr<char, decltype(&std::free)>> memory_;
};

unike_dtype any_dtype() { return one_in(2) ? UNIKE_F32 : UNIKE_BF16; }
int64_t size_of(unike_dtype dtype) { return dtype == UNIKE_F32 ? 4 : 2; }
int any_threads() { return std::vector<int>{-5, 0, 1, 2, 3, 1 << 30}[pick(0, 5)]; }

unike_rows rows_of(Call& call, int64_t m, int64_t d) {
  const unike_dtype dtype = any_dtype();
  const int64_t stride = one_in(8) ? 0 : d + pick(0, 3);
  return {call.table(m > 0 ? (m - 1) * stride + d : 0, dtype), dtype, stride};
}

// The keys of a search, packed where the scan wants it.
struct Keys {
  unike_keys table;
  Keys(Call& call, int64_t n, int64_t d) {
    const auto scan = static_cast<unike_scan>(pick(0, 3));
    const int64_t stride = d + pick(0, 2);
    auto* rows = call.array<float>(n > 0 ? (n - 1) * stride + d : 0);
    for (int64_t i = 0; i < n; ++i) {
      std::vector<float> row(rows + i * stride, rows + i * stride + d);
      unike_normalize_rows({row.data(), UNIKE_F32, d}, 1, d, rows + i * stride, 1);
    }
    table = {n, d, rows, stride, scan, nullptr, nullptr, nullptr, {}};
    if (scan == UNIKE_SCAN_F32) return;
    const int64_t bytes = unike_code_bytes(scan, d);
    char* codes = call.bytes(n * bytes);
    auto* bounds = call.array<float>(n * UNIKE_KEY_BOUNDS);
    auto* direction = call.array<float>(d);
    std::fill_n(direction, d, 0.0f);
    std::vector<char> room(unike_pack_keys_workspace(d, 1));
    if (unike_pack_keys(rows, n, d, stride, scan, direction, codes, bounds, room.data(),
                        static_cast<int64_t>(room.size()), 1) != UNIKE_OK) {
      fault("packing");
    }
    table.codes = codes, table.bounds = bounds, table.direction = direction;
    if (scan != UNIKE_SCAN_I8 || n == 0 || one_in(2)) return;
    const int64_t p = 64 * pick(1, 2), tiles = (n + 63) / 64;
    auto* directions = call.array<float>((1 + p) * d);
    char* leading = call.bytes(unike_leading_bytes(n, p));
    auto* leading_bounds = call.array<float>(tiles * UNIKE_LEADING_BOUNDS * 64);
    if (unike_pack_leading(rows, 0, n, d, stride, p, directions, leading, leading_bounds, 1) != UNIKE_OK) {
      fault("packing what leads");
    }
    table.leading = {p, directions, leading, leading_bounds};
  }
  void faults(Call& call) {
    call.size("keys.n", table.n);
    call.size("keys.d", table.d);
    call.enumeration("keys.scan", table.scan);
    if (table.n == 0) return;
    call.size("keys.stride", table.stride);
    if (table.scan == UNIKE_SCAN_F32) {
      call.pointer("keys.rows", table.rows, table.n);
      return;
    }
    if (table.scan == UNIKE_SCAN_I8) {
      call.wrong("keys.codes null", [this] { table.codes = nullptr; });
    } else {
      call.pointer("keys.codes", table.codes, table.n);
    }
    call.pointer("keys.bounds", table.bounds, table.n);
    call.pointer("keys.direction", table.direction, table.n);
    unike_leading& leading = table.leading;
    if (leading.p == 0) return;
    call.wrong("keys.leading.codes null", [&] { leading.codes = nullptr; });
    call.wrong("keys.leading.p", [&] { leading.p = std::vector<int64_t>{-64, 1, 63, 576, INT64_MAX}[pick(0, 4)]; });
    call.wrong("leading without rows", [this] { table.rows = nullptr; });
    call.pointer("keys.leading.bounds", leading.bounds, table.n);
    call.pointer("keys.leading.directions", leading.directions, table.n);
  }
};

void normalize() {
  Call call("normalize_rows");
  int64_t rows = pick(0, 5), d = pick(1, 40);
  unike_rows x = rows_of(call, rows, d);
  auto* out = call.array<float>(rows * d);
  call.rows("x", x, rows, d);
  call.pointer("out", out, rows);
  call.size("rows", rows);
  call.size("d", d);
  call.product("rows and d", rows, d);
  if (rows > 0 && x.dtype == UNIKE_F32) {
    call.wrong("out overlapping x", [&, at = reinterpret_cast<uintptr_t>(x.data) + 4 * pick(0, d - 1)] {
      out = reinterpret_cast<float*>(at);
    });
  }
  const int threads = any_threads();
  call.go(true, [] { return 0; }, [&](void*, int64_t) { return unike_normalize_rows(x, rows, d, out, threads); });
}

void pack() {
  Call call("pack_keys");
  int64_t n = pick(0, 5), d = pick(1, 70), stride = d + pick(0, 2);
  auto scan = static_cast<unike_scan>(pick(1, 3));
  const float *rows = call.array<float>(n > 0 ? (n - 1) * stride + d : 0), *direction = call.array<float>(d);
  void* codes = call.bytes(n * unike_code_bytes(scan, d));
  auto* bounds = call.array<float>(n * UNIKE_KEY_BOUNDS);
  call.pointer("rows", rows, n);
  call.pointer("direction", direction, d);
  call.pointer("bounds", bounds, n);
  if (n > 0) call.wrong("codes null", [&] { codes = nullptr; });
  call.size("n", n);
  call.size("d", d);
  call.size("stride", stride);
  call.product("n and stride", n, stride);
  call.enumeration("scan", scan);
  const int threads = any_threads();
  call.go(
      false, [&] { return unike_pack_keys_workspace(d, threads); },
      [&](void* workspace, int64_t bytes) {
        return unike_pack_keys(rows, n, d, stride, scan, direction, codes, bounds, workspace, bytes, threads);
      });
}

void lead() {
  Call call("pack_leading");
  int64_t first = pick(0, 70), n = pick(0, 5), d = pick(1, 70), stride = d + pick(0, 2), p = 64 * pick(1, 2);
  const float *rows = call.array<float>(n > 0 ? (n - 1) * stride + d : 0), *directions = call.array<float>((1 + p) * d);
  void* codes = call.bytes(unike_leading_bytes(first + n, p));
  auto* bounds = call.array<float>((first + n + 63) / 64 * 64 * UNIKE_LEADING_BOUNDS);
  call.pointer("rows", rows, n);
  call.pointer("directions", directions, d);
  call.pointer("bounds", bounds, first + n);
  if (first + n > 0) call.wrong("codes null", [&] { codes = nullptr; });
  call.size("first", first);
  call.size("n", n);
  call.size("d", d);
  call.size("stride", stride);
  call.wrong("p", [&] { p = std::vector<int64_t>{-64, 0, 1, 63, 576, INT64_MAX}[pick(0, 5)]; });
  call.product("n and stride", n, stride);
  const int threads = any_threads();
  call.go(
      true, [] { return 0; },
      [&](void*, int64_t) {
        return unike_pack_leading(rows, first, n, d, stride, p, directions, codes, bounds, threads);
      });
}

void search() {
  Call call("cosine_topk");
  const int64_t d = pick(1, 40), n = pick(0, 70);
  int64_t m = pick(0, 5), k = pick(0, 9);
  Keys keys(call, n, d);
  unike_rows queries = rows_of(call, m, d);
  auto* ranges = one_in(2) ? call.array<int64_t>(2 * m, 0, 1) : nullptr;
  for (int64_t q = 0; ranges != nullptr && q < m; ++q) {
    ranges[2 * q] = pick(0, n);
    ranges[2 * q + 1] = pick(ranges[2 * q], n);
  }
  auto* scores = call.array<float>(m * k);
  auto* ids = call.array<int64_t>(m * k);
  keys.faults(call);
  call.rows("queries", queries, m, d);
  call.pointer("scores", scores, m * k);
  call.pointer("ids", ids, m * k);
  call.size("m", m);
  call.size("k", k);
  call.product("m and k", m, k);
  call.product("keys.n and keys.d", keys.table.n, keys.table.d);
  if (ranges != nullptr && m > 0) {
    call.wrong("ranges crooked", [&] { ranges = crooked(ranges); });
    const auto set = [ranges, i = 2 * pick(0, m - 1)](int64_t a, int64_t b) { ranges[i] = a, ranges[i + 1] = b; };
    call.wrong("a range beyond", [=] { set(0, n + 1 + pick(0, kMost / 2)); });
    call.wrong("a range before", [=] { set(-pick(1, kMost), n); });
    if (n > 0) call.wrong("a range turned round", [=] { set(n, 0); });
  }
  const int threads = any_threads();
  call.go(
      m == 0 || k == 0, [&] { return unike_cosine_topk_workspace(&keys.table, m, k, threads); },
      [&](void* workspace, int64_t bytes) {
        return unike_cosine_topk(&keys.table, queries, m, k, ranges, scores, ids, workspace, bytes, threads);
      });
}

// A table to write that shares memory with one that is read: columns or rows further on.
template <typename Rows>
void overlap(Call& call, const std::string& name, unike_rows_out& out, const Rows& in, int64_t m, int64_t d,
             bool same_dtype) {
  if (m < 2 || d < 2 || in.stride < d || !same_dtype) return;
  const int64_t by = one_in(2) ? in.stride : pick(1, d - 1);
  const uintptr_t at = reinterpret_cast<uintptr_t>(in.data) + by * size_of(in.dtype);
  call.wrong(name, [&out, over = unike_rows_out{reinterpret_cast<void*>(at), in.dtype, in.stride}] { out = over; });
}

void neurons(bool backward) {
  Call call(backward ? "add_extra_neurons_backward" : "add_extra_neurons");
  int64_t d = pick(1, 30);
  const int64_t edits = pick(0, 4), rows = pick(1, 4);
  int64_t m = rows * pick(0, 3);
  const bool gated = one_in(2), by_token = one_in(3);
  auto* indptr = call.array<int64_t>(edits + 1);
  indptr[0] = 0;
  for (int64_t e = 0; e < edits; ++e) indptr[e + 1] = indptr[e] + pick(0, 5);
  const int64_t p = indptr[edits];
  auto* row_indptr = call.array<int64_t>(rows + 1);
  std::vector<int64_t> listed;
  row_indptr[0] = 0;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t e = 0; e < edits; ++e) {
      if (one_in(2)) listed.push_back(e);
    }
    row_indptr[row + 1] = static_cast<int64_t>(listed.size());
  }
  auto* row_edits = call.array<int64_t>(listed.size());
  std::copy(listed.begin(), listed.end(), row_edits);
  const unike_dtype dtype = any_dtype();
  unike_edit_pool pool{p,
                       edits,
                       rows,
                       dtype,
                       call.table(p * d, dtype),
                       call.array<float>(p),
                       gated ? call.table(p * d, dtype) : nullptr,
                       gated ? call.array<float>(p) : nullptr,
                       call.table(p * d, dtype),
                       call.table(edits * d, dtype),
                       call.array<float>(edits),
                       indptr,
                       row_indptr,
                       row_edits,
                       by_token ? call.array<int64_t>(m, 0, rows > 1 ? rows - 1 : 1) : nullptr};
  if (by_token && rows == 1) std::fill_n(const_cast<int64_t*>(pool.token_rows), m, 0);
  auto activation = static_cast<unike_activation>(pick(0, 3));
  unike_rows x = rows_of(call, m, d), base = rows_of(call, m, d);
  unike_rows_out out{call.table(m * d, base.dtype), base.dtype, d};

  call.pointer("pool.keys", pool.keys, p);
  call.pointer("pool.key_bias", pool.key_bias, p);
  call.pointer("pool.values", pool.values, p);
  call.pointer("pool.zeta", pool.zeta, edits);
  call.pointer("pool.beta", pool.beta, edits);
  if (gated) {
    call.pointer("pool.up_bias", pool.up_bias, p);
    if (p > 0) call.wrong("pool.up crooked", [&] { pool.up = crooked(pool.up); });
  }
  call.pointer("pool.indptr", pool.indptr, 1);
  call.pointer("pool.row_indptr", pool.row_indptr, 1);
  call.pointer("pool.row_edits", pool.row_edits, static_cast<int64_t>(listed.size()));
  call.enumeration("pool.dtype", pool.dtype);
  call.enumeration("activation", activation);
  for (auto& [name, size] : std::vector<std::pair<const char*, int64_t*>>{{"m", &m},
                                                                          {"d", &d},
                                                                          {"pool.neurons", &pool.neurons},
                                                                          {"pool.edits", &pool.edits},
                                                                          {"pool.rows", &pool.rows}}) {
    call.size(name, *size);
  }
  call.product("m and d", m, d);
  call.product("pool.neurons and d", pool.neurons, d);
  call.wrong("pool.rows 0", [&] { pool.rows = 0; });
  call.wrong("row_indptr not from 0", [=] { row_indptr[0] = 1; });
  call.wrong("row_indptr descending", [=] { row_indptr[rows] = -1; });
  call.wrong("row_indptr of more than the pool",
             [=] { row_indptr[rows] = row_indptr[rows - 1] + edits + pick(1, 1 << 20); });
  call.wrong("row_indptr monstrous", [=] { row_indptr[rows] = pick(1LL << 40, kMost); });
  if (edits > 0) {
    call.wrong("indptr beyond the neurons", [=] { indptr[edits] = pick(p + 1, kMost); });
    call.wrong("indptr descending", [=] { indptr[edits] = -pick(1, kMost); });
  }
  if (!listed.empty()) {
    const int64_t i = pick(0, listed.size() - 1);
    call.wrong("row_edits beyond", [=] { row_edits[i] = pick(edits, kMost); });
    call.wrong("row_edits before", [=] { row_edits[i] = -pick(1, kMost); });
  }
  int64_t row = 0;
  while (row < rows && row_indptr[row + 1] - row_indptr[row] < 2) ++row;
  if (row < rows && m > 0) {  // without tokens there is nothing that a repeat could spoil
    call.wrong("an edit repeated", [=] { row_edits[row_indptr[row] + 1] = row_edits[row_indptr[row]]; });
  }
  if (by_token && m > 0) {
    auto* tokens = const_cast<int64_t*>(pool.token_rows);
    call.wrong("token_rows beyond", [=] { tokens[0] = pick(rows, kMost); });
    call.wrong("token_rows before", [=] { tokens[0] = -pick(1, kMost); });
  }
  call.rows("x", x, m, d);
  const int threads = any_threads();
  if (!backward) {
    call.rows("base", base, m, d);
    call.rows("out", out, m, d);
    overlap(call, "out over base", out, base, m, d, true);
    overlap(call, "out over x", out, x, m, d, x.dtype == base.dtype);
    if (one_in(4) && base.stride >= d) out = {const_cast<void*>(base.data), base.dtype, base.stride};  // allowed
    call.go(
        m == 0, [&] { return unike_add_extra_neurons_workspace(m, d, &pool, threads); },
        [&](void* workspace, int64_t bytes) {
          return unike_add_extra_neurons(x, base, m, d, &pool, activation, out, workspace, bytes, threads);
        });
    return;
  }
  unike_extra_gradients grads{call.array<float>(m * d),
                              call.array<float>(p * d),
                              call.array<float>(p),
                              gated ? call.array<float>(p * d) : nullptr,
                              gated ? call.array<float>(p) : nullptr,
                              call.array<float>(p * d),
                              call.array<float>(edits * d),
                              call.array<float>(edits)};
  call.rows("grad", base, m, d);
  call.pointer("out.x", grads.x, m);
  call.pointer("out.keys", grads.keys, p);
  call.pointer("out.key_bias", grads.key_bias, p);
  call.pointer("out.values", grads.values, p);
  call.pointer("out.zeta", grads.zeta, edits);
  call.pointer("out.beta", grads.beta, edits);
  if (gated) {
    call.pointer("out.up", grads.up, p);
    call.pointer("out.up_bias", grads.up_bias, p);
  }
  call.go(
      m == 0, [&] { return unike_add_extra_neurons_backward_workspace(m, d, &pool, threads); },
      [&](void* workspace, int64_t bytes) {
        return unike_add_extra_neurons_backward(base, x, m, d, &pool, activation, &grads, workspace, bytes, threads);
      });
}

enum class Kind { kForward, kBackward, kWithSearch };

void attention(Kind kind) {
  const char* names[] = {"latent_attention", "latent_attention_backward", "memory_attention"};
  Call call(names[static_cast<int>(kind)]);
  const bool searches = kind == Kind::kWithSearch;
  const int64_t d = pick(1, 30), n = pick(0, 20), heads = pick(1, 2), width = pick(1, 9), r = pick(0, 9);
  const int64_t per_row = pick(1, 2), id_rows = pick(0, 3), m = id_rows * per_row, k = pick(0, 7);
  auto* ids = call.array<int64_t>(id_rows * k, -1, n > 0 ? n - 1 : 0);
  if (n == 0) std::fill_n(ids, id_rows * k, -1);
  const unike_dtype dtype = any_dtype(), weights = any_dtype();
  const bool folded = one_in(2), given = one_in(3), anchored = one_in(3) && m > 0;
  unike_memory memory{n,
                      heads,
                      width,
                      dtype,
                      call.table(n * heads * width, dtype),
                      call.table(n * heads * d, dtype),
                      folded ? call.array<float>(n * heads * r) : nullptr};
  unike_semantic_encoder encoder{
      r, weights, call.table(r * d, weights), call.array<float>(r), call.table(d * r, weights), call.array<float>(d)};
  unike_blend blend{0.3f,
                    static_cast<int>(pick(0, 1)),
                    static_cast<int>(pick(0, 1)),
                    given ? call.array<float>(m) : nullptr,
                    given ? m : 0,
                    anchored ? call.array<float>(id_rows * d) : nullptr,
                    anchored ? id_rows : 0};
  if (given && m == 0) blend.alphas = 0;
  unike_latent_inputs in{m,       d, rows_of(call, m, heads * width), rows_of(call, m, d), searches ? nullptr : ids,
                         id_rows, k};
  unike_rows_out out{call.table(m * d, in.inputs.dtype), in.inputs.dtype, d};
  auto* alpha = call.array<float>(m);

  call.pointer("memory.keys", memory.keys, n);
  call.pointer("memory.values", memory.values, n);
  call.enumeration("memory.dtype", memory.dtype);
  call.enumeration("encoder.dtype", encoder.dtype);
  call.rows("queries", in.queries, m, heads * width);
  call.rows("inputs", in.inputs, m, d);
  for (auto& [name, size] : std::vector<std::pair<const char*, int64_t*>>{{"m", &in.m},
                                                                          {"d", &in.d},
                                                                          {"k", &in.k},
                                                                          {"memory.n", &memory.n},
                                                                          {"memory.heads", &memory.heads},
                                                                          {"memory.width", &memory.width},
                                                                          {"encoder.r", &encoder.r}}) {
    if (searches && (name == std::string("k"))) {
      call.wrong("k negative", [&] { in.k = -pick(1, kMost); });
    } else {
      call.size(name, *size);
    }
  }
  call.product("m and d", in.m, in.d);
  call.product("memory.n and memory.width", memory.n, memory.width);
  call.product("encoder.r and d", encoder.r, in.d);
  if (!searches) call.product("m and k", in.m, in.k);
  if (!given) {
    call.pointer("encoder.w2", encoder.w2, r);
    call.pointer("encoder.b1", encoder.b1, r);
    call.pointer("encoder.b2", encoder.b2, d);
    if (!folded) call.pointer("encoder.w1", encoder.w1, r);
  } else if (m > 0) {
    call.wrong("alphas", [&] { blend.alphas = m + 1; });
    call.wrong("alphas monstrous", [&] { blend.alphas = monstrous(); });
    call.wrong("alpha crooked", [&] { blend.alpha = crooked(blend.alpha); });
  }
  if (folded && n > 0 && r > 0) {
    call.wrong("projected crooked", [&] { memory.projected = crooked(memory.projected); });
  }
  if (anchored) {
    call.wrong("anchors", [&] { blend.anchors = m + 1; });
    call.wrong("anchors monstrous", [&] { blend.anchors = monstrous(); });
    call.wrong("anchor crooked", [&] { blend.anchor = crooked(blend.anchor); });
  }
  if (!searches && m > 0) {
    call.wrong("id_rows", [&] { in.id_rows = m + 1; });
    call.wrong("id_rows monstrous", [&] { in.id_rows = monstrous(); });
    call.pointer("ids", in.ids, id_rows * k);
    if (k > 0) {
      const int64_t i = pick(0, id_rows * k - 1);
      call.wrong("an id beyond", [=] { ids[i] = pick(n, kMost); });
      call.wrong("an id before", [=] { ids[i] = -pick(2, kMost); });
    }
  }
  const int threads = any_threads();
  if (kind == Kind::kBackward) {
    unike_rows grad = rows_of(call, m, d);
    auto *grad_alpha = call.array<float>(m), *to_queries = call.array<float>(m * heads * width);
    auto *to_inputs = call.array<float>(m * d), *to_given = given ? call.array<float>(m) : nullptr;
    auto* to_anchor = anchored ? call.array<float>(m * d) : nullptr;
    call.rows("grad", grad, m, d);
    call.pointer("grad_alpha", grad_alpha, m);
    call.pointer("grad_queries", to_queries, m);
    call.pointer("grad_inputs", to_inputs, m);
    if (anchored) call.pointer("grad_anchor", to_anchor, m);
    call.go(
        m == 0, [&] { return unike_latent_attention_backward_workspace(&in, &memory, &encoder, threads); },
        [&](void* workspace, int64_t bytes) {
          return unike_latent_attention_backward(&in, &memory, &encoder, &blend, grad, grad_alpha, to_queries,
                                                 to_inputs, to_given, to_anchor, workspace, bytes, threads);
        });
    return;
  }
  call.rows("out", out, m, d);
  overlap(call, "out over inputs", out, in.inputs, m, d, true);
  if (m > 0) call.wrong("alpha_out crooked", [&] { alpha = crooked(alpha); });
  if (one_in(4) && in.inputs.stride >= d) {  // allowed
    out = {const_cast<void*>(in.inputs.data), in.inputs.dtype, in.inputs.stride};
  }
  if (!searches) {
    call.go(
        m == 0, [&] { return unike_latent_attention_workspace(&in, &memory, &encoder, threads); },
        [&](void* workspace, int64_t bytes) {
          return unike_latent_attention(&in, &memory, &encoder, &blend, out, alpha, workspace, bytes, threads);
        });
    return;
  }
  // Far more than there are: as many columns as are asked for, and work for n.
  if (one_in(3)) in.k = pick(n, n + 2000);
  Keys keys(call, n, pick(1, 20));
  unike_rows hidden = rows_of(call, m, keys.table.d);
  auto* found = one_in(2) ? call.array<int64_t>(m * in.k) : nullptr;
  keys.faults(call);
  call.rows("hidden", hidden, m, keys.table.d);
  call.go(
      m == 0, [&] { return unike_memory_attention_workspace(&keys.table, &in, &memory, &encoder, threads); },
      [&](void* workspace, int64_t bytes) {
        return unike_memory_attention(&keys.table, hidden, nullptr, &in, &memory, &encoder, &blend, out, alpha, found,
                                      workspace, bytes, threads);
      });
}

void prompt_keys() {
  Call call("prompt_keys");
  int64_t m = pick(0, 3), tokens = pick(0, 20);
  unike_prompt_encoder encoder{};
  encoder.e = pick(1, 20), encoder.blocks = pick(1, 2), encoder.hidden = pick(1, 9);
  encoder.heads = pick(1, 3), encoder.width = pick(1, 9);
  const int64_t e = encoder.e, n = encoder.blocks * encoder.hidden, seen = encoder.blocks * encoder.heads;
  const int64_t values = seen * encoder.width, spelling = UNIKE_SPELLING;
  const auto tensor = [&](const std::string& name, const float*& at, int64_t count) {
    at = call.array<float>(count);
    call.pointer("encoder." + name, at, count);
  };
  tensor("mean", encoder.mean, e);
  tensor("inverse_spread", encoder.inverse_spread, e);
  tensor("token", encoder.token, n * e);
  tensor("word", encoder.word, n * spelling);
  tensor("bias", encoder.bias, n);
  tensor("conv", encoder.conv, n * 3 * encoder.hidden);
  tensor("conv_bias", encoder.conv_bias, n);
  tensor("query", encoder.query, seen * encoder.hidden);
  tensor("token_value", encoder.token_value, values * e);
  tensor("word_value", encoder.word_value, values * spelling);
  for (int64_t* size : {&encoder.e, &encoder.blocks, &encoder.hidden, &encoder.heads, &encoder.width}) {
    call.size("a size of the encoder", *size);
    call.wrong("a size of 0", [=] { *size = 0; });
  }
  call.product("hidden and heads", encoder.hidden, encoder.heads);

  unike_vocabulary vocabulary{};
  vocabulary.tokens = pick(1, 5);
  auto* marks = call.array<int64_t>(vocabulary.tokens * 3, 0, 1);
  for (int64_t i = 0; i < vocabulary.tokens; ++i) marks[3 * i] = pick(0, UNIKE_TOKEN_CHARACTERS);
  vocabulary.characters = call.array<int64_t>(vocabulary.tokens * (UNIKE_TOKEN_CHARACTERS + 2), 0, 0x110001);
  vocabulary.marks = marks;
  call.pointer("vocabulary.characters", vocabulary.characters, 1);
  call.pointer("vocabulary.marks", vocabulary.marks, 1);
  call.wrong("a vocabulary of none", [&] { vocabulary.tokens = -pick(0, 3); });

  const int64_t* ids = call.array<int64_t>(m * tokens, -2, 2 * vocabulary.tokens);  // a number of no token is allowed
  const uint8_t* within = call.array<uint8_t>(m * tokens, 0, 1);
  unike_rows embeddings = rows_of(call, m * tokens, e);
  float* keys = call.array<float>(m * values);
  call.pointer("ids", ids, m * tokens);
  call.pointer("within", within, m * tokens);
  call.rows("embeddings", embeddings, m * tokens, e);
  call.pointer("keys", keys, m);
  call.size("m", m);
  call.size("tokens", tokens);
  if (m * tokens > 0) {
    const_cast<int64_t*>(ids)[0] = 0;
    const_cast<uint8_t*>(within)[0] = 1;
    call.wrong("a token of too many characters", [=] { marks[0] = one_in(2) ? -1 : UNIKE_TOKEN_CHARACTERS + 1; });
  }
  const int threads = any_threads();
  call.go(
      m == 0, [&] { return unike_prompt_keys_workspace(&encoder, tokens, threads); },
      [&](void* workspace, int64_t bytes) {
        return unike_prompt_keys(&encoder, &vocabulary, m, tokens, ids, embeddings, within, keys, workspace, bytes,
                                 threads);
      });
}

void machine() {
  Call call("read and multiply_add");
  int64_t bytes = pick(0, 5000), rounds = pick(0, 3);
  const void* data = call.bytes(bytes);
  auto scan = static_cast<unike_scan>(pick(0, 3));
  double count = 0, *to = &count;
  const bool reads = one_in(2);
  if (reads) {
    if (bytes > 0) call.wrong("data null", [&] { data = nullptr; });
    call.size("bytes", bytes);
  } else {
    call.size("rounds", rounds);
    call.enumeration("scan", scan);
    call.pointer("count", to, 1);
  }
  const int threads = static_cast<int>(pick(-5, 3));
  call.go(true, [] { return 0; },
          [&](void*, int64_t) {
            return reads ? unike_read(data, bytes, threads) : unike_multiply_add(scan, rounds, threads, to);
          });
}

// Whole structs that are missing.
void nothing() {
  const unike_status all[] = {
      unike_cosine_topk(nullptr, {}, 1, 1, nullptr, nullptr, nullptr, nullptr, 0, 1),
      unike_add_extra_neurons({}, {}, 1, 1, nullptr, UNIKE_RELU, {}, nullptr, 0, 1),
      unike_add_extra_neurons_backward({}, {}, 1, 1, nullptr, UNIKE_RELU, nullptr, nullptr, 0, 1),
      unike_latent_attention(nullptr, nullptr, nullptr, nullptr, {}, nullptr, nullptr, 0, 1),
      unike_latent_attention_backward(nullptr, nullptr, nullptr, nullptr, {}, nullptr, nullptr, nullptr, nullptr,
                                      nullptr, nullptr, 0, 1),
      unike_memory_attention(nullptr, {}, nullptr, nullptr, nullptr, nullptr, nullptr, {}, nullptr, nullptr, nullptr, 0,
                             1),
      unike_prompt_keys(nullptr, nullptr, 1, 1, nullptr, {}, nullptr, nullptr, nullptr, 0, 1)};
  for (const unike_status status : all) {
    if (status != UNIKE_INVALID_ARGUMENT) fault("a struct that is null");
  }
  const int64_t workspaces[] = {unike_cosine_topk_workspace(nullptr, 1, 1, 1),
                                unike_add_extra_neurons_workspace(1, 1, nullptr, 1),
                                unike_add_extra_neurons_backward_workspace(1, 1, nullptr, 1),
                                unike_latent_attention_workspace(nullptr, nullptr, nullptr, 1),
                                unike_latent_attention_backward_workspace(nullptr, nullptr, nullptr, 1),
                                unike_memory_attention_workspace(nullptr, nullptr, nullptr, nullptr, 1),
                                unike_prompt_keys_workspace(nullptr, 1, 1)};
  for (const int64_t bytes : workspaces) {
    if (bytes != 0) fault("a workspace for a struct that is null");
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int64_t tries = argc > 1 ? std::atoll(argv[1]) : 2000;
  bits.seed(argc > 2 ? std::atoll(argv[2]) : 1);
  nothing();
  for (int64_t i = 0; i < tries; ++i) {
    switch (i % 11) {
      case 0: normalize(); break;
      case 1: pack(); break;
      case 2: search(); break;
      case 3: neurons(false); break;
      case 4: neurons(true); break;
      case 5: attention(Kind::kForward); break;
      case 6: attention(Kind::kBackward); break;
      case 7: attention(Kind::kWithSearch); break;
      case 8: lead(); break;
      case 9: prompt_keys(); break;
      default: machine(); break;
    }
  }
  for (const auto& [name, count] : accepted) {
    std::printf("%s: %lld right, %lld refused\n", name.c_str(), (long long)count, (long long)refused[name]);
  }
  std::printf("%lld tries\n", (long long)tries);
  return 0;
}
