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

// intrinsics inline only into functions of their target: where GCC can be told a function's, or a
// region's. Clang's way is another
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#if __GNUC__ >= 12
#define NLHF_X86_REGIONS
#include <immintrin.h>
#endif
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

// 2^f = 1 + f (c0 + f (c1 + ...)) for f in [0, 1]: fitted for least relative error, 1.5e-7 in
// float, exact at both ends and without bias
constexpr float kPower[] = {0.693151712f, 0.240159288f, 0.0558186769f, 0.00899100024f,
                            0.00187931978f};

// 2^x: 0 below -126, 2^127 for all above, NaN for NaN.
NLHF_INLINE float power_of_two(float x) {
  const float high = x > 127.0f ? 127.0f : x;
  const float clipped = high < -126.0f ? -126.0f : high;
  const float whole = std::floor(clipped);
  const float f = clipped - whole;
  float y = kPower[4];
  y = y * f + kPower[3];
  y = y * f + kPower[2];
  y = y * f + kPower[1];
  y = y * f + kPower[0];
  y = y * f + 1.0f;
  // a NaN has no integer
  const int32_t exponent = static_cast<int32_t>(x == x ? whole : 0.0f);
  y = bit_cast<float>(bit_cast<uint32_t>(y) + (static_cast<uint32_t>(exponent) << 23));
  return x < -126.0f ? 0.0f : y;
}

NLHF_INLINE double power_of_two(double x) { return std::exp2(x); }

// log(x) for x in (0, inf): relative error about 1e-7 near 1 too; -inf for 0 and subnormals.
NLHF_INLINE float logarithm(float x) {
  // x = m 2^e with m in [sqrt(1/2), sqrt(2))
  const uint32_t bits = bit_cast<uint32_t>(x) - 0x3F3504F3u;
  const float e = static_cast<float>(static_cast<int32_t>(bits) >> 23);
  const float f = bit_cast<float>((bits & 0x7FFFFFu) + 0x3F3504F3u) - 1.0f;
  // fitted for least relative error of log(1 + f): 5.8e-9
  float y = -0.0763450935f;
  y = y * f + 0.127615944f;
  y = y * f - 0.131601855f;
  y = y * f + 0.142017558f;
  y = y * f - 0.166233569f;
  y = y * f + 0.200012267f;
  y = y * f - 0.250008196f;
  y = y * f + 0.333333313f;
  y = f * f * (y * f - 0.5f);
  // ln 2 in two pieces, the first short enough for e times it to be exact
  const float value = e * 0.693359375f + (f + (y - e * 2.12194440e-4f));
  return x < 1.17549435e-38f ? -HUGE_VALF : value;
}

NLHF_INLINE double logarithm(double x) { return std::log(x); }

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
