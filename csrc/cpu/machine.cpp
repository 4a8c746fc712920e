#include "unike/machine.h"

#include <algorithm>
#include <atomic>

#include "common/checked.h"
#include "common/parallel.h"
#include "common/status.h"
#include "cpu/isa.h"

extern "C" unike_status unike_read(const void* data, int64_t bytes, int threads) {
  using namespace unike;
  return guarded([&] {
    check_size("bytes", bytes, 0);
    check_memory("data", data, bytes, 1);
    constexpr int64_t kPart = 1 << 16;
    const auto read = scan_kernels().read;
    std::atomic<uint64_t> sum{0};  // so that nothing is left out
    parallel_for((bytes + kPart - 1) / kPart, threads_of_call(threads), [&](int64_t part, int) {
      const auto* first = static_cast<const char*>(data) + part * kPart;
      sum.fetch_xor(read(first, std::min(kPart, bytes - part * kPart)), std::memory_order_relaxed);
    });
  });
}

extern "C" unike_status unike_multiply_add(unike_scan scan, int64_t rounds, int threads, double* count) {
  using namespace unike;
  return guarded([&] {
    require(UNIKE_SCAN_F32 <= scan && scan <= UNIKE_SCAN_I8, "scan is unknown");
    check_size("rounds", rounds, 0);
    check_array("count", count, 1);
    threads = threads_of_call(threads);
    const auto run = scan_kernels().multiply_add[scan];
    std::atomic<int64_t> of_a_thread{0};
    parallel_for(threads, threads, [&](int64_t, int) { of_a_thread = run(rounds); });
    *count = static_cast<double>(of_a_thread) * threads;
  });
}
