// The extra neurons of many edits, forward and backward: what is computed, in which order, and what the threads share.
//
// A slot is a token with one of its edits. For each slot of a block of tokens the products with the edit's keys give the
// activations o; then each token adds o V + beta (sum o) zeta of its slots, in the order of its row's list, in a sum of its
// own, and adds this to the base once: the base is no part of the extra neurons' rounding. Tokens without edits are copied.
// Backward, each slot gets the gradients of its activations, each token the sum of its slots for x, and each edit the
// sums over its slots, in the order of the tokens.
#include "unike/extra_neurons.h"

#include <algorithm>
#include <cmath>

#include "common/checked.h"
#include "common/parallel.h"
#include "common/status.h"
#include "common/workspace.h"
#include "cpu/activation.h"
#include "cpu/isa.h"

namespace unike {
namespace {

constexpr int64_t kTokenBlock = 128;
// Where there are fewer tokens than twice the threads, these share the columns of a token.
constexpr int64_t kColumns = 512;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t padded(int64_t neurons) { return ceil_div(neurons, 4) * 4; }

struct Slot {
  int64_t token, edit;
  int64_t neurons;  // where its neurons' numbers begin
  int64_t place;    // among the slots of its edit
  float total;      // sum o
  float steered;    // zeta . grad
};

// How much room the rows of a pool need, in neurons up to a multiple of 4.
struct PoolSizes {
  int64_t most_edits = 0, most_neurons = 0;  // of a row
  int64_t largest = 0;                       // edit
};

struct Problem {
  unike_rows x;
  int64_t m, d;
  const unike_edit_pool& pool;
  unike_activation activation;
};

// The gradients of all parameters without a token.
void clear_gradients(const unike_edit_pool& pool, int64_t d, const unike_extra_gradients& out) {
  const int64_t p = pool.neurons, e = pool.edits;
  for (float* table : {out.keys, out.values, pool.up == nullptr ? nullptr : out.up}) {
    if (table != nullptr) std::fill_n(table, p * d, 0.0f);
  }
  for (float* row : {out.key_bias, pool.up == nullptr ? nullptr : out.up_bias}) {
    if (row != nullptr) std::fill_n(row, p, 0.0f);
  }
  std::fill_n(out.zeta, e * d, 0.0f);
  std::fill_n(out.beta, e, 0.0f);
}

class ExtraNeurons {
 public:
  ExtraNeurons(const Problem& p, const PoolSizes& sizes, const RowKernels& kernels, int threads, bool backward,
               Workspace& workspace)
      : p_(p), pool_(p.pool), kernels_(kernels), threads_(threads), block_(std::min(p.m, kTokenBlock)) {
    refuse_repeats(workspace.take<int64_t>(pool_.edits));
    first_slots_ = workspace.take<int64_t>(block_ + 1);
    slots_ = workspace.take<Slot>(times(block_, sizes.most_edits));
    x_ = workspace.take<const float*>(block_);
    if (p.x.dtype != UNIKE_F32) converted_x_ = workspace.take<float>(times(block_, p.d));
    const auto per_neuron = [&] { return workspace.take<float>(times(block_, sizes.most_neurons)); };
    o_ = per_neuron();
    up_ = per_neuron();
    rows_ = std::max(sizes.largest, backward ? block_ : 0);
    pointers_ = workspace.take<const void*>(times(threads, rows_));
    if (!backward) {
      sums_ = workspace.take<float>(times(threads, p.d));
      converted_ = workspace.take<float>(times(threads, p.d));
      return;
    }
    gates_ = per_neuron();
    grad_gates_ = per_neuron();
    grad_ups_ = per_neuron();
    grads_ = workspace.take<float>(times(block_, p.d));
    edit_slots_ = workspace.take<int64_t>(pool_.edits + 1);
    slots_of_edits_ = workspace.take<int64_t>(times(block_, sizes.most_edits));
    columns_ = workspace.take<float>(times(threads, 3, block_));
  }

