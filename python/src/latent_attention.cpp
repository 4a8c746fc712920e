#include "unike/latent_attention.h"

#include <array>

#include "bindings.h"

namespace unike::python {
namespace {

using Address = std::uintptr_t;

// The tables of a memory and its encoder, which stay where they are from call to call.
struct Memory {
  unike_memory memory;
  unike_semantic_encoder encoder;

  // sizes: (n, heads, width, r); dtypes: of keys and values, and of the encoder's weights; tables: the addresses of keys,
  // values, projected, w1, b1, w2, b2.
  Memory(const std::array<int64_t, 4>& sizes, const std::array<int, 2>& dtypes, const std::array<Address, 7>& tables)
      : memory{sizes[0],
               sizes[1],
               sizes[2],
               static_cast<unike_dtype>(dtypes[0]),
               pointer<const void>(tables[0]),
               pointer<const void>(tables[1]),
               pointer<const float>(tables[2])},
        encoder{sizes[3],
                static_cast<unike_dtype>(dtypes[1]),
                pointer<const void>(tables[3]),
                pointer<const float>(tables[4]),
                pointer<const void>(tables[5]),
                pointer<const float>(tables[6])} {}
};

// The tokens of a call and what is done to them. ids: (address, rows, k); gate: (alpha, alphas, anchor, anchors).
struct Tokens {
  unike_latent_inputs in;
  unike_blend blend;

  Tokens(int64_t m, int64_t d, const Rows& queries, const Rows& inputs, const std::array<int64_t, 3>& ids, float scale,
         bool eq7, bool match_norm, const std::array<int64_t, 4>& gate)
      : in{m, d, queries.to_read(), inputs.to_read(), pointer<const int64_t>(ids[0]), ids[1], ids[2]},
        blend{scale, eq7, match_norm, pointer<const float>(gate[0]), gate[1], pointer<const float>(gate[2]), gate[3]} {}
};

}  // namespace

void bind_latent_attention(pybind11::module_& module) {
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
        const WorkspaceOf workspace(unike_latent_attention_workspace(&tokens.in, &of.memory, &of.encoder, threads));
        check(unike_latent_attention(&tokens.in, &of.memory, &of.encoder, &tokens.blend, out.to_write(),
                                     pointer<float>(alpha), workspace.data(), workspace.bytes(), threads));
      },
      release_gil, arg("memory"), arg("tokens"), arg("out"), arg("alpha"), arg("threads"));

  module.def(
      "latent_attention_backward",
      [](const Memory& of, const Tokens& tokens, const Rows& grad, Address grad_alpha, Address queries, Address inputs,
         Address given, Address anchor, int threads) {
        const WorkspaceOf workspace(
            unike_latent_attention_backward_workspace(&tokens.in, &of.memory, &of.encoder, threads));
        check(unike_latent_attention_backward(&tokens.in, &of.memory, &of.encoder, &tokens.blend, grad.to_read(),
                                              pointer<const float>(grad_alpha), pointer<float>(queries),
                                              pointer<float>(inputs), pointer<float>(given), pointer<float>(anchor),
                                              workspace.data(), workspace.bytes(), threads));
      },
      release_gil, arg("memory"), arg("tokens"), arg("grad"), arg("grad_alpha"), arg("queries"), arg("inputs"),
      arg("given"), arg("anchor"), arg("threads"));

  module.def(
      "memory_attention",
      [](const Keys& index, const Memory& of, const Rows& hidden, Address ranges, const Tokens& tokens, const Rows& out,
         Address alpha, Address ids, int threads) {
        const WorkspaceOf workspace(
            unike_memory_attention_workspace(&index.table, &tokens.in, &of.memory, &of.encoder, threads));
        check(unike_memory_attention(&index.table, hidden.to_read(), pointer<const int64_t>(ranges), &tokens.in,
                                     &of.memory, &of.encoder, &tokens.blend, out.to_write(), pointer<float>(alpha),
                                     pointer<int64_t>(ids), workspace.data(), workspace.bytes(), threads));
      },
      release_gil, arg("index"), arg("memory"), arg("hidden"), arg("ranges"), arg("tokens"), arg("out"), arg("alpha"),
      arg("ids"), arg("threads"));
}

}  // namespace unike::python
