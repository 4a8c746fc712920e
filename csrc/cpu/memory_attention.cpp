// Retrieval and latent attention in one call: the first gives the second its ids, in a workspace that they share.
#include "unike/memory_attention.h"

#include <algorithm>

#include "common/checked.h"
#include "common/status.h"
#include "common/workspace.h"

namespace unike {
namespace {

// What is searched for: no more entries than there are. `in` with that k, and ids to come.
unike_latent_inputs retrieving(const unike_latent_inputs& in, const unike_memory& memory) {
  check_size("m", in.m, 0);
  check_size("k", in.k, 0);
  check_size("memory.n", memory.n, 0);
  unike_latent_inputs found = in;
  found.k = std::min(in.k, memory.n);
  found.ids = nullptr;
  found.id_rows = in.m;
  return found;
}

}  // namespace
}  // namespace unike

extern "C" int64_t unike_memory_attention_workspace(const unike_keys* index, const unike_latent_inputs* in,
                                                    const unike_memory* memory, const unike_semantic_encoder* encoder,
                                                    int threads) {
  using namespace unike;
  return guarded_bytes([&] {
    require(index != nullptr && in != nullptr && memory != nullptr && encoder != nullptr, "a null argument");
    const unike_latent_inputs found = retrieving(*in, *memory);
    Workspace workspace;
    workspace.take<float>(times(found.m, found.k));  // scores, which nobody wants
    workspace.take<int64_t>(times(found.m, found.k));
    const int64_t search = unike_cosine_topk_workspace(index, found.m, found.k, threads);
    const int64_t attention = unike_latent_attention_workspace(&found, memory, encoder, threads);
    require(search > 0 && attention > 0, unike_last_error());
    return workspace.bytes() + std::max(search, attention);  // one after the other, the two share it
  });
}

extern "C" unike_status unike_memory_attention(const unike_keys* index, unike_rows hidden, const int64_t* ranges,
                                               const unike_latent_inputs* in, const unike_memory* memory,
                                               const unike_semantic_encoder* encoder, const unike_blend* blend,
                                               unike_rows_out out, float* alpha_out, int64_t* ids, void* workspace,
                                               int64_t workspace_bytes, int threads) {
  using namespace unike;
  unike_status status = UNIKE_OK;
  const unike_status checked = guarded([&] {
    require(index != nullptr && in != nullptr && memory != nullptr, "a null argument");
    require(index->n == memory->n, "index and memory must have the same entries");
    unike_latent_inputs found = retrieving(*in, *memory);
    const int64_t wanted = in->k, k = found.k;
    if (ids != nullptr) check_array("ids", ids, times(found.m, wanted));
    float* scores = nullptr;
    int64_t* own_ids = nullptr;
    Workspace::Rest rest{nullptr, 0};
    if (found.m > 0) {
      Workspace pieces(workspace, workspace_bytes);
      scores = pieces.take<float>(times(found.m, k));
      own_ids = pieces.take<int64_t>(times(found.m, k));
      rest = pieces.rest();
    }
    const auto [room, bytes] = rest;
    status = unike_cosine_topk(index, hidden, found.m, k, ranges, scores, own_ids, room, bytes, threads);
    if (status != UNIKE_OK) return;
    found.ids = own_ids;
    status = unike_latent_attention(&found, memory, encoder, blend, out, alpha_out, room, bytes, threads);
    if (status != UNIKE_OK || ids == nullptr) return;
    for (int64_t t = 0; t < found.m; ++t) {
      std::fill_n(std::copy_n(own_ids + t * k, k, ids + t * wanted), wanted - k, -1);
    }
  });
  return checked == UNIKE_OK ? status : checked;
}
