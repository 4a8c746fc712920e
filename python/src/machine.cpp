#include "unike/machine.h"

#include "bindings.h"

namespace unike::python {

void bind_machine(pybind11::module_& module) {
  using pybind11::arg;
  const pybind11::call_guard<ReleaseGil> release_gil;

  module.def(
      "read",
      [](std::uintptr_t data, int64_t bytes, int threads) {
        check(unike_read(pointer<const void>(data), bytes, threads));
      },
      release_gil, arg("data"), arg("bytes"), arg("threads"));

  module.def(
      "multiply_add",
      [](int scan, int64_t rounds, int threads) {
        double count = 0;
        check(unike_multiply_add(static_cast<unike_scan>(scan), rounds, threads, &count));
        return count;
      },
      release_gil, arg("scan"), arg("rounds"), arg("threads"));
}

}  // namespace unike::python
