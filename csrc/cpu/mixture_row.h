// One row of logits while it is sampled from: its tiles, their masses, the draw.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "cpu/mixture_tile.h"
#include "cpu/noise.h"
#include "cpu/ops.h"

namespace nlhf {

// sum * 2^base: a mass whose logarithm may be far from what S can hold.
struct Mass {
  double base = -std::numeric_limits<double>::infinity(), sum = 0;

  void add(const Mass& other) {
    if (other.base == base) {
      sum += other.sum;
    } else if (other.base > base) {
      sum = sum * std::exp2(base - other.base) + other.sum;
      base = other.base;
    } else {
      sum += other.sum * std::exp2(other.base - base);
    }
  }

  // NaN anywhere, +inf, or nothing finite
  bool usable() const { return sum > 0 && std::isfinite(sum); }
  double log2() const { return base + std::log2(sum); }
};

// Of the mixture in one tile.
template <class S>
struct TileMass {
  double base;
  S sum, max;

  Mass mass() const { return {sum == 0 ? Mass().base : base, sum}; }
};

// The two models' rows, tile by tile in statistics dtype.
template <class S>
class TileReader {
 public:
  TileReader(const char* policy, DType policy_dtype, const char* ref, DType ref_dtype,
             int64_t vocab)
      : policy_(policy),
        ref_(ref),
        policy_dtype_(policy_dtype),
        ref_dtype_(ref_dtype),
        vocab_(vocab) {}

  int64_t tiles() const { return (vocab_ + kTile - 1) / kTile; }
  int64_t vocab() const { return vocab_; }

  // valid until the next call
  TileLogits<S> read(int64_t start, int64_t n) {
    return {logits(policy_, policy_dtype_, start, n, policy_x_),
            ref_ ? logits(ref_, ref_dtype_, start, n, ref_x_) : nullptr, n};
  }
  TileLogits<S> read_tile(int64_t tile) {
    const int64_t start = tile * kTile;
    return read(start, std::min(kTile, vocab_ - start));
  }

 private:
  static const S* logits(const char* row, DType dtype, int64_t start, int64_t n, S* x) {
    constexpr DType kOwn = sizeof(S) == 8 ? DType::float64 : DType::float32;
    if (dtype == kOwn && n % (kPadding / 2) == 0) return reinterpret_cast<const S*>(row) + start;
    load(row, dtype, start, n, x);
    // the tile after it: the hardware stops at the end of a page
    const char* next = row + (start + n) * element_size(dtype);
    for (int64_t i = 0; i < n * element_size(dtype); i += 64) __builtin_prefetch(next + i);
    std::fill(x + n, x + (n + kPadding - 1) / kPadding * kPadding, kNever<S>);
    return x;
  }

  const char *policy_, *ref_;
  DType policy_dtype_, ref_dtype_;
  int64_t vocab_;
  alignas(64) S policy_x_[kTile], ref_x_[kTile];
};

// What is subtracted from scores, so that their powers are numbers of S.
template <class S>
struct Anchors {
  ByModel<S> at;
  bool usable = false;

  Anchors() = default;
  // at the largest logits
  Anchors(const ByModel<S>& max, S scale);

  void raise(const Anchors& other);
};

// Tiles of a piece: what one thread takes of a row that several share. Masses depend on it in their
// last digits, so it does not depend on the threads.
constexpr int64_t kPiece = 8;

// Adds up the tiles of a piece, one after the other.
template <class S>
class PieceMass {
 public:
  TileMass<S> add(const TileLogits<S>& tile, const Mixture<S>& how);

  const ByModel<Mass>& mass() const { return mass_; }

 private:
  ByModel<Mass> mass_;
  Anchors<S> anchors_;
};

// A row's masses from those of its pieces.
inline void add(ByModel<Mass>& whole, const ByModel<Mass>& piece) {
  whole.policy.add(piece.policy);
  whole.ref.add(piece.ref);
  whole.mixture.add(piece.mixture);
}

// Stage 2: the lane of a tile that wins its race, or -1 if all mixed logits are -inf.
template <class S>
int64_t draw_lane(const S* mixed, int64_t n, S scale, int64_t tile, Noise noise);

// An id with its logits.
template <class S>
struct Token {
  int64_t id = -1;
  S policy = 0, ref = 0, mixed = 0;
};

template <class S>
struct Drawn {
  int64_t token = -1;
  S policy_logprob = std::numeric_limits<S>::quiet_NaN();
  S ref_logprob = policy_logprob, sampling_logprob = policy_logprob;
  S log_kept_mass = policy_logprob;
};

// Whether there is something to draw from.
template <class S>
bool usable(const Mixture<S>& how, const ByModel<Mass>& mass, S temperature);

// What is returned of a token; kept is the logarithm of the mass that the filters kept, to base 2.
template <class S>
Drawn<S> drawn(const Token<S>& token, const Mixture<S>& how, const ByModel<Mass>& mass, double kept,
               S temperature);

// Draws from a row with these masses; temperature 0 takes the largest mixed logit. That and filters
// need the tiles' maxima.
template <class S>
Drawn<S> draw(TileReader<S>& reader, const Mixture<S>& how, const ByModel<Mass>& mass,
              const std::vector<TileMass<S>>& tiles, S temperature, const Filters<S>& filters,
              Noise noise);

}  // namespace nlhf