  void forward(unike_rows base, unike_rows_out out) {
    for (first_ = 0; first_ < p_.m; first_ += block_) {
      load_block();
      parallel_for(slot_count_, threads_of_slots(), [&](int64_t s, int thread) { activate_slot(slots_[s], thread); });
      const int threads = threads_of_slots();
      const int64_t slices = count_ >= 2 * threads ? 1 : ceil_div(p_.d, kColumns), width = ceil_div(p_.d, slices);
      parallel_for(count_ * slices, threads, [&](int64_t task, int thread) {
        const int64_t t = task / slices, from = task % slices * width, to = std::min(p_.d, from + width);
        if (from < to) add_to_base(t, from, to, base, out, thread);
      });
    }
  }

  void backward(unike_rows grad, const unike_extra_gradients& out) {
    clear_gradients(pool_, p_.d, out);
    for (first_ = 0; first_ < p_.m; first_ += block_) {
      load_block();
      group_by_edit();
      parallel_for(count_, threads_of(1), [&](int64_t t, int) {
        kernels_.load_row[grad.dtype](at(grad.data, grad.dtype, (first_ + t) * grad.stride), p_.d, grads_ + t * p_.d);
      });
      parallel_for(slot_count_, threads_of_slots(), [&](int64_t s, int thread) {
        activate_slot(slots_[s], thread);
        through_slot(slots_[s], thread);
      });
      parallel_for(count_, threads_of_slots(),
                   [&](int64_t t, int thread) { through_keys(t, thread, out.x + (first_ + t) * p_.d); });
      const int64_t slices = ceil_div(p_.d, kColumns);
      parallel_for(pool_.edits * slices, threads_of_slots(), [&](int64_t task, int thread) {
        const int64_t from = task % slices * kColumns;
        to_edit(task / slices, from, std::min(p_.d, from + kColumns), thread, out);
      });
    }
  }

 private:
  int64_t size(int64_t e) const { return pool_.indptr[e + 1] - pool_.indptr[e]; }

  void each_edit(int64_t row, const auto& body) const {
    for (int64_t i = pool_.row_indptr[row]; i < pool_.row_indptr[row + 1]; ++i) body(pool_.row_edits[i]);
  }

  const void* at(const void* table, unike_dtype dtype, int64_t element) const {
    return static_cast<const char*>(table) + element * size_of(dtype);
  }

  int threads_of(double work_per_column) const {
    return useful_threads(work_per_column * static_cast<double>(count_ * p_.d), threads_);
  }
  int threads_of_slots() const {
    return useful_threads(2.0 * static_cast<double>(neurons_) * static_cast<double>(p_.d), threads_);
  }

  // A row that named an edit twice would need more room than the sums of an edit have. last: of each edit, the row that
  // named it last, counted from 1; null while the workspace is measured.
  void refuse_repeats(int64_t* last) const {
    if (last == nullptr) return;
    std::fill_n(last, pool_.edits, 0);
    for (int64_t row = 0; row < pool_.rows; ++row) {
      each_edit(row, [&](int64_t e) {
        if (last[e] == row + 1) refuse("row_edits", "distinct edits in each row, but a row names twice the edit", e);
        last[e] = row + 1;
      });
    }
  }

  // The slots of the next block, and its rows of x.
  void load_block() {
    count_ = std::min(block_, p_.m - first_);
    slot_count_ = neurons_ = 0;
    for (int64_t t = 0; t < count_; ++t) {
      const int64_t token = first_ + t;
      const int64_t row = pool_.token_rows ? pool_.token_rows[token] : token / (p_.m / pool_.rows);
      first_slots_[t] = slot_count_;
      each_edit(row, [&](int64_t e) {
        slots_[slot_count_++] = {t, e, neurons_, 0, 0.0f, 0.0f};
        neurons_ += padded(size(e));
      });
      const void* x = at(p_.x.data, p_.x.dtype, token * p_.x.stride);
      x_[t] = static_cast<const float*>(x);
      if (p_.x.dtype != UNIKE_F32) {
        x_[t] = converted_x_ + t * p_.d;
        if (first_slots_[t] < slot_count_) kernels_.load_row[p_.x.dtype](x, p_.d, converted_x_ + t * p_.d);
      }
    }
    first_slots_[count_] = slot_count_;
  }

