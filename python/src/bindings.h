// What the bindings share. Tensors arrive as addresses (torch's data_ptr()), so nothing here depends on torch.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <new>
#include <stdexcept>

#include "unike/cosine_topk.h"
#include "unike/unike.h"

namespace unike::python {

void bind_cosine_topk(pybind11::module_& module);
void bind_latent_attention(pybind11::module_& module);
void bind_patched_ffn(pybind11::module_& module);

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

// The keys of a search as Python passes them: (n, d, rows, stride, scan, codes, bounds, direction).
struct Keys {
  int64_t n, d;
  std::uintptr_t rows;
  int64_t stride;
  int scan;
  std::uintptr_t codes, bounds, direction;

  unike_keys table() const {
    return {n,
            d,
            pointer<const float>(rows),
            stride,
            static_cast<unike_scan>(scan),
            pointer<const void>(codes),
            pointer<const float>(bounds),
            pointer<const float>(direction)};
  }
};

// Memory for the length of a call.
class WorkspaceOf {
 public:
  explicit WorkspaceOf(int64_t bytes) : bytes_(bytes), data_(new char[bytes]) {}
  void* data() const { return data_.get(); }
  int64_t bytes() const { return bytes_; }

 private:
  int64_t bytes_;
  std::unique_ptr<char[]> data_;
};

// Raises ValueError, MemoryError or RuntimeError for a failed call.
inline void check(unike_status status) {
  if (status == UNIKE_OK) return;
  if (status == UNIKE_INVALID_ARGUMENT) throw std::invalid_argument(unike_last_error());
  if (status == UNIKE_OUT_OF_MEMORY) throw std::bad_alloc();
  throw std::runtime_error(unike_last_error());
}

}  // namespace unike::python

namespace pybind11::detail {

// A Python tuple as an aggregate of numbers.
template <typename T, typename... Fields>
struct aggregate_caster {
  PYBIND11_TYPE_CASTER(T, const_name("tuple"));

  bool load(handle source, bool convert) {
    make_caster<std::tuple<Fields...>> fields;
    if (!fields.load(source, convert)) return false;
    value = std::apply([](auto... field) { return T{field...}; }, cast_op<std::tuple<Fields...>>(std::move(fields)));
    return true;
  }
};

template <>
struct type_caster<unike::python::Rows> : aggregate_caster<unike::python::Rows, std::uintptr_t, int, int64_t> {};
template <>
struct type_caster<unike::python::Keys>
    : aggregate_caster<unike::python::Keys, int64_t, int64_t, std::uintptr_t, int64_t, int, std::uintptr_t,
                       std::uintptr_t, std::uintptr_t> {};

}  // namespace pybind11::detail
