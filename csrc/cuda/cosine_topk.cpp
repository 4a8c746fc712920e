#include "common/checked.h"
#include "common/status.h"
#include "cuda/plan.h"
#include "unike/cuda.h"

#ifdef UNIKE_WITH_CUDA
#include <cuda_runtime_api.h>

#include <algorithm>
#include <array>
#include <mutex>
#include <string>

#include "cuda/kernels.h"

namespace unike::cuda {
namespace {

static_assert(sizeof(Counters) <= UNIKE_CUDA_STATE_BYTES);

void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // it is told here, and is not for a later call to find
  const bool none = error == cudaErrorInsufficientDriver || error == cudaErrorNoDevice;
  throw std::runtime_error(std::string(none ? "no CUDA device: " : "CUDA: ") + cudaGetErrorString(error));
}

// The current device for the length of a call.
class Current {
 public:
  explicit Current(int device) {
    check(cudaGetDevice(&before_));
    if (device != before_) check(cudaSetDevice(device));
  }
  ~Current() { cudaSetDevice(before_); }
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;

 private:
  int before_ = 0;
};

constexpr std::array kKernels = {kernel_f32, kernel_f16, kernel_bf16, kernel_i8};  // by scan
constexpr int kShared[] = {Shape<false>::kSharedBytes, Shape<true>::kSharedBytes};

// Asks the current device how many blocks it holds, and lets the kernels have their shared memory.
Device look_at(int device) {
  Device found{0, Shape<false>::kResident};
  check(cudaDeviceGetAttribute(&found.multiprocessors, cudaDevAttrMultiProcessorCount, device));
  for (const auto kernel : kKernels) {
    for (const bool many : {false, true}) {
      for (const bool ranged : {false, true}) {
        int blocks = 0;
        const void* const function = kernel(many, ranged);
        check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared[many]));
        check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, function, kThreads, kShared[many]));
        require(blocks > 0, "the kernels do not fit on this device");
        if (!many) found.blocks = std::min(found.blocks, blocks);
      }
    }
  }
  return found;
}

// What is known of the current device.
const Device& device_of(int device) {
  constexpr int kMost = 64;
  static std::array<std::once_flag, kMost> known;
  static std::array<Device, kMost> devices;
  require(0 <= device && device < kMost, "device is out of range");
  std::call_once(known[device], [=] { devices[device] = look_at(device); });
  return devices[device];
}

void check_arguments(const unike_keys& keys, int64_t m, int64_t k) {
  check_size("keys.n", keys.n, 0);
  check_size("keys.d", keys.d, 1);
  check_size("keys.stride", keys.stride, 0);
  check_size("m", m, 0);
  check_size("k", k, 0);
  times(keys.n, std::max(keys.d, keys.stride), sizeof(float));
  times(m, std::max(keys.d, k), sizeof(int64_t));
  require(keys.d <= (1 << 20) && k <= (1 << 20), "d and k must be at most 2^20");
  require(UNIKE_SCAN_F32 <= keys.scan && keys.scan <= UNIKE_SCAN_I8, "scan is unknown");
  const bool packed = keys.scan != UNIKE_SCAN_F32;
  require(packed || keys.rows != nullptr || keys.n == 0, "rows must not be null without codes");
  require(!packed || keys.n == 0 || (keys.codes != nullptr && keys.bounds != nullptr && keys.direction != nullptr),
          "codes, bounds and direction of packed keys must not be null");
  const auto scanned = reinterpret_cast<uintptr_t>(packed ? keys.codes : keys.rows);
  require(scanned % 16 == 0 && (packed || keys.stride % 4 == 0), "keys must be aligned to 16 bytes");
}

}  // namespace
}  // namespace unike::cuda

extern "C" unike_status unike_cuda_devices(int* count) {
  return unike::guarded([&] {
    unike::check_array("count", count, 1);
    unike::cuda::check(cudaGetDeviceCount(count));
  });
}

