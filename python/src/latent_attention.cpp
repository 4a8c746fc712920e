#include "unike/latent_attention.h"

#include "memory.h"

namespace unike::python {

void bind_latent_attention(pybind11::module_& module) {
  using Address = std::uintptr_t;
  using pybind11::arg;
  pybind11::class_<Memory>(module, "Memory")
      .def(pybind11::init<const std::array<int64_t, 4>&, const std::array<int, 2>&, const std::array<Address, 7>&>(),
           arg("sizes"), arg("dtypes"), arg("tables"));
  pybind11::class_<Tokens>(module, "Tokens")
      .def(pybind11::init<int64_t, int64_t, const Rows&, const Rows&, const std::array<int64_t, 3>&, float, bool, bool,
                          const std::array<int64_t, 4>&>(),
           arg("m"), arg("d"), arg("queries"), arg("inputs"), arg("ids"), arg("scale"), arg("eq7"), arg("match_norm"),
           arg("gate"));
  const pybind11::call_guard<ReleaseGil> release_gil;

  module.def(
      "latent_attention",
      [](const Memory& of, const Tokens& tokens, const Rows& out, Address alpha, int threads) {
        with_workspace([&] { return unike_latent_attention_workspace(&tokens.in, &of.memory, &of.encoder, threads); },
                       [&](void* workspace, int64_t bytes) {
                         return unike_latent_attention(&tokens.in, &of.memory, &of.encoder, &tokens.blend,
                                                       out.to_write(), pointer<float>(alpha), workspace, bytes,
                                                       threads);
                       });
      },
      release_gil, arg("memory"), arg("tokens"), arg("out"), arg("alpha"), arg("threads"));

  module.def(
      "latent_attention_backward",
      [](const Memory& of, const Tokens& tokens, const Rows& grad, Address grad_alpha, Address queries, Address inputs,
         Address given, Address anchor, int threads) {
        with_workspace(
            [&] { return unike_latent_attention_backward_workspace(&tokens.in, &of.memory, &of.encoder, threads); },
            [&](void* workspace, int64_t bytes) {
              return unike_latent_attention_backward(&tokens.in, &of.memory, &of.encoder, &tokens.blend, grad.to_read(),
                                                     pointer<const float>(grad_alpha), pointer<float>(queries),
                                                     pointer<float>(inputs), pointer<float>(given),
                                                     pointer<float>(anchor), workspace, bytes, threads);
            });
      },
      release_gil, arg("memory"), arg("tokens"), arg("grad"), arg("grad_alpha"), arg("queries"), arg("inputs"),
      arg("given"), arg("anchor"), arg("threads"));
}

}  // namespace unike::python
