#include "unike/latent_attention.h"

#include <array>

#include "bindings.h"

namespace unike::python {
namespace {

using Address = std::uintptr_t;

// The arguments that forward, backward and the whole memory attention share, as the core takes them.
struct Arguments {
  unike_latent_inputs in;
  unike_memory memory;
  unike_semantic_encoder encoder;
  unike_blend blend;

  // sizes: (m, d, id_rows, k, n, heads, width, r); tables: addresses of keys, values, projected, w1, b1, w2, b2;
  // dtypes: of the memory and of the encoder's weights; gate: (alpha, alphas, anchor, anchors).
  Arguments(const std::array<int64_t, 8>& sizes, const Rows& queries, const Rows& inputs, Address ids,
            const std::array<Address, 7>& tables, const std::array<int, 2>& dtypes, float scale, bool eq7,
            bool match_norm, const std::array<Address, 4>& gate)
      : in{sizes[0], sizes[1], queries.to_read(), inputs.to_read(), pointer<const int64_t>(ids), sizes[2], sizes[3]},
        memory{sizes[4],
               sizes[5],
               sizes[6],
               static_cast<unike_dtype>(dtypes[0]),
               pointer<const void>(tables[0]),
               pointer<const void>(tables[1]),
               pointer<const float>(tables[2])},
        encoder{sizes[7],
                static_cast<unike_dtype>(dtypes[1]),
                pointer<const void>(tables[3]),
                pointer<const float>(tables[4]),
                pointer<const void>(tables[5]),
                pointer<const float>(tables[6])},
        blend{scale,
              eq7,
              match_norm,
              pointer<const float>(gate[0]),
              static_cast<int64_t>(gate[1]),
              pointer<const float>(gate[2]),
              static_cast<int64_t>(gate[3])} {}
};

}  // namespace

void bind_latent_attention(pybind11::module_& module) {
  using pybind11::arg;
  pybind11::class_<Arguments>(module, "LatentArguments")
      .def(pybind11::init<const std::array<int64_t, 8>&, const Rows&, const Rows&, Address,
                          const std::array<Address, 7>&, const std::array<int, 2>&, float, bool, bool,
                          const std::array<Address, 4>&>(),
           arg("sizes"), arg("queries"), arg("inputs"), arg("ids"), arg("tables"), arg("dtypes"), arg("scale"),
           arg("eq7"), arg("match_norm"), arg("gate"));
  const pybind11::call_guard<pybind11::gil_scoped_release> release_gil;

  module.def(
      "latent_attention",
      [](const Arguments& a, const Rows& out, Address alpha, int threads) {
        const WorkspaceOf workspace(unike_latent_attention_workspace(&a.in, &a.memory, &a.encoder, threads));
        check(unike_latent_attention(&a.in, &a.memory, &a.encoder, &a.blend, out.to_write(), pointer<float>(alpha),
                                     workspace.data(), workspace.bytes(), threads));
      },
      release_gil, arg("arguments"), arg("out"), arg("alpha"), arg("threads"));

  module.def(
      "latent_attention_backward",
      [](const Arguments& a, const Rows& grad, Address grad_alpha, Address queries, Address inputs, Address given,
         Address anchor, int threads) {
        const WorkspaceOf workspace(unike_latent_attention_backward_workspace(&a.in, &a.memory, &a.encoder, threads));
        check(unike_latent_attention_backward(&a.in, &a.memory, &a.encoder, &a.blend, grad.to_read(),
                                              pointer<const float>(grad_alpha), pointer<float>(queries),
                                              pointer<float>(inputs), pointer<float>(given), pointer<float>(anchor),
                                              workspace.data(), workspace.bytes(), threads));
      },
      release_gil, arg("arguments"), arg("grad"), arg("grad_alpha"), arg("queries"), arg("inputs"), arg("given"),
      arg("anchor"), arg("threads"));

  module.def(
      "memory_attention",
      [](const Keys& index, const Rows& hidden, Address ranges, const Arguments& a, const Rows& out, Address alpha,
         Address ids, int threads) {
        const unike_keys keys = index.table();
        const WorkspaceOf workspace(unike_memory_attention_workspace(&keys, &a.in, &a.memory, &a.encoder, threads));
        check(unike_memory_attention(&keys, hidden.to_read(), pointer<const int64_t>(ranges), &a.in, &a.memory,
                                     &a.encoder, &a.blend, out.to_write(), pointer<float>(alpha), pointer<int64_t>(ids),
                                     workspace.data(), workspace.bytes(), threads));
      },
      release_gil, arg("index"), arg("hidden"), arg("ranges"), arg("arguments"), arg("out"), arg("alpha"), arg("ids"),
      arg("threads"));
}

}  // namespace unike::python
