// What loops need to vectorise: one clone per instruction set, and exp and tanh without branches.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

// the resolvers of the clones run before a sanitizer is ready, and need glibc
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#if __GNUC__ >= 12
#define NLHF_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#endif
#endif
#ifndef NLHF_CLONES
#define NLHF_CLONES
#endif

// a helper that is not inlined would be compiled for the oldest instruction set only
#if defined(__GNUC__)
#define NLHF_INLINE inline __attribute__((always_inline))
#else
#define NLHF_INLINE inline
#endif

namespace nlhf {

template <class To, class From>
NLHF_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs equal sizes");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// exp(x) = 2 * half_power * (1 + fraction), for x in [-86.9, 89]: half_power = 2^(n - 1) with
// n = round(x / ln 2), fraction = exp(x - n ln 2) - 1. Half, because 2^128 is not a float.
struct ExpParts {
  float half_power, fraction;
};

NLHF_INLINE ExpParts exp_parts(float x) {
  // adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits
  constexpr float kRound = 12582912.0f;
  const float shifted = x * 1.44269504f + kRound;
  const float n = shifted - kRound;
  // ln 2 in two pieces, the first short enough for n times it to be exact
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  // fitted for least relative error of exp on |r| <= ln(2) / 2: 3.1e-9
  float q = 0.00138145612f;
  q = q * r + 0.00836871899f;
  q = q * r + 0.0416683887f;
  q = q * r + 0.166665206f;
  q = q * r + 0.499999934f;
  const uint32_t exponent = bit_cast<uint32_t>(shifted) - bit_cast<uint32_t>(kRound) + 126u;
  return {bit_cast<float>(exponent << 23), r + r * r * q};
}

// 0 below -86.9 and for -inf, inf above 88.8, NaN for NaN; relative error about 1e-7.
NLHF_INLINE float exponential(float x) {
  const float clipped = x > 89.0f ? 89.0f : x;
  const ExpParts parts = exp_parts(clipped);
  const float value = 2.0f * (parts.half_power + parts.half_power * parts.fraction);
  return x < -86.9f ? 0.0f : value;
}

NLHF_INLINE double exponential(double x) { return std::exp(x); }

// (1 - e) / (1 + e) with e = exp(-2 |x|), through e - 1, which keeps small x accurate.
NLHF_INLINE float hyperbolic_tangent(float x) {
  // beyond 10 the result is 1 to the last bit
  const float size = std::fabs(x) > 10.0f ? 10.0f : std::fabs(x);
  const ExpParts parts = exp_parts(-2.0f * size);
  const float power = 2.0f * parts.half_power;
  const float e_minus_1 = power * parts.fraction + (power - 1.0f);
  return std::copysign(e_minus_1 / (2.0f + e_minus_1), x);
}

NLHF_INLINE double hyperbolic_tangent(double x) { return std::tanh(x); }

}  // namespace nlhf
