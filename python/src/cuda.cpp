#include "unike/cuda.h"

#include "bindings.h"

namespace unike::python {

void bind_cuda(pybind11::module_& module) {
  using Address = std::uintptr_t;
  using pybind11::arg;

  module.def("cuda_devices", [] {
    int count = 0;
    check(unike_cuda_devices(&count));
    return count;
  });

  module.def(
      "cuda_cosine_topk_workspace",
      [](const Keys& keys, int64_t m, int64_t k, int device) {
        return unike_cuda_cosine_topk_workspace(&keys.table, m, k, device);
      },
      arg("keys"), arg("m"), arg("k"), arg("device"));

  module.def(
      "cuda_cosine_topk",
      [](const Keys& keys, const Rows& queries, int64_t m, int64_t k, Address ranges, Address scores, Address ids,
         Address values, int64_t value_bytes, Address gathered, Address state, Address workspace,
         int64_t workspace_bytes, int device, Address stream) {
        check(unike_cuda_cosine_topk(&keys.table, queries.to_read(), m, k, pointer<const int64_t>(ranges),
                                     pointer<float>(scores), pointer<int64_t>(ids), pointer<const void>(values),
                                     value_bytes, pointer<void>(gathered), pointer<void>(state),
                                     pointer<void>(workspace), workspace_bytes, device, pointer<void>(stream)));
      },
      arg("keys"), arg("queries"), arg("m"), arg("k"), arg("ranges"), arg("scores"), arg("ids"), arg("values"),
      arg("value_bytes"), arg("gathered"), arg("state"), arg("workspace"), arg("workspace_bytes"), arg("device"),
      arg("stream"));
}

}  // namespace unike::python
