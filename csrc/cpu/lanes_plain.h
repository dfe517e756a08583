// Eight numbers in plain C++: float64, and machines whose instruction set has no lanes here.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/simd.h"

namespace nlhf {

template <class T>
struct PlainLanes {
  static constexpr int kWidth = 8;
  // whether multiply_add rounds once
  static constexpr bool kFused = false;
  using S = T;
  struct F {
    S lane[kWidth];
  };
  struct M {
    bool lane[kWidth];
  };

  template <class Lane>
  static NLHF_INLINE F each(const Lane& lane) {
    F out;
    for (int i = 0; i < kWidth; ++i) out.lane[i] = lane(i);
    return out;
  }

  template <class Lane>
  static NLHF_INLINE M mask(const Lane& lane) {
    M out;
    for (int i = 0; i < kWidth; ++i) out.lane[i] = lane(i);
    return out;
  }

  static NLHF_INLINE F all(S x) {
    return each([&](int) { return x; });
  }
  static NLHF_INLINE F load(const S* x) {
    return each([&](int i) { return x[i]; });
  }
  static NLHF_INLINE void store(S* out, const F& x) {
    for (int i = 0; i < kWidth; ++i) out[i] = x.lane[i];
  }
  static NLHF_INLINE F add(const F& x, const F& y) {
    return each([&](int i) { return x.lane[i] + y.lane[i]; });
  }
  static NLHF_INLINE F subtract(const F& x, const F& y) {
    return each([&](int i) { return x.lane[i] - y.lane[i]; });
  }
  static NLHF_INLINE F multiply(const F& x, const F& y) {
    return each([&](int i) { return x.lane[i] * y.lane[i]; });
  }
  static NLHF_INLINE F multiply_add(const F& x, const F& y, const F& z) {
    return each([&](int i) { return x.lane[i] * y.lane[i] + z.lane[i]; });
  }
  // y if x is NaN
  static NLHF_INLINE F larger(const F& x, const F& y) {
    return each([&](int i) { return x.lane[i] > y.lane[i] ? x.lane[i] : y.lane[i]; });
  }
  static NLHF_INLINE M at_least(const F& x, const F& y) {
    return mask([&](int i) { return x.lane[i] >= y.lane[i]; });
  }
  static NLHF_INLINE M equal(const F& x, const F& y) {
    return mask([&](int i) { return x.lane[i] == y.lane[i]; });
  }
  static NLHF_INLINE M without(const M& x, const M& y) {
    return mask([&](int i) { return x.lane[i] && !y.lane[i]; });
  }
  static NLHF_INLINE F where(const M& x, const F& y, const F& z) {
    return each([&](int i) { return x.lane[i] ? y.lane[i] : z.lane[i]; });
  }
  static NLHF_INLINE int count(const M& x) {
    int out = 0;
    for (int i = 0; i < kWidth; ++i) out += x.lane[i];
    return out;
  }
  static NLHF_INLINE bool any(const M& x) { return count(x) != 0; }
  static NLHF_INLINE S sum(const F& x) {
    S out = 0;
    for (int i = 0; i < kWidth; ++i) out += x.lane[i];
    return out;
  }
  static NLHF_INLINE S top(const F& x) {
    S out = x.lane[0];
    for (int i = 1; i < kWidth; ++i) out = x.lane[i] > out ? x.lane[i] : out;
    return out;
  }
  static NLHF_INLINE void compress(S* out, const M& x, const F& y) {
    for (int i = 0; i < kWidth; ++i)
      if (x.lane[i]) *out++ = y.lane[i];
  }
  static NLHF_INLINE F power(const F& x) {
    return each([&](int i) { return power_of_two(x.lane[i]); });
  }
};

}  // namespace nlhf
