// Turns C++ exceptions into the status codes of the C ABI.
#pragma once

#include <exception>
#include <new>
#include <stdexcept>

#include "common/poll.h"
#include "unike/unike.h"

namespace unike {

// Records `message` for unike_last_error() and returns `status`.
unike_status fail(unike_status status, const char* message) noexcept;

inline void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

inline int64_t size_of(unike_dtype dtype) { return dtype == UNIKE_BF16 ? 2 : 4; }

// Runs the body of a function of the C ABI: no exception leaves it.
template <typename Body>
unike_status guarded(Body&& body) noexcept {
  try {
    body();
    return UNIKE_OK;
  } catch (const std::invalid_argument& error) {
    return fail(UNIKE_INVALID_ARGUMENT, error.what());
  } catch (const std::bad_alloc&) {
    return fail(UNIKE_OUT_OF_MEMORY, "out of memory");
  } catch (const Interrupted& error) {
    return fail(UNIKE_INTERRUPTED, error.what());
  } catch (const std::exception& error) {
    return fail(UNIKE_INTERNAL_ERROR, error.what());
  } catch (...) {
    return fail(UNIKE_INTERNAL_ERROR, "unknown error");
  }
}

// Runs the body of a workspace function: the bytes that it returns, or 0 for arguments that the call itself will refuse.
template <typename Body>
int64_t guarded_bytes(Body&& body) noexcept {
  int64_t bytes = 0;
  guarded([&] { bytes = body(); });
  return bytes;
}

}  // namespace unike
