#include "bindings.h"

PYBIND11_MODULE(_C, module) {
  module.doc() = "The native core. Import it only from unike_kernels._native, which checks what is passed.";
  module.def("version", &unike_version);
  module.def("cpu_isa", &unike_cpu_isa);
  unike::python::bind_cosine_topk(module);
  unike::python::bind_cuda(module);
  unike::python::bind_latent_attention(module);
  unike::python::bind_machine(module);
  unike::python::bind_patched_ffn(module);
}
