#include "common/parallel.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace unike {

int useful_threads(double work, int threads) {
  return static_cast<int>(std::clamp(work / (1 << 19), 1.0, std::max(1.0, static_cast<double>(threads))));
}

void parallel_for(int64_t tasks, int threads, const std::function<void(int64_t)>& task) {
  std::atomic<int64_t> next{0};
  std::mutex mutex;
  std::exception_ptr error;
  const auto work = [&] {
    try {
      for (int64_t i; (i = next.fetch_add(1)) < tasks;) task(i);
    } catch (...) {
      next = tasks;
      const std::lock_guard lock(mutex);
      if (!error) error = std::current_exception();
    }
  };
  {
    std::vector<std::jthread> others;
    const int64_t wanted = std::min<int64_t>(threads, tasks) - 1;
    try {
      for (int64_t i = 0; i < wanted; ++i) others.emplace_back(work);
    } catch (const std::system_error&) {
      // The system gives no more threads: those that run share the tasks.
    }
    work();
  }  // joins
  if (error) std::rethrow_exception(error);
}

}  // namespace unike