  // Pointers to the rows of an edit's neurons in a table [P, d].
  const void** neurons_of(int64_t e, const void* table, int64_t column, int thread) const {
    const void** rows = pointers_ + thread * rows_;
    for (int64_t j = 0; j < size(e); ++j) rows[j] = at(table, pool_.dtype, (pool_.indptr[e] + j) * p_.d + column);
    return rows;
  }

  // out[j] = row . table[j] for the neurons of an edit.
  void multiply(const float* row, int64_t e, const void* table, float* out, int thread) const {
    kernels_.dots[pool_.dtype](&row, 1, neurons_of(e, table, 0, thread), size(e), p_.d, true, out, padded(size(e)));
  }

  void activate_slot(Slot& slot, int thread) {
    const int64_t n = size(slot.edit), first = pool_.indptr[slot.edit];
    float *o = o_ + slot.neurons, *up = up_ + slot.neurons;
    if (n == 0) return;
    multiply(x_[slot.token], slot.edit, pool_.keys, o, thread);
    if (pool_.up != nullptr) multiply(x_[slot.token], slot.edit, pool_.up, up, thread);
    for (int64_t j = 0; j < n; ++j) {
      const float gate = o[j] + pool_.key_bias[first + j];
      if (gates_ != nullptr) gates_[slot.neurons + j] = gate;
      up[j] = pool_.up != nullptr ? up[j] + pool_.up_bias[first + j] : 1.0f;
      o[j] = activate(p_.activation, gate) * up[j];
      slot.total += o[j];
    }
  }

  void add_to_base(int64_t t, int64_t from, int64_t to, const unike_rows& base, const unike_rows_out& out, int thread) {
    const void* given = at(base.data, base.dtype, (first_ + t) * base.stride + from);
    void* result = static_cast<char*>(out.data) + ((first_ + t) * out.stride + from) * size_of(out.dtype);
    const int64_t width = to - from;
    if (first_slots_[t] == first_slots_[t + 1]) {
      if (given != result) {
        std::copy_n(static_cast<const char*>(given), width * size_of(base.dtype), static_cast<char*>(result));
      }
      return;
    }
    float* sum = sums_ + thread * p_.d;
    std::fill_n(sum, width, 0.0f);
    for (int64_t s = first_slots_[t]; s < first_slots_[t + 1]; ++s) {
      const Slot& slot = slots_[s];
      const void** values = neurons_of(slot.edit, pool_.values, from, thread);
      kernels_.add_gathered[pool_.dtype](o_ + slot.neurons, values, size(slot.edit), width, sum);
      const float steer = pool_.beta[slot.edit] * slot.total;
      const void* zeta = at(pool_.zeta, pool_.dtype, slot.edit * p_.d + from);
      kernels_.add_gathered[pool_.dtype](&steer, &zeta, 1, width, sum);
    }
    if (base.dtype == UNIKE_F32) {
      kernels_.blend(static_cast<const float*>(given), 1.0f, sum, 1.0f, width, static_cast<float*>(result));
    } else {
      float* wide = converted_ + thread * p_.d;
      kernels_.load_row[base.dtype](given, width, wide);
      kernels_.blend(wide, 1.0f, sum, 1.0f, width, wide);
      kernels_.store_row[base.dtype](wide, width, result);
    }
  }

  // Lists the slots of each edit, in the order of the tokens.
  void group_by_edit() {
    std::fill_n(edit_slots_, pool_.edits + 1, 0);
    for (int64_t s = 0; s < slot_count_; ++s) slots_[s].place = edit_slots_[slots_[s].edit + 1]++;
    for (int64_t e = 0; e < pool_.edits; ++e) edit_slots_[e + 1] += edit_slots_[e];
    for (int64_t s = 0; s < slot_count_; ++s) slots_of_edits_[edit_slots_[slots_[s].edit] + slots_[s].place] = s;
  }

