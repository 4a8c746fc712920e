#include "unike/latent_attention.h"

#include <array>

#include "bindings.h"

namespace unike::python {

void bind_latent_attention(pybind11::module_& module) {
  using Address = std::uintptr_t;
  using pybind11::arg;

  module.def(
      "latent_attention_f32",
      [](Address queries, Address inputs, int64_t inputs_stride, int64_t m, int64_t d,
         const std::array<int64_t, 3>& table, Address keys, Address values, Address ids, int64_t id_rows, int64_t k,
         int64_t r, const std::array<Address, 4>& encoder, float scale, bool eq7, bool match_norm, Address alpha,
         int64_t alphas, Address anchor, int64_t anchors, Address out, Address alpha_out, int threads) {
        const unike_memory_f32 memory{table[0], table[1], table[2], pointer<const float>(keys),
                                      pointer<const float>(values)};
        const unike_semantic_encoder_f32 enc{r, pointer<const float>(encoder[0]), pointer<const float>(encoder[1]),
                                             pointer<const float>(encoder[2]), pointer<const float>(encoder[3])};
        const unike_blend blend{
            scale, eq7, match_norm, pointer<const float>(alpha), alphas, pointer<const float>(anchor), anchors};
        const pybind11::gil_scoped_release release;
        check(unike_latent_attention_f32(pointer<const float>(queries), pointer<const float>(inputs), inputs_stride, m,
                                         d, &memory, pointer<const int64_t>(ids), id_rows, k, &enc, &blend,
                                         pointer<float>(out), d, pointer<float>(alpha_out), threads));
      },
      arg("queries"), arg("inputs"), arg("inputs_stride"), arg("m"), arg("d"), arg("table"), arg("keys"), arg("values"),
      arg("ids"), arg("id_rows"), arg("k"), arg("r"), arg("encoder"), arg("scale"), arg("eq7"), arg("match_norm"),
      arg("alpha"), arg("alphas"), arg("anchor"), arg("anchors"), arg("out"), arg("alpha_out"), arg("threads"));
}

}  // namespace unike::python
