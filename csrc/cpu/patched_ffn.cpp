// The C ABI of the patched FFN: checks, threads, and the kernel of this CPU.
#include "cpu/patched_ffn.h"

#include <algorithm>
#include <vector>

#include "common/cpu_isa.h"
#include "common/parallel.h"
#include "common/status.h"

namespace unike {
namespace {

void check_ascending(const int64_t* indptr, int64_t count, const char* message) {
  require(indptr != nullptr && indptr[0] == 0 && std::is_sorted(indptr, indptr + count + 1), message);
}

void check(const FfnProblem& p) {
  require(p.m >= 0 && p.d >= 1, "m must not be negative, d at least 1");
  require(p.pool != nullptr, "pool must not be null");
  const unike_edit_pool_f32& pool = *p.pool;
  require(pool.rows >= 1 && pool.edits >= 0, "a pool needs at least one row");
  check_ascending(pool.indptr, pool.edits, "indptr must ascend from 0");
  require(pool.indptr[pool.edits] == pool.neurons, "indptr must end at the number of neurons");
  check_ascending(pool.row_indptr, pool.rows, "row_indptr must ascend from 0");
  for (int64_t i = 0; i < pool.row_indptr[pool.rows]; ++i) {
    require(0 <= pool.row_edits[i] && pool.row_edits[i] < pool.edits, "row_edits must name edits of the pool");
  }
  if (pool.token_rows == nullptr) {
    require(p.m % pool.rows == 0, "the tokens cannot be split evenly among the rows");
  } else {
    const auto valid = [&](int64_t row) { return 0 <= row && row < pool.rows; };
    require(std::all_of(pool.token_rows, pool.token_rows + p.m, valid), "token_rows must name rows of the pool");
  }
}

}  // namespace
}  // namespace unike

extern "C" unike_status unike_add_extra_neurons_f32(const float* x, int64_t x_stride, const float* base,
                                                    int64_t base_stride, int64_t m, int64_t d,
                                                    const unike_edit_pool_f32* pool, unike_activation activation,
                                                    float* out, int64_t out_stride, int threads) {
  using namespace unike;
  return guarded([&] {
    const FfnProblem problem{x, x_stride, base, base_stride, m, d, pool, activation, out, out_stride};
    check(problem);
    if (m == 0) return;
    const auto run = UNIKE_PICK(add_extra_neurons);
    const double per_token = 2.0 * static_cast<double>(d) * static_cast<double>(pool->neurons);
    const int workers = static_cast<int>(std::min<int64_t>(m, useful_threads(per_token * m, threads)));
    parallel_for(workers, workers, [&](int64_t part) {
      std::vector<float> extra(d);
      run(problem, part * m / workers, (part + 1) * m / workers, extra.data());
    });
  });
}
