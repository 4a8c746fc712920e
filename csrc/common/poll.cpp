#include "common/poll.h"

#include <chrono>

#include "unike/unike.h"

namespace unike {
namespace {

using Clock = std::chrono::steady_clock;
constexpr auto kPause = std::chrono::milliseconds(50);
constexpr int kCalls = 64;  // between two looks at the clock, which takes longer than the rest

thread_local unike_poll asked = nullptr;
thread_local Clock::time_point last;
thread_local int calls = 0;

}  // namespace

void poll() {
  if (asked == nullptr || ++calls < kCalls) return;
  calls = 0;
  const Clock::time_point now = Clock::now();
  if (now - last < kPause) return;
  last = now;
  if (asked() != 0) throw Interrupted();
}

}  // namespace unike

extern "C" void unike_set_poll(unike_poll poll) { unike::asked = poll; }
