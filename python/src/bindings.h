// What the bindings share. Tensors arrive as addresses (torch's data_ptr()), so nothing here depends on torch.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <new>
#include <stdexcept>

#include "unike/unike.h"

namespace unike::python {

void bind_cosine_topk(pybind11::module_& module);
void bind_latent_attention(pybind11::module_& module);
void bind_patched_ffn(pybind11::module_& module);

template <typename T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Raises ValueError, MemoryError or RuntimeError for a failed call.
inline void check(unike_status status) {
  if (status == UNIKE_OK) return;
  if (status == UNIKE_INVALID_ARGUMENT) throw std::invalid_argument(unike_last_error());
  if (status == UNIKE_OUT_OF_MEMORY) throw std::bad_alloc();
  throw std::runtime_error(unike_last_error());
}

}  // namespace unike::python
