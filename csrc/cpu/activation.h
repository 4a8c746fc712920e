// The activations of an FFN and their slopes, one value at a time: an edit has a few neurons.
#pragma once

#include <cmath>

#include "unike/extra_neurons.h"

namespace unike {

inline float activate(unike_activation activation, float x) {
  switch (activation) {
    case UNIKE_RELU:
      return x < 0.0f ? 0.0f : x;  // NaN stays NaN
    case UNIKE_GELU:
      return 0.5f * x * (1.0f + std::erf(x * 0.70710678f));
    case UNIKE_GELU_TANH:
      return 0.5f * x * (1.0f + std::tanh(0.79788456f * (x + 0.044715f * x * x * x)));
    case UNIKE_SILU:
      return x / (1.0f + std::exp(-x));
    case UNIKE_RELU2:
      return x < 0.0f ? 0.0f : x * x;
  }
  return x;
}

inline float slope(unike_activation activation, float x) {
  switch (activation) {
    case UNIKE_RELU:
      return x > 0.0f ? 1.0f : 0.0f;
    case UNIKE_GELU:
      return 0.5f * (1.0f + std::erf(x * 0.70710678f)) + x * std::exp(-0.5f * x * x) * 0.39894228f;
    case UNIKE_GELU_TANH: {
      const float t = std::tanh(0.79788456f * (x + 0.044715f * x * x * x));
      return 0.5f * (1.0f + t) + 0.5f * x * (1.0f - t * t) * 0.79788456f * (1.0f + 3.0f * 0.044715f * x * x);
    }
    case UNIKE_SILU: {
      const float s = 1.0f / (1.0f + std::exp(-x));
      return s * (1.0f + x * (1.0f - s));
    }
    case UNIKE_RELU2:
      return x > 0.0f ? 2.0f * x : 0.0f;
  }
  return 1.0f;
}

}  // namespace unike
