// Asks the caller now and then whether a long call shall stop; see unike_set_poll.
#pragma once

#include <stdexcept>

namespace unike {

struct Interrupted : std::runtime_error {
  Interrupted() : std::runtime_error("the caller asked to stop") {}
};

// To be called often while a function works: throws Interrupted if this thread's unike_poll says so. It is asked about 20
// times a second, and a thread that has none, such as one of OpenMP's, asks nobody.
void poll();

}  // namespace unike
