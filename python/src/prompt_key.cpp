#include "unike/prompt_key.h"

#include <array>

#include "bindings.h"

namespace unike::python {
namespace {

using Address = std::uintptr_t;

// An encoder and what the tokens of its model spell, which stay where they are from call to call.
struct PromptEncoder {
  unike_prompt_encoder encoder;
  unike_vocabulary vocabulary;

  // sizes: (e, blocks, hidden, heads, width, tokens of the vocabulary); tables: the addresses of what the two structs have,
  // in their order.
  PromptEncoder(const std::array<int64_t, 6>& sizes, const std::array<Address, 12>& tables)
      : encoder{sizes[0],
                sizes[1],
                sizes[2],
                sizes[3],
                sizes[4],
                pointer<const float>(tables[0]),
                pointer<const float>(tables[1]),
                pointer<const float>(tables[2]),
                pointer<const float>(tables[3]),
                pointer<const float>(tables[4]),
                pointer<const float>(tables[5]),
                pointer<const float>(tables[6]),
                pointer<const float>(tables[7]),
                pointer<const float>(tables[8]),
                pointer<const float>(tables[9])},
        vocabulary{sizes[5], pointer<const int64_t>(tables[10]), pointer<const int64_t>(tables[11])} {}
};

}  // namespace

void bind_prompt_key(pybind11::module_& module) {
  using pybind11::arg;
  pybind11::class_<PromptEncoder>(module, "PromptEncoder")
      .def(pybind11::init<const std::array<int64_t, 6>&, const std::array<Address, 12>&>(), arg("sizes"),
           arg("tables"));
  module.def(
      "prompt_keys",
      [](const PromptEncoder& of, int64_t m, int64_t tokens, Address ids, const Rows& embeddings, Address within,
         Address keys, int threads) {
        with_workspace([&] { return unike_prompt_keys_workspace(&of.encoder, tokens, threads); },
                       [&](void* workspace, int64_t bytes) {
                         return unike_prompt_keys(&of.encoder, &of.vocabulary, m, tokens, pointer<const int64_t>(ids),
                                                  embeddings.to_read(), pointer<const uint8_t>(within),
                                                  pointer<float>(keys), workspace, bytes, threads);
                       });
      },
      pybind11::call_guard<ReleaseGil>(), arg("encoder"), arg("m"), arg("tokens"), arg("ids"), arg("embeddings"),
      arg("within"), arg("keys"), arg("threads"));
}

}  // namespace unike::python
