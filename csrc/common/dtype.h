// The element types of logits, and their conversion from and to float.
#pragma once

#include <cstdint>

#include "common/simd.h"

namespace nlhf {

enum class DType { float16, bfloat16, float32, float64 };

inline int64_t element_size(DType dtype) {
  switch (dtype) {
    case DType::float16:
    case DType::bfloat16:
      return 2;
    case DType::float32:
      return 4;
    case DType::float64:
      return 8;
  }
  return 0;
}

struct Float16 {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

NLHF_INLINE float to_float(Float16 x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16;
  const uint32_t size = (x.bits & 0x7FFFu) << 13;
  // the exponent's bias grows by 112, twice that for infinities and NaN
  const uint32_t normal = size + (112u << 23);
  const uint32_t special = size + (224u << 23);
  // a subnormal is its bits below the exponent of 2^-14, less 2^-14: no float subnormal is touched
  const float subnormal = bit_cast<float>(size + (113u << 23)) - bit_cast<float>(113u << 23);
  const uint32_t finite = size < (1u << 23) ? bit_cast<uint32_t>(subnormal) : normal;
  return bit_cast<float>(sign | (size >= (31u << 23) ? special : finite));
}

NLHF_INLINE float to_float(BFloat16 x) { return bit_cast<float>(uint32_t{x.bits} << 16); }
NLHF_INLINE float to_float(float x) { return x; }

// All stores round to the nearest, ties to even, overflow to infinity and keep NaN.
NLHF_INLINE void from_float(float x, Float16& out) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t size = bits & 0x7FFFFFFFu;
  const uint32_t normal = (size - (112u << 23) + 0xFFFu + (size >> 13 & 1u)) >> 13;
  // 0.5 has the spacing of half's subnormals, so the addition rounds to them
  const float shifted = bit_cast<float>(size) + 0.5f;
  const uint32_t subnormal = bit_cast<uint32_t>(shifted) - bit_cast<uint32_t>(0.5f);
  const uint32_t finite = size < (113u << 23) ? subnormal : normal;
  // 65520 is halfway to what would follow the largest half
  const uint32_t large = size > 0x7F800000u ? 0x7E00u : 0x7C00u;
  const uint32_t half = size >= 0x477FF000u ? large : finite;
  out.bits = static_cast<uint16_t>(half | (bits >> 16 & 0x8000u));
}

NLHF_INLINE void from_float(float x, BFloat16& out) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
  const uint32_t nan = bits >> 16 | 0x40u;
  out.bits = static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? nan : rounded);
}

NLHF_INLINE void from_float(float x, float& out) { out = x; }

}  // namespace nlhf
