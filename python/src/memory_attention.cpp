#include "unike/memory_attention.h"

#include "memory.h"

namespace unike::python {

void bind_memory_attention(pybind11::module_& module) {
  using Address = std::uintptr_t;
  using pybind11::arg;
  const pybind11::call_guard<ReleaseGil> release_gil;

  module.def(
      "memory_attention",
      [](const Keys& index, const Memory& of, const Rows& hidden, Address ranges, const Tokens& tokens, const Rows& out,
         Address alpha, Address ids, int threads) {
        with_workspace(
            [&] {
              return unike_memory_attention_workspace(&index.table, &tokens.in, &of.memory, &of.encoder, threads);
            },
            [&](void* workspace, int64_t bytes) {
              return unike_memory_attention(&index.table, hidden.to_read(), pointer<const int64_t>(ranges), &tokens.in,
                                            &of.memory, &of.encoder, &tokens.blend, out.to_write(),
                                            pointer<float>(alpha), pointer<int64_t>(ids), workspace, bytes, threads);
            });
      },
      release_gil, arg("index"), arg("memory"), arg("hidden"), arg("ranges"), arg("tokens"), arg("out"), arg("alpha"),
      arg("ids"), arg("threads"));
}

}  // namespace unike::python
