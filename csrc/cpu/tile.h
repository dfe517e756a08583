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

// The opposite, rounded once.
template <class S>
void store(const S* x, int64_t n, char* row, DType dtype, int64_t start);

// Largest element, NaN left aside; -inf if there is none.
template <class S>
S maximum(const S* x, int64_t n);

template <class S>
void multiply(S* x, int64_t n, const S* factor);

// x = cap * tanh(x / cap); slope, if not null, gets the derivative
template <class S>
void softcap(S* x, int64_t n, S cap, S* slope);

}  // namespace nlhf
