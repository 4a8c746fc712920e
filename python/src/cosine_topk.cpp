#include "unike/cosine_topk.h"

#include "bindings.h"

namespace unike::python {

void bind_cosine_topk(pybind11::module_& module) {
  using Address = std::uintptr_t;
  using pybind11::arg;
  const pybind11::call_guard<ReleaseGil> release_gil;

  module.def(
      "normalize_rows",
      [](const Rows& x, int64_t rows, int64_t d, Address out, int threads) {
        check(unike_normalize_rows(x.to_read(), rows, d, pointer<float>(out), threads));
      },
      release_gil, arg("x"), arg("rows"), arg("d"), arg("out"), arg("threads"));

  module.def(
      "code_bytes", [](int scan, int64_t d) { return unike_code_bytes(static_cast<unike_scan>(scan), d); }, arg("scan"),
      arg("d"));

  module.def(
      "pack_keys",
      [](Address rows, int64_t n, int64_t d, int64_t stride, int scan, Address direction, Address codes, Address bounds,
         int threads) {
        with_workspace([&] { return unike_pack_keys_workspace(d, threads); },
                       [&](void* workspace, int64_t bytes) {
                         return unike_pack_keys(pointer<const float>(rows), n, d, stride, static_cast<unike_scan>(scan),
                                                pointer<const float>(direction), pointer<void>(codes),
                                                pointer<float>(bounds), workspace, bytes, threads);
                       });
      },
      release_gil, arg("rows"), arg("n"), arg("d"), arg("stride"), arg("scan"), arg("direction"), arg("codes"),
      arg("bounds"), arg("threads"));

  module.def(
      "pack_leading",
      [](Address rows, int64_t first, int64_t n, int64_t d, int64_t stride, int64_t p, Address directions,
         Address codes, Address bounds, int threads) {
        check(unike_pack_leading(pointer<const float>(rows), first, n, d, stride, p, pointer<const float>(directions),
                                 pointer<void>(codes), pointer<float>(bounds), threads));
      },
      release_gil, arg("rows"), arg("first"), arg("n"), arg("d"), arg("stride"), arg("p"), arg("directions"),
      arg("codes"), arg("bounds"), arg("threads"));

  pybind11::class_<Keys>(module, "Keys")
      .def(pybind11::init<int64_t, int64_t, Address, int64_t, int, Address, Address, Address, int64_t, Address, Address,
                          Address>(),
           arg("n"), arg("d"), arg("rows"), arg("stride"), arg("scan"), arg("codes"), arg("bounds"), arg("direction"),
           arg("p") = 0, arg("directions") = 0, arg("leading_codes") = 0, arg("leading_bounds") = 0);

  module.def(
      "cosine_topk",
      [](const Keys& keys, const Rows& queries, int64_t m, int64_t k, Address ranges, Address scores, Address ids,
         int threads) {
        with_workspace([&] { return unike_cosine_topk_workspace(&keys.table, m, k, threads); },
                       [&](void* workspace, int64_t bytes) {
                         return unike_cosine_topk(&keys.table, queries.to_read(), m, k, pointer<const int64_t>(ranges),
                                                  pointer<float>(scores), pointer<int64_t>(ids), workspace, bytes,
                                                  threads);
                       });
      },
      release_gil, arg("keys"), arg("queries"), arg("m"), arg("k"), arg("ranges"), arg("scores"), arg("ids"),
      arg("threads"));
}

}  // namespace unike::python