  // The gradients of a slot's pre-activations.
  void through_slot(Slot& slot, int thread) {
    const int64_t n = size(slot.edit);
    const float* grad = grads_ + slot.token * p_.d;
    float *to_gate = grad_gates_ + slot.neurons, *to_up = grad_ups_ + slot.neurons;
    const void* zeta = at(pool_.zeta, pool_.dtype, slot.edit * p_.d);
    float steered[4];
    kernels_.dots[pool_.dtype](&grad, 1, &zeta, 1, p_.d, false, steered, 4);
    slot.steered = steered[0];
    if (n == 0) return;
    multiply(grad, slot.edit, pool_.values, to_gate, thread);
    for (int64_t j = 0; j < n; ++j) {
      const float grad_o = to_gate[j] + pool_.beta[slot.edit] * slot.steered, gate = gates_[slot.neurons + j];
      to_gate[j] = grad_o * up_[slot.neurons + j] * slope(p_.activation, gate);
      to_up[j] = grad_o * activate(p_.activation, gate);
    }
  }

  void through_keys(int64_t t, int thread, float* grad_x) const {
    std::fill_n(grad_x, p_.d, 0.0f);
    for (int64_t s = first_slots_[t]; s < first_slots_[t + 1]; ++s) {
      const Slot& slot = slots_[s];
      const auto add = [&](const float* weights, const void* table) {
        const void** rows = neurons_of(slot.edit, table, 0, thread);
        kernels_.add_gathered[pool_.dtype](weights + slot.neurons, rows, size(slot.edit), p_.d, grad_x);
      };
      add(grad_gates_, pool_.keys);
      if (pool_.up != nullptr) add(grad_ups_, pool_.up);
    }
  }

  // What the slots of an edit add to its gradients, in the columns from, ..., to - 1.
  void to_edit(int64_t e, int64_t from, int64_t to, int thread, const unike_extra_gradients& out) const {
    const int64_t* slots = slots_of_edits_ + edit_slots_[e];
    const int64_t count = edit_slots_[e + 1] - edit_slots_[e], d = p_.d;
    if (count == 0) return;
    const void** rows = pointers_ + thread * rows_;
    float* weights = columns_ + thread * 3 * block_;
    // sum = sum + the weighted rows of the slots; weight(slot) says how much of each.
    const auto add = [&](const auto& row, const auto& weight, float* sum) {
      for (int64_t i = 0; i < count; ++i) {
        const Slot& slot = slots_[slots[i]];
        rows[i] = row(slot.token) + from;
        weights[i] = weight(slot);
      }
      kernels_.add_gathered[UNIKE_F32](weights, rows, count, to - from, sum + from);
    };
    const auto x = [&](int64_t t) { return x_[t]; };
    const auto grad = [&](int64_t t) { return grads_ + t * d; };
    for (int64_t j = 0; j < size(e); ++j) {
      const int64_t neuron = pool_.indptr[e] + j;
      add(grad, [&](const Slot& s) { return o_[s.neurons + j]; }, out.values + neuron * d);
      add(x, [&](const Slot& s) { return grad_gates_[s.neurons + j]; }, out.keys + neuron * d);
      if (pool_.up != nullptr) add(x, [&](const Slot& s) { return grad_ups_[s.neurons + j]; }, out.up + neuron * d);
      if (from > 0) continue;  // what has no columns is for the first slice
      for (int64_t i = 0; i < count; ++i) {
        out.key_bias[neuron] += grad_gates_[slots_[slots[i]].neurons + j];
        if (pool_.up != nullptr) out.up_bias[neuron] += grad_ups_[slots_[slots[i]].neurons + j];
      }
    }
    add(grad, [&](const Slot& s) { return pool_.beta[e] * s.total; }, out.zeta + e * d);
    for (int64_t i = 0; i < count && from == 0; ++i) {
      out.beta[e] += slots_[slots[i]].total * slots_[slots[i]].steered;
    }
  }

  const Problem& p_;
  const unike_edit_pool& pool_;
  const RowKernels& kernels_;
  int threads_;
  int64_t block_;                  // tokens that the workspace has room for
  int64_t first_ = 0, count_ = 0;  // the tokens of the block at work
  int64_t slot_count_ = 0, neurons_ = 0;
  int64_t rows_;  // that a thread points to at a time

