// Runs independent tasks on a few threads that live for one call.
#pragma once

#include <cstdint>
#include <functional>

namespace unike {

// How many threads are worth starting for `work` multiply-adds: one for each 2^19 (about 0.1 ms), at most `threads`.
int useful_threads(double work, int threads);

// Calls task(0), ..., task(tasks - 1), each once and in any order, on the calling thread and up to threads - 1 others.
// Rethrows the first exception of a task, after all threads have ended.
void parallel_for(int64_t tasks, int threads, const std::function<void(int64_t)>& task);

}  // namespace unike
