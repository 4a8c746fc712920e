// What the bindings share. Tensors arrive as addresses (torch's data_ptr()), so nothing here depends on torch.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <new>
#include <stdexcept>
#include <tuple>
#include <utility>

#include "unike/cosine_topk.h"
#include "unike/unike.h"

namespace unike::python {

void bind_cosine_topk(pybind11::module_& module);
void bind_cuda(pybind11::module_& module);
void bind_extra_neurons(pybind11::module_& module);
void bind_latent_attention(pybind11::module_& module);
void bind_machine(pybind11::module_& module);
void bind_memory_attention(pybind11::module_& module);
void bind_prompt_key(pybind11::module_& module);

template <typename T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Rows as Python passes them: (address, dtype, stride in elements).
struct Rows {
  std::uintptr_t data;
  int dtype;
  int64_t stride;

  unike_rows to_read() const { return {pointer<const void>(data), static_cast<unike_dtype>(dtype), stride}; }
  unike_rows_out to_write() const { return {pointer<void>(data), static_cast<unike_dtype>(dtype), stride}; }
};

// The keys of a search, which stay where they are from call to call.
struct Keys {
  unike_keys table;

  Keys(int64_t n, int64_t d, std::uintptr_t rows, int64_t stride, int scan, std::uintptr_t codes, std::uintptr_t bounds,
       std::uintptr_t direction, int64_t p, std::uintptr_t directions, std::uintptr_t leading_codes,
       std::uintptr_t leading_bounds)
      : table{n,
              d,
              pointer<const float>(rows),
              stride,
              static_cast<unike_scan>(scan),
              pointer<const void>(codes),
              pointer<const float>(bounds),
              pointer<const float>(direction),
              {p, pointer<const float>(directions), pointer<const void>(leading_codes),
               pointer<const float>(leading_bounds)}} {}
};

// While a call works, other threads of Python run, and signals are handled.
struct ReleaseGil {
  pybind11::gil_scoped_release released;

  ReleaseGil() {
    unike_set_poll([] {
      const pybind11::gil_scoped_acquire gil;
      return PyErr_CheckSignals();
    });
  }
};

// Raises ValueError, MemoryError or RuntimeError for a failed call, and what a signal's handler has raised. Without the GIL.
inline void check(unike_status status) {
  if (status == UNIKE_OK) return;
  if (status == UNIKE_INTERRUPTED) {
    const pybind11::gil_scoped_acquire gil;
    throw pybind11::error_already_set();
  }
  if (status == UNIKE_INVALID_ARGUMENT) throw std::invalid_argument(unike_last_error());
  if (status == UNIKE_OUT_OF_MEMORY) throw std::bad_alloc();
  throw std::runtime_error(unike_last_error());
}

struct KeptWorkspace {
  std::unique_ptr<char[]> memory;
  int64_t bytes = 0;
};
inline thread_local KeptWorkspace kept_workspace;

// Calls run(workspace, bytes) with as much memory as it needs, and raises what `check` does. A thread keeps its
// workspace from call to call, as the system would clear it anew each time, which takes longer than many a call; more
// than 192 MB are given back. Only a call that refuses what is there asks needed(), which looks at the arguments as the
// call itself does.
template <typename Needed, typename Run>
void with_workspace(const Needed& needed, const Run& run) {
  KeptWorkspace& kept = kept_workspace;
  unike_status status = run(kept.memory.get(), kept.bytes);
  if (status == UNIKE_INVALID_ARGUMENT) {
    if (const int64_t bytes = needed(); bytes > kept.bytes) {
      KeptWorkspace grown{std::unique_ptr<char[]>(new char[bytes]), bytes};
      status = run(grown.memory.get(), bytes);
      if (bytes <= 192 << 20) kept = std::move(grown);
    }
  }
  check(status);
}

}  // namespace unike::python

namespace pybind11::detail {

template <>
struct type_caster<unike::python::Rows> {
  PYBIND11_TYPE_CASTER(unike::python::Rows, const_name("tuple[int, int, int]"));

  bool load(handle source, bool convert) {
    make_caster<std::tuple<std::uintptr_t, int, int64_t>> fields;
    if (!fields.load(source, convert)) return false;
    std::tie(value.data, value.dtype, value.stride) = cast_op<std::tuple<std::uintptr_t, int, int64_t>>(fields);
    return true;
  }
};

}  // namespace pybind11::detail
