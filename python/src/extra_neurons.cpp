#include "unike/extra_neurons.h"

#include <array>

#include "bindings.h"

namespace unike::python {
namespace {

using Address = std::uintptr_t;

// The extra neurons of a layer, which stay where they are from call to call.
struct Pool {
  unike_edit_pool pool;

  // sizes: (neurons, edits, rows); tables: the addresses of an EditPool in its order.
  Pool(const std::array<int64_t, 3>& sizes, int dtype, const std::array<Address, 11>& tables)
      : pool{sizes[0],
             sizes[1],
             sizes[2],
             static_cast<unike_dtype>(dtype),
             pointer<const void>(tables[0]),
             pointer<const float>(tables[1]),
             pointer<const void>(tables[2]),
             pointer<const float>(tables[3]),
             pointer<const void>(tables[4]),
             pointer<const void>(tables[5]),
             pointer<const float>(tables[6]),
             pointer<const int64_t>(tables[7]),
             pointer<const int64_t>(tables[8]),
             pointer<const int64_t>(tables[9]),
             pointer<const int64_t>(tables[10])} {}
};

}  // namespace

void bind_extra_neurons(pybind11::module_& module) {
  using pybind11::arg;
  pybind11::class_<Pool>(module, "Pool")
      .def(pybind11::init<const std::array<int64_t, 3>&, int, const std::array<Address, 11>&>(), arg("sizes"),
           arg("dtype"), arg("tables"));
  const pybind11::call_guard<ReleaseGil> release_gil;

  module.def(
      "add_extra_neurons",
      [](const Rows& x, const Rows& base, int64_t m, int64_t d, const Pool& of, int activation, const Rows& out,
         int threads) {
        with_workspace([&] { return unike_add_extra_neurons_workspace(m, d, &of.pool, threads); },
                       [&](void* workspace, int64_t bytes) {
                         return unike_add_extra_neurons(x.to_read(), base.to_read(), m, d, &of.pool,
                                                        static_cast<unike_activation>(activation), out.to_write(),
                                                        workspace, bytes, threads);
                       });
      },
      release_gil, arg("x"), arg("base"), arg("m"), arg("d"), arg("pool"), arg("activation"), arg("out"),
      arg("threads"));

  module.def(
      "add_extra_neurons_backward",
      [](const Rows& grad, const Rows& x, int64_t m, int64_t d, const Pool& of, int activation,
         const std::array<Address, 8>& out, int threads) {
        const unike_extra_gradients gradients{pointer<float>(out[0]), pointer<float>(out[1]), pointer<float>(out[2]),
                                              pointer<float>(out[3]), pointer<float>(out[4]), pointer<float>(out[5]),
                                              pointer<float>(out[6]), pointer<float>(out[7])};
        with_workspace([&] { return unike_add_extra_neurons_backward_workspace(m, d, &of.pool, threads); },
                       [&](void* workspace, int64_t bytes) {
                         return unike_add_extra_neurons_backward(grad.to_read(), x.to_read(), m, d, &of.pool,
                                                                 static_cast<unike_activation>(activation), &gradients,
                                                                 workspace, bytes, threads);
                       });
      },
      release_gil, arg("grad"), arg("x"), arg("m"), arg("d"), arg("pool"), arg("activation"), arg("out"),
      arg("threads"));
}

}  // namespace unike::python
