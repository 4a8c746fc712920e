// How queries are coded for a scan of keys (EXACTNESS.md).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "cpu/leading.h"
#include "cpu/scan_kernels.h"

namespace unike {

// What rounding may add to an error.
constexpr float kSlack = 0x1p-17f;

// What a scan reads of a query.
struct Coded {
  const void* codes;
  const void* low_codes;  // of an int8 scan
  QueryBounds bounds;
};

class QueryCoder {
 public:
  // length: elements of a key's codes.
  QueryCoder(const unike_keys& keys, const ScanKernels& kernels, int64_t length)
      : keys_(keys),
        kernels_(kernels),
        integers_(keys.scan == UNIKE_SCAN_I8),
        narrow_(keys.scan == UNIKE_SCAN_BF16 && kernels.narrow_queries),
        // Rows that lie whole pages apart would share a few sets of the caches.
        room_(padded_bytes(integers_ ? 1
                           : narrow_ ? sizeof(BFloat16)
                                     : sizeof(float),
                           length) +
              64) {
    const double terms = (static_cast<double>(keys.d) / kernels.lanes + kDepth) * 0x1p-24;
    // Where sums are too long for the theorem nothing is ruled out; infinity times a norm of 0 would be no number.
    rounding_ = static_cast<float>(terms < 0.5 ? terms / (1 - terms) * 1.0001 : 0x1p96);
  }

  // Of the codes of a query, and of its leading ones.
  int64_t bytes() const { return integers_ ? 2 * room_ : room_; }
  int64_t leading_bytes() const { return 2 * keys_.leading.p; }

  // Codes a unit row; rest: room for it, padded to 64 bytes.
  Coded whole(const float* row, float* rest, char* codes) const {
    Coded query{codes, nullptr, {}};
    QueryBounds& bounds = query.bounds;
    bounds.slack = kSlack;
    std::fill_n(codes, bytes(), 0);
    if (!integers_ && !narrow_) rest = reinterpret_cast<float*>(codes);
    kernels_.take_out(row, keys_.scan == UNIKE_SCAN_F32 ? nullptr : keys_.direction, keys_.d, rest, &bounds);
    if (integers_) {
      quantize(rest, keys_.d, codes, room_, query);
    } else {
      bounds.scale = 1.0f;
      if (narrow_) kernels_.narrow(rest, keys_.d, reinterpret_cast<BFloat16*>(codes), &bounds);
      bounds.norm = bounds.low_norm = (1 + rounding_) * bounds.norm + rounding_ * bounds.residual;
    }
    if (keys_.rows == nullptr) bounds.norm += bounds.low_norm;  // from one estimate to the other: the second is final
    return query;
  }

  // Codes what a unit row is in the leading directions.
  Coded leading(const float* row, char* codes) const {
    const int64_t p = keys_.leading.p;
    float y[1 + kMostLeading];
    multiply_directions(kernels_, &row, 1, keys_.leading.directions, p, keys_.d, y);
    const double rounding = leading_rounding(p, keys_.d);
    double squares = 0;
    for (int64_t j = 1; j <= p; ++j) squares += static_cast<double>(y[j]) * static_cast<double>(y[j]);
    Coded query{};
    QueryBounds& bounds = query.bounds;
    bounds.projection = y[0];
    bounds.residual = static_cast<float>(std::sqrt(squares) * (1 + 0x1p-20));
    bounds.tail = tail_of(y, p, rounding);
    bounds.slack = static_cast<float>((kLeadingSlack + 2.2 * rounding) * (1 + 0x1p-20));
    quantize(y + 1, p, codes, p, query);
    return query;
  }

 private:
  // Makes the codes of `length` numbers, the low ones `room` bytes behind the high ones.
  void quantize(const float* rest, int64_t length, char* codes, int64_t room, Coded& query) const {
    auto *high = reinterpret_cast<int8_t*>(codes), *low = high + room;
    kernels_.quantize(rest, length, high, low, &query.bounds);
    query.codes = high;
    query.low_codes = low;
  }

  const unike_keys& keys_;
  const ScanKernels& kernels_;
  bool integers_;
  bool narrow_;     // bfloat16 queries
  int64_t room_;    // bytes of the codes of a row
  float rounding_;  // of float products: relative to the norms
};

}  // namespace unike
