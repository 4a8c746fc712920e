// What latent attention and memory attention are called with.
#pragma once

#include <array>

#include "bindings.h"
#include "unike/latent_attention.h"

namespace unike::python {

// The tables of a memory and its encoder, which stay where they are from call to call.
struct Memory {
  unike_memory memory;
  unike_semantic_encoder encoder;

  // sizes: (n, heads, width, r); dtypes: of keys and values, and of the encoder's weights; tables: the addresses of
  // keys, values, projected, w1, b1, w2, b2.
  Memory(const std::array<int64_t, 4>& sizes, const std::array<int, 2>& dtypes,
         const std::array<std::uintptr_t, 7>& tables)
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

}  // namespace unike::python
