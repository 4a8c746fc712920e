#include "common/checked.h"

#include <string>

namespace unike {
namespace {

Extent check_lines(const char* name, const void* data, unike_dtype dtype, int64_t stride, int64_t count,
                   int64_t width) {
  check_dtype(name, dtype);
  if (stride < 0 || stride > kMostBytes) refuse((std::string(name) + ".stride").c_str(), "at least 0", stride);
  if (count == 0) return {0, 0, 0, 0};
  const int64_t size = size_of(dtype);
  check_memory(name, data, times(count - 1, stride) + width, size);
  return {reinterpret_cast<uintptr_t>(data), count, stride * size, width * size};
}

}  // namespace

void refuse(const char* name, const char* expected, int64_t got) {
  throw std::invalid_argument(std::string(name) + ": expected " + expected + ", got " + std::to_string(got));
}

Extent check_rows(const char* name, const unike_rows& rows, int64_t count, int64_t width) {
  return check_lines(name, rows.data, rows.dtype, rows.stride, count, width);
}

Extent check_rows_out(const char* name, const unike_rows_out& rows, int64_t count, int64_t width) {
  if (count > 1 && rows.stride < width) {
    refuse((std::string(name) + ".stride").c_str(), "at least the width, so that no row overlaps another", rows.stride);
  }
  return check_lines(name, rows.data, rows.dtype, rows.stride, count, width);
}

void check_apart(const char* name, const Extent& written, const Extent& read) {
  if (written.rows == 0 || read.rows == 0 || written.end() <= read.first || read.end() <= written.first) return;
  const bool same_stride = written.stride == read.stride || written.rows == 1 || read.rows == 1;
  if (written.first == read.first && same_stride && written.width == read.width) return;
  // Columns beside each other in rows that both share.
  const int64_t stride = written.stride;
  if (stride == read.stride && stride > 0) {
    const auto distance = static_cast<int64_t>(read.first - written.first) % stride;
    const int64_t ahead = distance < 0 ? distance + stride : distance;
    if (ahead >= written.width && ahead + read.width <= stride) return;
  }
  refuse(name, "rows that are those of an input or share no memory with it, and they begin apart by (bytes)",
         static_cast<int64_t>(read.first - written.first));
}

}  // namespace unike
