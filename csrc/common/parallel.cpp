#include "common/parallel.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#include "common/poll.h"

namespace unike {
namespace {

// The threads of OpenMP do not live on in the child of a fork, and libgomp would wait for them for ever.
std::atomic<bool> forked{false};
[[maybe_unused]] const int at_fork = pthread_atfork(nullptr, nullptr, [] { forked = true; });

void on_threads_of_this_call(int threads, auto&& work) {
  std::vector<std::jthread> others;
  try {
    for (int thread = 1; thread < threads; ++thread) others.emplace_back(work, thread);
  } catch (const std::system_error&) {
    // The system gives no more threads: those that run share the tasks.
  }
  work(0);
}  // joins

}  // namespace

void run_tasks(int64_t tasks, int threads, Task run, const void* context) {
  if (threads <= 1 || tasks <= 1) {
    for (int64_t task = 0; task < tasks; ++task) {
      poll();
      run(context, task, 0);
    }
    return;
  }
  std::atomic<int64_t> next{0};
  std::mutex mutex;
  std::exception_ptr error;
  const auto work = [&](int thread) {
    try {
      for (int64_t task; (task = next.fetch_add(1)) < tasks;) {
        poll();
        run(context, task, thread);
      }
    } catch (...) {
      next = tasks;
      const std::lock_guard lock(mutex);
      if (!error) error = std::current_exception();
    }
  };
#ifdef _OPENMP
  if (!forked) {
    std::atomic<int> thread{0};
    // The whole team even for fewer tasks: see useful_threads.
#pragma omp parallel num_threads(threads)
    work(thread.fetch_add(1));
  } else
#endif
    on_threads_of_this_call(static_cast<int>(std::min<int64_t>(threads, tasks)), work);
  if (error) std::rethrow_exception(error);
}

}  // namespace unike
