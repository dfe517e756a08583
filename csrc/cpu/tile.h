// Vectorised primitives on one tile of a row. A tile is at most kTile elements in statistics dtype
// S (float or double), so that it stays in the first-level cache while several loops pass over it.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace nlhf {

// also the tile of the sampling contract
constexpr int64_t kTile = 1024;

// Converts elements [start, start + n) of a row.
template <class S>
void load(const char* row, DType dtype, int64_t start, int64_t n, S* x);

// The opposite; float goes to any type but float64, double to float64 only.
template <class S>
void store(const S* x, int64_t n, char* row, DType dtype, int64_t start);

// Largest element, NaN left aside; -inf if there is none.
template <class S>
S maximum(const S* x, int64_t n);

// sum exp((x - shift) / divisor)
template <class S>
S exp_sum(const S* x, int64_t n, S shift, S divisor);

template <class S>
struct Moments {
  S sum, weighted;
};

// sum e and sum e * (x - shift) with e = exp(x - shift), where 0 * -inf is 0
template <class S>
Moments<S> exp_moments(const S* x, int64_t n, S shift);

// policy = policy_coef * policy + ref_coef * ref, and -inf wherever one of them is
template <class S>
void mix(S* policy, const S* ref, int64_t n, S policy_coef, S ref_coef);

template <class S>
void divide(S* x, int64_t n, S divisor);

template <class S>
void multiply(S* x, int64_t n, const S* factor);

// x = cap * tanh(x / cap); slope, if not null, gets the derivative
template <class S>
void softcap(S* x, int64_t n, S cap, S* slope);

// x = -p * (grad_logprob + grad_entropy * (x - lse + entropy)) with p = exp(x - lse); 0 where p is
// 0
template <class S>
void softmax_gradient(S* x, int64_t n, S lse, S entropy, S grad_logprob, S grad_entropy);

}  // namespace nlhf
