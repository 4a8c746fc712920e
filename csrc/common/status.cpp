#include "common/status.h"

#include <cstdio>

namespace unike {
namespace {

thread_local char last_error[256] = "";

}  // namespace

unike_status fail(unike_status status, const char* message) noexcept {
  std::snprintf(last_error, sizeof last_error, "%s", message);
  return status;
}

}  // namespace unike

extern "C" const char* unike_version(void) { return UNIKE_VERSION; }

extern "C" const char* unike_last_error(void) { return unike::last_error; }
