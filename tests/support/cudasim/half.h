// IEEE binary16 under the names of cuda_fp16.h, by plain arithmetic.
#pragma once
#include <cmath>
#include <cstdint>
#include <limits>

struct __half {
  uint16_t bits;
};

static inline float __half2float(__half h) {
  const int exponent = h.bits >> 10 & 31, fraction = h.bits & 1023;
  float x = exponent ? ldexpf(1024 + fraction, exponent - 25) : ldexpf(fraction, -24);
  if (exponent == 31)
    x = fraction ? std::numeric_limits<float>::quiet_NaN() : std::numeric_limits<float>::infinity();
  return h.bits & 0x8000 ? -x : x;
}

// To nearest, ties to even.
static inline __half __float2half_rn(float number) {
  if (number != number) return {0x7fff};
  const uint16_t sign = std::signbit(number) ? 0x8000 : 0;
  const float x = fabsf(number);
  if (x >= 65520) return {(uint16_t)(sign | 0x7c00)};  // half way beyond the largest, 65504
  int exponent;
  frexpf(x, &exponent);
  exponent = x < 0x1p-14f ? -14 : exponent - 1;  // subnormals share the last one
  // In units of the last place: 1024 to 2048, where 2048 carries into the exponent; below 1024
  // only for subnormals, whose exponent bits are 0.
  const int units = (int)nearbyintf(ldexpf(x, 10 - exponent));
  return {(uint16_t)(sign | ((exponent + 14) * 1024 + units))};
}
