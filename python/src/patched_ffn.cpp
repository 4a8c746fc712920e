#include "unike/patched_ffn.h"

#include <array>

#include "bindings.h"

namespace unike::python {

void bind_patched_ffn(pybind11::module_& module) {
  using Address = std::uintptr_t;
  using pybind11::arg;

  module.def(
      "add_extra_neurons_f32",
      [](Address x, int64_t x_stride, Address base, int64_t base_stride, int64_t m, int64_t d,
         const std::array<int64_t, 3>& sizes, const std::array<Address, 11>& pool, int activation, Address out,
         int threads) {
        const unike_edit_pool_f32 p{sizes[0],
                                    sizes[1],
                                    sizes[2],
                                    pointer<const float>(pool[0]),
                                    pointer<const float>(pool[1]),
                                    pointer<const float>(pool[2]),
                                    pointer<const float>(pool[3]),
                                    pointer<const float>(pool[4]),
                                    pointer<const float>(pool[5]),
                                    pointer<const float>(pool[6]),
                                    pointer<const int64_t>(pool[7]),
                                    pointer<const int64_t>(pool[8]),
                                    pointer<const int64_t>(pool[9]),
                                    pointer<const int64_t>(pool[10])};
        const pybind11::gil_scoped_release release;
        check(unike_add_extra_neurons_f32(pointer<const float>(x), x_stride, pointer<const float>(base), base_stride, m,
                                          d, &p, static_cast<unike_activation>(activation), pointer<float>(out), d,
                                          threads));
      },
      arg("x"), arg("x_stride"), arg("base"), arg("base_stride"), arg("m"), arg("d"), arg("sizes"), arg("pool"),
      arg("activation"), arg("out"), arg("threads"));
}

}  // namespace unike::python
