// The C ABI of the latent attention: checks, threads, and the kernel of this CPU.
#include "cpu/latent_attention.h"

#include <algorithm>
#include <vector>

#include "common/cpu_isa.h"
#include "common/parallel.h"
#include "common/status.h"

namespace unike {
namespace {

void check(const LatentProblem& p) {
  require(p.m >= 0 && p.d >= 1 && p.k >= 0, "m and k must not be negative, d at least 1");
  require(p.memory != nullptr && p.encoder != nullptr && p.blend != nullptr, "a null argument");
  const unike_memory_f32& memory = *p.memory;
  require(memory.n >= 0 && memory.heads >= 1 && memory.width >= 1, "the memory's sizes are out of range");
  require(memory.keys != memory.values || memory.width == p.d, "keys serve as values only where their width is d");
  require(p.m == 0 || (p.id_rows >= 1 && p.m % p.id_rows == 0), "the tokens cannot be split evenly among the ids");
  const auto valid = [&](int64_t id) { return -1 <= id && id < memory.n; };
  require(std::all_of(p.ids, p.ids + p.id_rows * p.k, valid), "ids must be -1 or name entries of the memory");
  const unike_blend& blend = *p.blend;
  require(blend.alpha == nullptr || blend.alphas == 1 || blend.alphas == p.m, "alpha must have 1 or m values");
  require(blend.anchor == nullptr || (blend.anchors >= 1 && p.m % blend.anchors == 0),
          "the tokens cannot be split evenly among the anchors");
}

}  // namespace
}  // namespace unike

extern "C" unike_status unike_latent_attention_f32(const float* queries, const float* inputs, int64_t inputs_stride,
                                                   int64_t m, int64_t d, const unike_memory_f32* memory,
                                                   const int64_t* ids, int64_t id_rows, int64_t k,
                                                   const unike_semantic_encoder_f32* encoder, const unike_blend* blend,
                                                   float* out, int64_t out_stride, float* alpha_out, int threads) {
  using namespace unike;
  return guarded([&] {
    const LatentProblem problem{queries, inputs, inputs_stride, m,     d,   memory,     ids,
                                id_rows, k,      encoder,       blend, out, out_stride, alpha_out};
    check(problem);
    if (m == 0) return;
    const auto run = UNIKE_PICK(latent_attention);
    const double attention = static_cast<double>(k * memory->heads) * static_cast<double>(memory->width + d);
    const double gate = blend->alpha ? 0.0 : 2.0 * static_cast<double>(encoder->r) * static_cast<double>(d);
    const int64_t groups = (m + LatentProblem::kTokens - 1) / LatentProblem::kTokens;
    const int workers = static_cast<int>(
        std::min<int64_t>(groups, useful_threads((attention + gate) * static_cast<double>(m), threads)));
    parallel_for(workers, workers, [&](int64_t part) {
      std::vector<float> scratch(problem.scratch());
      for (int64_t g = part * groups / workers; g < (part + 1) * groups / workers; ++g) {
        const int64_t start = g * LatentProblem::kTokens;
        run(problem, start, std::min(start + LatentProblem::kTokens, m), scratch.data());
      }
    });
  });
}
