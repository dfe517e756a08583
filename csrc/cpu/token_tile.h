// What the losses do with one tile of a row, in statistics dtype S, compiled once for each level of
// the instruction set. Powers are of two: a score is a logit times log2(e) / temperature.
#pragma once

#include <cstdint>

#include "cpu/tile.h"

namespace nlhf {

// Kernels go over multiples of it; up to the next one, what lies beyond a row's end is -inf.
constexpr int64_t kStep = 16;

// Sums over a tile: e = 2^t with t = (x - anchor) * scale, where 0 * -inf is 0.
template <class S>
struct TokenSums {
  S sum, weighted;  // e, e * t
};

// With the reference: also u = (y - ref_anchor) * scale.
template <class S>
struct TokenKlSums {
  S sum, weighted, ref_sum, relative;  // e, e * t, 2^u, e * (t - u)
};

// The gradient p * (constant + by_score * t + by_ratio * (t - u)), and 0 where p = 2^t is 0, with t
// and u relative to what is subtracted from the two models' scores.
template <class S>
struct TokenGradient {
  S scale, base, ref_base;
  S constant, by_score, by_ratio;
};

template <class S>
struct TokenKernels {
  // what the gradient subtracts from scores, if it is larger, costs them digits
  S largest_base;
  // n is rounded up to kStep. A sum that is not below 2^14 is NaN or inf, or has lost digits to its
  // anchor
  TokenSums<S> (*sums)(const S* x, int64_t n, S scale, S anchor);
  TokenKlSums<S> (*kl_sums)(const S* x, const S* y, int64_t n, S scale, S anchor, S ref_anchor);
  // out may be x; without y, which may be null, there is no ratio
  void (*gradient)(const S* x, const S* y, int64_t n, const TokenGradient<S>& how, S* out);
};

// For this machine, and this process.
template <class S>
const TokenKernels<S>& token_kernels();

}  // namespace nlhf
