// Memory that the caller gives for the length of a call, handed out in pieces.
#pragma once

#include <cstdint>

#include "common/checked.h"

namespace unike {

// A function first takes all its pieces from a Workspace without memory, to learn how many bytes() it needs, and then the
// same pieces from the caller's. The pieces are not initialised.
class Workspace {
 public:
  Workspace() = default;
  Workspace(void* memory, int64_t size) : memory_(static_cast<char*>(memory)), size_(size) {
    require(memory != nullptr, "the workspace is null");
    check_size("workspace_bytes", size, 0);
    used_ = -reinterpret_cast<uintptr_t>(memory) % kAlignment;
  }

  template <typename T>
  T* take(int64_t count) {
    const int64_t first = used_;
    used_ += (times(count, sizeof(T)) + kAlignment - 1) / kAlignment * kAlignment;
    if (memory_ == nullptr) return nullptr;
    require(used_ <= size_, "the workspace is smaller than the workspace function says");
    return reinterpret_cast<T*>(memory_ + first);
  }

  // What has not been taken: where it begins and its bytes.
  struct Rest {
    void* memory;
    int64_t bytes;
  };
  Rest rest() const { return {memory_ + used_, size_ - used_}; }

  // Room for an unaligned start included.
  int64_t bytes() const { return used_ + kAlignment; }

 private:
  static constexpr int64_t kAlignment = 64;
  char* memory_ = nullptr;
  int64_t size_ = 0, used_ = 0;
};

}  // namespace unike
