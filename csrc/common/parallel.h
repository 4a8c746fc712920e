// Runs independent tasks on the threads of OpenMP. In a process with torch these are torch's own: both load libgomp.so.1
// once, so no second pool competes for the cores, and a thread that has just run an operator of torch still spins.
#pragma once

#include <algorithm>
#include <cstdint>

namespace unike {

// The threads that a call uses where it was asked for so many.
inline int threads_of_call(int asked) { return std::clamp(asked, 1, 1024); }

// How many threads are worth using for `work` multiply-adds: all, or one. OpenMP ends and starts threads wherever the
// size of its team changes.
inline int useful_threads(double work, int threads) { return work < (1 << 18) || threads < 1 ? 1 : threads; }

using Task = void (*)(const void* context, int64_t task, int thread);
void run_tasks(int64_t tasks, int threads, Task run, const void* context);

// Calls body(task, thread) for task = 0, ..., tasks - 1, each once and in any order; 0 <= thread < threads names who does
// it, so that each may have scratch of its own. Rethrows the first exception of a task, after all have stopped.
template <typename Body>
void parallel_for(int64_t tasks, int threads, const Body& body) {
  const auto call = [](const void* b, int64_t task, int thread) { (*static_cast<const Body*>(b))(task, thread); };
  run_tasks(tasks, threads, call, &body);
}

}  // namespace unike
