// The C ABI of what is done to keys once: unit length, and the packed copies for the scan.
#include <algorithm>

#include "common/checked.h"
#include "common/parallel.h"
#include "common/status.h"
#include "common/workspace.h"
#include "cpu/isa.h"
#include "cpu/leading.h"

namespace unike {
namespace {

constexpr int64_t kRun = kLeadingRows;

// Calls body(from, to, thread) for runs of at most kRun of `rows` neighbours.
void each_run(int64_t rows, double work_per_row, int threads, const auto& body) {
  threads = useful_threads(static_cast<double>(rows) * work_per_row, threads_of_call(threads));
  parallel_for((rows + kRun - 1) / kRun, threads,
               [&](int64_t run, int thread) { body(run * kRun, std::min(rows, (run + 1) * kRun), thread); });
}

// Calls body(row, thread) for row = 0, ..., rows - 1.
void each_row(int64_t rows, double work_per_row, int threads, const auto& body) {
  each_run(rows, work_per_row, threads, [&](int64_t from, int64_t to, int thread) {
    for (int64_t row = from; row < to; ++row) body(row, thread);
  });
}

float* take_rest(Workspace& workspace, int64_t d, int threads) {
  return workspace.take<float>(times(padded_bytes(sizeof(float), d), threads) / static_cast<int64_t>(sizeof(float)));
}

int64_t tiles_of(int64_t n) { return (n + kTile - 1) / kTile; }

}  // namespace
}  // namespace unike

extern "C" unike_status unike_normalize_rows(unike_rows x, int64_t rows, int64_t d, float* out, int threads) {
  using namespace unike;
  return guarded([&] {
    check_size("rows", rows, 0);
    check_size("d", d, 1);
    check_array("out", out, times(rows, d));
    const Extent read = check_rows("x", x, rows, d);
    const auto written = reinterpret_cast<uintptr_t>(out);
    const auto bytes = static_cast<uintptr_t>(rows * d) * sizeof(float);
    require(rows == 0 || written + bytes <= read.first || read.end() <= written, "out must not overlap x");
    const auto normalize = scan_kernels().normalize[x.dtype];
    const int64_t stride = x.stride * size_of(x.dtype);
    each_row(rows, static_cast<double>(d), threads,
             [&](int64_t row, int) { normalize(static_cast<const char*>(x.data) + row * stride, d, out + row * d); });
  });
}

extern "C" int64_t unike_code_bytes(unike_scan scan, int64_t d) {
  using namespace unike;
  if (d < 1 || d > kMostBytes / 4) return 0;
  if (scan == UNIKE_SCAN_I8) return d <= 65536 ? padded_bytes(1, d) : 0;  // a product is below 255 * 127 * d < 2^31
  return scan == UNIKE_SCAN_F16 || scan == UNIKE_SCAN_BF16 ? padded_bytes(2, d) : 0;
}

extern "C" int64_t unike_pack_keys_workspace(int64_t d, int threads) {
  using namespace unike;
  return guarded_bytes([&] {
    check_size("d", d, 1);
    Workspace workspace;
    take_rest(workspace, d, threads_of_call(threads));
    return workspace.bytes();
  });
}

extern "C" unike_status unike_pack_keys(const float* rows, int64_t n, int64_t d, int64_t stride, unike_scan scan,
                                        const float* direction, void* codes, float* bounds, void* workspace,
                                        int64_t workspace_bytes, int threads) {
  using namespace unike;
  return guarded([&] {
    check_size("n", n, 0);
    check_size("stride", stride, 0);
    check_size("d", d, 1);
    times(n, std::max(d, stride), sizeof(float));
    const int64_t bytes = unike_code_bytes(scan, d);
    require(bytes > 0, "scan must be float16, bfloat16 or int8, and d at most 65536 for int8");
    const int64_t size = scan == UNIKE_SCAN_I8 ? 1 : 2;
    check_array("direction", direction, d);
    check_array("rows", rows, n == 0 ? 0 : (n - 1) * stride + d);
    check_memory("codes", codes, times(n, bytes) / size, size);
    check_array("bounds", bounds, times(n, UNIKE_KEY_BOUNDS));
    threads = threads_of_call(threads);
    Workspace memory(workspace, workspace_bytes);
    float* rest = take_rest(memory, d, threads);
    double uu = 0;
    for (int64_t i = 0; i < d; ++i) uu += static_cast<double>(direction[i]) * direction[i];
    const auto pack = scan_kernels().pack_key[scan];
    each_row(n, 8.0 * static_cast<double>(d), threads, [&](int64_t row, int thread) {
      const KeyBounds of =
          pack(rows + row * stride, direction, uu, d, rest + thread * (padded_bytes(sizeof(float), d) / 4),
               static_cast<char*>(codes) + row * bytes);
      __builtin_memcpy(bounds + row * UNIKE_KEY_BOUNDS, &of, sizeof of);
    });
  });
}

extern "C" int64_t unike_leading_bytes(int64_t n, int64_t p) {
  using namespace unike;
  return guarded_bytes([&] {
    check_size("n", n, 0);
    check_leading("p", p);
    return times(tiles_of(n), kTile, p);
  });
}

extern "C" unike_status unike_pack_leading(const float* rows, int64_t first, int64_t n, int64_t d, int64_t stride,
                                           int64_t p, const float* directions, void* codes, float* bounds,
                                           int threads) {
  using namespace unike;
  return guarded([&] {
    check_size("first", first, 0);
    check_size("n", n, 0);
    check_size("stride", stride, 0);
    check_size("d", d, 1);
    check_leading("p", p);
    times(n, std::max(d, stride), sizeof(float));
    check_array("directions", directions, times(1 + p, d));
    check_array("rows", rows, n == 0 ? 0 : (n - 1) * stride + d);
    const int64_t tiles = tiles_of(plus(first, n));
    check_memory("codes", codes, times(tiles, kTile, p), 1);
    check_array("bounds", bounds, times(tiles, kTile, UNIKE_LEADING_BOUNDS));
    const ScanKernels& kernels = scan_kernels();
    const double rounding = leading_rounding(p, d);
    each_run(n, 2.0 * static_cast<double>(times(1 + p, d)), threads, [&](int64_t from, int64_t to, int) {
      const float* run[kLeadingRows];
      float y[kLeadingRows * (1 + kMostLeading)];
      for (int64_t row = from; row < to; ++row) run[row - from] = rows + row * stride;
      multiply_directions(kernels, run, to - from, directions, p, d, y);
      for (int64_t row = from; row < to; ++row) {
        const float* of_row = y + (row - from) * (1 + p);
        const int64_t tile = (first + row) / kTile, i = (first + row) % kTile;
        KeyBounds of;
        kernels.pack_leading(of_row + 1, p, static_cast<char*>(codes) + tile * kTile * p + i * 4, &of);
        auto& of_tile = reinterpret_cast<TileBounds*>(bounds)[tile];
        of_tile.scale[i] = of.scale;
        of_tile.projection[i] = of_row[0];
        of_tile.residual[i] = of.residual;
        of_tile.norm[i] = of.norm;
        of_tile.tail[i] = tail_of(of_row, p, rounding);
      }
    });
  });
}
