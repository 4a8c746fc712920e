// The activations of an FFN, one value at a time: an edit has a few neurons.
#pragma once

#include <math.h>  // the plain C functions: see vector.h

#include "unike/patched_ffn.h"

namespace unike {
namespace {

inline float activate(unike_activation activation, float x) {
  switch (activation) {
    case UNIKE_RELU:
      return x < 0.0f ? 0.0f : x;  // NaN stays NaN
    case UNIKE_GELU:
      return 0.5f * x * (1.0f + ::erff(x * 0.70710678f));
    case UNIKE_GELU_TANH:
      return 0.5f * x * (1.0f + ::tanhf(0.79788456f * (x + 0.044715f * x * x * x)));
    case UNIKE_SILU:
      return x / (1.0f + ::expf(-x));
  }
  return x;
}

}  // namespace
}  // namespace unike