  int64_t* first_slots_;  // [block + 1], of each token
  Slot* slots_;
  const float** x_;
  float *converted_x_ = nullptr, *converted_ = nullptr;
  float *o_, *up_, *gates_ = nullptr, *grad_gates_ = nullptr, *grad_ups_ = nullptr;  // by neuron of a slot
  const void** pointers_;                                                            // [threads, rows]
  float* sums_ = nullptr;                                                            // [block, d]
  float* grads_ = nullptr;                                                           // [block, d]
  int64_t *edit_slots_ = nullptr, *slots_of_edits_ = nullptr;
  float* columns_ = nullptr;  // [threads, ...]
};

// Which rows use which edits, and all sizes; the tables are for check_tables.
PoolSizes check(const unike_edit_pool& pool, int64_t m, int64_t d) {
  check_size("m", m, 0);
  check_size("d", d, 1);
  check_size("pool.neurons", pool.neurons, 0);
  check_size("pool.edits", pool.edits, 0);
  check_size("pool.rows", pool.rows, 1);
  for (const int64_t rows : {m, pool.neurons, pool.edits}) times(rows, d, sizeof(float));
  check_array("indptr", pool.indptr, pool.edits + 1);
  check_array("row_indptr", pool.row_indptr, pool.rows + 1);
  PoolSizes sizes;
  require(pool.indptr[0] == 0, "indptr must ascend from 0");
  for (int64_t e = 0; e < pool.edits; ++e) {
    require(pool.indptr[e] <= pool.indptr[e + 1], "indptr must ascend from 0");
    require(pool.indptr[e + 1] <= pool.neurons, "indptr must not end beyond the neurons");
    sizes.largest = std::max(sizes.largest, padded(pool.indptr[e + 1] - pool.indptr[e]));
  }
  require(pool.row_indptr[0] == 0, "row_indptr must ascend from 0");
  for (int64_t row = 0; row < pool.rows; ++row) {
    const int64_t from = pool.row_indptr[row], to = pool.row_indptr[row + 1];
    require(from <= to, "row_indptr must ascend from 0");
    if (to - from > pool.edits) refuse("row_indptr", "rows of distinct edits, no more than the pool has", to - from);
    sizes.most_edits = std::max(sizes.most_edits, to - from);
  }
  check_array("row_edits", pool.row_edits, pool.row_indptr[pool.rows]);
  for (int64_t row = 0; row < pool.rows; ++row) {
    int64_t neurons = 0;
    for (int64_t i = pool.row_indptr[row]; i < pool.row_indptr[row + 1]; ++i) {
      const int64_t e = pool.row_edits[i];
      require(0 <= e && e < pool.edits, "row_edits must name edits of the pool");
      neurons = plus(neurons, padded(pool.indptr[e + 1] - pool.indptr[e]));
    }
    sizes.most_neurons = std::max(sizes.most_neurons, neurons);
  }
  if (pool.token_rows == nullptr) {
    require(m % pool.rows == 0, "the tokens cannot be split evenly among the rows");
  } else {
    check_array("token_rows", pool.token_rows, m);
    const auto valid = [&](int64_t row) { return 0 <= row && row < pool.rows; };
    require(std::all_of(pool.token_rows, pool.token_rows + m, valid), "token_rows must name rows of the pool");
  }
  return sizes;
}

void check_tables(const unike_edit_pool& pool, int64_t d, unike_activation activation) {
  if (activation < UNIKE_RELU || activation > UNIKE_RELU2) refuse("activation", "one of unike_activation", activation);
  const int64_t p = pool.neurons;
  check_table("pool.keys", pool.keys, pool.dtype, p * d);
  check_table("pool.values", pool.values, pool.dtype, p * d);
  check_table("pool.zeta", pool.zeta, pool.dtype, pool.edits * d);
  check_array("pool.key_bias", pool.key_bias, p);
  check_array("pool.beta", pool.beta, pool.edits);
  if (pool.up == nullptr) return;
  check_table("pool.up", pool.up, pool.dtype, p * d);
  check_array("pool.up_bias", pool.up_bias, p);
}

// A result of the backward pass.
struct Gradient {
  const char* name;
  const float* data;
  int64_t count;
};

int64_t workspace_bytes_of(int64_t m, int64_t d, const unike_edit_pool* pool, int threads, bool backward) {
  return guarded_bytes([&] {
    require(pool != nullptr, "pool must not be null");
    const PoolSizes sizes = check(*pool, m, d);
    Workspace workspace;
    // Rows of bfloat16 need room to be converted; nothing else depends on them.
    const Problem problem{{nullptr, UNIKE_BF16, 0}, m, d, *pool, UNIKE_RELU};
    ExtraNeurons(problem, sizes, row_kernels(), threads_of_call(threads), backward, workspace);
    return workspace.bytes();
  });
}

}  // namespace
}  // namespace unike

