#include "unike/cosine_topk.h"

#include "bindings.h"

namespace unike::python {

void bind_cosine_topk(pybind11::module_& module) {
  using Address = std::uintptr_t;
  using pybind11::arg;
  const pybind11::call_guard<pybind11::gil_scoped_release> release_gil;

  module.def(
      "normalize_rows_f32",
      [](Address x, int64_t rows, int64_t d, int64_t row_stride, Address out, int threads) {
        check(unike_normalize_rows_f32(pointer<const float>(x), rows, d, row_stride, pointer<float>(out), threads));
      },
      release_gil, arg("x"), arg("rows"), arg("d"), arg("row_stride"), arg("out"), arg("threads"));

  module.def(
      "cosine_topk_f32",
      [](Address queries, int64_t m, int64_t q_stride, Address keys, int64_t n, int64_t k_stride, int64_t d, int64_t k,
         Address bounds, Address scores, Address ids, int threads) {
        check(unike_cosine_topk_f32(pointer<const float>(queries), m, q_stride, pointer<const float>(keys), n, k_stride,
                                    d, k, pointer<const int64_t>(bounds), pointer<float>(scores), pointer<int64_t>(ids),
                                    threads));
      },
      release_gil, arg("queries"), arg("m"), arg("q_stride"), arg("keys"), arg("n"), arg("k_stride"), arg("d"),
      arg("k"), arg("bounds"), arg("scores"), arg("ids"), arg("threads"));
}

}  // namespace unike::python