extern "C" int64_t unike_cuda_cosine_topk_workspace(const unike_keys* keys, int64_t m, int64_t k, int device) {
  using namespace unike;
  return guarded_bytes([&] {
    require(keys != nullptr, "keys must not be null");
    cuda::check_arguments(*keys, m, k);
    const cuda::Current current(device);
    const cuda::Device& found = cuda::device_of(device);
    Workspace workspace;
    cuda::plan(cuda::scanned_by(*keys, m), cuda::queries_of_launch(*keys, m, k, found), k, found, workspace);
    return workspace.bytes();
  });
}

extern "C" unike_status unike_cuda_cosine_topk(const unike_keys* keys, unike_rows queries, int64_t m, int64_t k,
                                               const int64_t* ranges, float* scores, int64_t* ids, const void* values,
                                               int64_t value_bytes, void* gathered, void* state, void* workspace,
                                               int64_t workspace_bytes, int device, void* stream) {
  using namespace unike;
  return guarded([&] {
    require(keys != nullptr, "keys must not be null");
    cuda::check_arguments(*keys, m, k);
    check_rows("queries", queries, m, keys->d);
    check_array("scores", scores, m * k);
    check_array("ids", ids, m * k);
    if (ranges != nullptr) check_array("ranges", ranges, 2 * m);
    if (values != nullptr) {
      check_size("value_bytes", value_bytes, 0);
      times(keys->n, value_bytes);
      check_memory("gathered", gathered, times(m, k, value_bytes), 1);
    }
    if (m == 0 || k == 0) return;
    check_memory("state", state, 1, UNIKE_CUDA_STATE_BYTES);
    const cuda::Current current(device);
    const cuda::Device& found = cuda::device_of(device);
    const unike_keys scanned = cuda::scanned_by(*keys, m);
    const int64_t most = cuda::queries_of_launch(scanned, m, k, found), size = size_of(queries.dtype);
    for (int64_t first = 0; first < m; first += most) {
      Workspace pieces(workspace, workspace_bytes);
      cuda::Launch launch = cuda::plan(scanned, std::min(most, m - first), k, found, pieces);
      cuda::Search& search = launch.search;
      search.queries = queries;
      search.queries.data = static_cast<const char*>(queries.data) + first * queries.stride * size;
      search.ranges = ranges == nullptr ? nullptr : ranges + 2 * first;
      search.scores = scores + first * k;
      search.ids = ids + first * k;
      search.values = static_cast<const char*>(values);
      search.value_bytes = value_bytes;
      search.gathered = static_cast<char*>(gathered) + (values == nullptr ? 0 : first * k * value_bytes);
      search.counters = static_cast<cuda::Counters*>(state);
      void* arguments[] = {&search};
      const void* const kernel = cuda::kKernels[scanned.scan](launch.many, ranges != nullptr);
      cuda::check(cudaLaunchKernel(kernel, dim3(launch.blocks), dim3(cuda::kThreads), arguments, launch.shared_bytes,
                                   static_cast<cudaStream_t>(stream)));
    }
  });
}

#else

namespace {

constexpr const char* kAbsent = "no CUDA device: this build has no CUDA kernels";

}  // namespace

extern "C" unike_status unike_cuda_devices(int*) { return unike::fail(UNIKE_INTERNAL_ERROR, kAbsent); }

extern "C" int64_t unike_cuda_cosine_topk_workspace(const unike_keys*, int64_t, int64_t, int) {
  unike::fail(UNIKE_INTERNAL_ERROR, kAbsent);
  return 0;
}

extern "C" unike_status unike_cuda_cosine_topk(const unike_keys*, unike_rows, int64_t, int64_t, const int64_t*, float*,
                                               int64_t*, const void*, int64_t, void*, void*, void*, int64_t, int,
                                               void*) {
  return unike::fail(UNIKE_INTERNAL_ERROR, kAbsent);
}

#endif