extern "C" int64_t unike_add_extra_neurons_workspace(int64_t m, int64_t d, const unike_edit_pool* pool, int threads) {
  return unike::workspace_bytes_of(m, d, pool, threads, false);
}

extern "C" unike_status unike_add_extra_neurons(unike_rows x, unike_rows base, int64_t m, int64_t d,
                                                const unike_edit_pool* pool, unike_activation activation,
                                                unike_rows_out out, void* workspace, int64_t workspace_bytes,
                                                int threads) {
  using namespace unike;
  return guarded([&] {
    require(pool != nullptr, "pool must not be null");
    const PoolSizes sizes = check(*pool, m, d);
    check_tables(*pool, d, activation);
    const Extent read_x = check_rows("x", x, m, d), read_base = check_rows("base", base, m, d);
    const Extent written = check_rows_out("out", out, m, d);
    require(out.dtype == base.dtype, "out must have the dtype of base");
    check_apart("out", written, read_base);
    check_apart("out", written, read_x);
    if (m == 0) return;
    Workspace pieces(workspace, workspace_bytes);
    const Problem problem{x, m, d, *pool, activation};
    ExtraNeurons(problem, sizes, row_kernels(), threads_of_call(threads), false, pieces).forward(base, out);
  });
}

extern "C" int64_t unike_add_extra_neurons_backward_workspace(int64_t m, int64_t d, const unike_edit_pool* pool,
                                                              int threads) {
  return unike::workspace_bytes_of(m, d, pool, threads, true);
}

extern "C" unike_status unike_add_extra_neurons_backward(unike_rows grad, unike_rows x, int64_t m, int64_t d,
                                                         const unike_edit_pool* pool, unike_activation activation,
                                                         const unike_extra_gradients* out, void* workspace,
                                                         int64_t workspace_bytes, int threads) {
  using namespace unike;
  return guarded([&] {
    require(pool != nullptr && out != nullptr, "pool and out must not be null");
    const PoolSizes sizes = check(*pool, m, d);
    check_tables(*pool, d, activation);
    check_rows("grad", grad, m, d);
    check_rows("x", x, m, d);
    const int64_t p = pool->neurons, e = pool->edits;
    require((out->up != nullptr && out->up_bias != nullptr) || pool->up == nullptr || p == 0,
            "out.up and out.up_bias must not be null for gated neurons");
    for (const auto& [name, data, count] : {Gradient{"out.x", out->x, m * d},
                                            {"out.keys", out->keys, p * d},
                                            {"out.key_bias", out->key_bias, p},
                                            {"out.values", out->values, p * d},
                                            {"out.zeta", out->zeta, e * d},
                                            {"out.beta", out->beta, e},
                                            {"out.up", out->up, pool->up == nullptr ? 0 : p * d},
                                            {"out.up_bias", out->up_bias, pool->up == nullptr ? 0 : p}}) {
      check_array(name, data, count);
    }
    const Problem problem{x, m, d, *pool, activation};
    if (m == 0) {
      clear_gradients(*pool, d, *out);
      return;
    }
    Workspace pieces(workspace, workspace_bytes);
    ExtraNeurons(problem, sizes, row_kernels(), threads_of_call(threads), true, pieces).backward(grad, *out);
  });
}
