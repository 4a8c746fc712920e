#include <string>
#include <vector>

#include "bindings.h"

// Without the GIL, where Python can do so: what a call changes is its thread's own (workspace, poll, last error) or
// atomic (the instruction set in use), and Keys stay as they were made.
PYBIND11_MODULE(_C, module, pybind11::mod_gil_not_used()) {
  module.doc() = "The native core. Import it only from unike_kernels._native, which checks what is passed.";
  module.def("version", &unike_version);
  module.def("cpu_isa", &unike_cpu_isa);
  module.def("available_isas", [] {
    std::vector<std::string> names;
    for (int i = 0; const char* name = unike_available_isa(i); ++i) names.emplace_back(name);
    return names;
  });
  module.def("set_isa", [](const char* name) { unike::python::check(unike_set_isa(name)); }, pybind11::arg("name"));
  unike::python::bind_cosine_topk(module);
  unike::python::bind_cuda(module);
  unike::python::bind_extra_neurons(module);
  unike::python::bind_latent_attention(module);
  unike::python::bind_machine(module);
  unike::python::bind_memory_attention(module);
  unike::python::bind_prompt_key(module);
}
