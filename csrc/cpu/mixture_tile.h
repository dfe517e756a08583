// What sampling does with one tile of logits, in statistics dtype S, compiled once for each level
// of the instruction set. Powers are of two: a score is a logit times log2(e) / temperature.
#pragma once

#include <cstdint>
#include <limits>

#include "cpu/tile.h"

namespace nlhf {

template <class S>
constexpr S kNever = -std::numeric_limits<S>::infinity();

// Which logits make up the mixture: a model with coefficient 0 is not looked at, as 0 * -inf is
// NaN.
enum class Mix {
  alone,     // there is no reference
  policy,    // coefficient 0
  ref,       // coefficient 1
  both,      // coefficients in (0, 1), where -inf comes out as -inf by itself
  anything,  // beyond: -inf times a negative number must not become inf
};

template <class S>
struct Mixture {
  Mix mix;
  S policy_coef, ref_coef;
  // log2(e) / temperature
  S scale;
  // whether the largest mixed logit of each tile will be needed
  bool wants_max;

  static Mixture of(bool has_ref, S coef, S temperature, bool wants_max);
};

// A tile's logits; ref is null without a reference. Up to the next multiple of half of kPadding,
// what lies beyond n is -inf.
template <class S>
struct TileLogits {
  const S* policy;
  const S* ref;
  int64_t n;
};

constexpr int64_t kPadding = 64;

template <class S>
struct ByModel {
  S policy, ref, mixture;
};

// sum 2^(score - anchor) of a tile, and its largest mixed logit or -inf if nobody wants it.
template <class S>
struct TileSums {
  ByModel<S> sum;
  S max;
};

// What lies at and above a bound in a tile: how many, and sum 2^(score - that of the row's
// maximum).
template <class S>
struct Above {
  int64_t count;
  S mass;
};

template <class S>
struct TileKernels {
  // subtracts anchors from scores in one multiply-add; anything that overflows comes out as inf,
  // NaN or at least 2^100
  TileSums<S> (*sums)(const TileLogits<S>&, const Mixture<S>&, const ByModel<S>& anchor);
  // the mixed logits
  void (*mix)(const TileLogits<S>&, const Mixture<S>&, S* mixed);
  // the largest logits, NaN left aside
  ByModel<S> (*maxima)(const TileLogits<S>&, const Mixture<S>&);
  // sum 2^((x - max) * scale), exact for any scale
  S (*power_sum)(const S* x, int64_t n, S max, S scale);
  // what is at least high; mixed logits in [low, high) go to middle, in order, if it is not null:
  // returns how many there are. middle has room for n rounded up to kPadding
  int64_t (*split)(const TileLogits<S>&, const Mixture<S>&, S max, S low, S high, Above<S>* above,
                   S* middle);
  // weight = 2^((x - max) * scale)
  void (*powers)(const S* x, int64_t n, S max, S scale, S* weight);
  // of values x, -inf up to a multiple of kPadding, with these weights
  Above<double> (*at_least)(const S* x, const S* weight, int64_t n, S bound);
  // the values in [low, high) in order, with their weights, -inf after them; over the old ones if
  // these are the same memory. Returns how many
  int64_t (*narrow)(const S* x, const S* weight, int64_t n, S low, S high, S* x_out, S* weight_out);
};

// For this machine, and this process.
template <class S>
const TileKernels<S>& tile_kernels();

}  // namespace nlhf
