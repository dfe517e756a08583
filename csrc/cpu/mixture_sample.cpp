#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "common/parallel.h"
#include "common/philox.h"
#include "cpu/ops.h"
#include "cpu/tile.h"

namespace nlhf {
namespace {

template <class S>
constexpr S kNever = -std::numeric_limits<S>::infinity();

// Largest logit of a tile or a row, and the sum of exp((x - max) / divisor). NaN or +inf anywhere
// makes the sum NaN.
template <class S>
struct Mass {
  S max = kNever<S>, sum = 0;

  static Mass of_tile(const S* x, int64_t n, S divisor) {
    const S top = maximum(x, n);
    return {top, exp_sum(x, n, top == kNever<S> ? S(0) : top, divisor)};
  }

  void add(const Mass& other, S divisor) {
    const S top = std::max(max, other.max);
    const S shift = top == kNever<S> ? S(0) : top;
    sum = sum * exponential((max - shift) / divisor) +
          other.sum * exponential((other.max - shift) / divisor);
    max = top;
  }

  bool usable() const { return std::isfinite(max) && !std::isnan(sum); }
  S logprob(S x, S divisor) const { return (x - max) / divisor - std::log(sum); }
};

// The two models' rows and how they are mixed.
template <class S>
struct MixtureRow {
  const char* policy;
  DType policy_dtype;
  const char* ref;  // null without a reference
  DType ref_dtype;
  S coef;

  // The logits of both models in a tile.
  void load_tile(int64_t start, int64_t n, S* policy_x, S* ref_x) const {
    load(policy, policy_dtype, start, n, policy_x);
    if (ref) load(ref, ref_dtype, start, n, ref_x);
  }

  // Mixes a tile and returns where the result is: a model with coefficient 0 is not looked at.
  S* mix_tile(S* policy_x, S* ref_x, int64_t n) const {
    if (!ref || coef == 0) return policy_x;
    if (coef == 1) return ref_x;
    mix(policy_x, ref_x, n, 1 - coef, coef);
    return policy_x;
  }
};

// Statistics of a whole row.
template <class S>
struct RowMass {
  Mass<S> policy, ref, mixture;
  std::vector<Mass<S>> tiles;  // of the mixture
};

template <class S>
RowMass<S> row_mass(const MixtureRow<S>& row, int64_t vocab, S divisor) {
  alignas(64) S policy_x[kTile], ref_x[kTile];
  RowMass<S> out;
  out.tiles.reserve((vocab + kTile - 1) / kTile);
  for (int64_t start = 0; start < vocab; start += kTile) {
    const int64_t n = std::min(kTile, vocab - start);
    row.load_tile(start, n, policy_x, ref_x);
    const auto policy = Mass<S>::of_tile(policy_x, n, divisor);
    Mass<S> ref;
    if (row.ref) ref = Mass<S>::of_tile(ref_x, n, divisor);
    const S* mixed = row.mix_tile(policy_x, ref_x, n);
    const bool alone = !row.ref || row.coef == 0;
    const auto mixture = alone ? policy : row.coef == 1 ? ref : Mass<S>::of_tile(mixed, n, divisor);
    out.policy.add(policy, divisor);
    out.ref.add(ref, divisor);
    out.mixture.add(mixture, divisor);
    out.tiles.push_back(mixture);
  }
  return out;
}

// Noise of one row at one position.
struct Noise {
  int64_t seed;
  uint32_t position;

  Words words(int64_t tile, uint32_t stage, uint32_t block) const {
    return philox4x32({{position, static_cast<uint32_t>(tile), stage, block}}, seed);
  }
};

// Stage 1: the tile with the largest noisy log-mass; -1 if none has any.
template <class S>
int64_t draw_tile(const RowMass<S>& mass, S divisor, Noise noise) {
  int64_t winner = -1;
  S best = kNever<S>;
  for (size_t j = 0; j < mass.tiles.size(); ++j) {
    const Mass<S>& tile = mass.tiles[j];
    const S log_mass = (tile.max - mass.mixture.max) / divisor + std::log(tile.sum);
    const S score = log_mass + gumbel<S>(noise.words(j, 1, 0).w[0]);
    if (score > best) {
      best = score;
      winner = j;
    }
  }
  return winner;
}

// Stage 2: the id with the largest noisy score in a tile; -1 if none is finite.
template <class S>
int64_t draw_lane(const S* x, int64_t n, S max, S divisor, int64_t tile, Noise noise) {
  int64_t winner = -1;
  S best = kNever<S>;
  for (int64_t lane = 0; lane < n; lane += 4) {
    const Words words = noise.words(tile, 2, lane / 4);
    for (int64_t i = lane; i < std::min(lane + 4, n); ++i) {
      const S score = (x[i] - max) / divisor + gumbel<S>(words.w[i - lane]);
      if (score > best) {
        best = score;
        winner = i;
      }
    }
  }
  return winner;
}

// Temperature 0: the first tile that holds the maximum, then the first lane.
template <class S>
int64_t greedy_tile(const RowMass<S>& mass) {
  int64_t j = 0;
  while (mass.tiles[j].max != mass.mixture.max) ++j;
  return j;
}

template <class S>
struct Drawn {
  int64_t token = -1;
  S policy_logprob = std::numeric_limits<S>::quiet_NaN();
  S ref_logprob = policy_logprob, sampling_logprob = policy_logprob;
  S log_kept_mass = policy_logprob;
};

template <class S>
Drawn<S> draw(const MixtureRow<S>& row, int64_t vocab, S temperature, Noise noise) {
  const bool greedy = temperature == 0;
  const S divisor = greedy ? S(1) : temperature;
  const RowMass<S> mass = row_mass(row, vocab, divisor);
  const bool usable = mass.policy.usable() && mass.mixture.usable() &&
                      (!row.ref || mass.ref.usable()) && temperature >= 0;
  if (!usable) return {};

  const int64_t tile = greedy ? greedy_tile(mass) : draw_tile(mass, divisor, noise);
  if (tile < 0) return {};
  alignas(64) S policy_x[kTile], ref_x[kTile];
  const int64_t start = tile * kTile;
  const int64_t n = std::min(kTile, vocab - start);
  row.load_tile(start, n, policy_x, ref_x);
  const S* mixed = row.mix_tile(policy_x, ref_x, n);
  const S max = mass.mixture.max;
  const int64_t lane = greedy ? std::find(mixed, mixed + n, max) - mixed
                              : draw_lane(mixed, n, max, divisor, tile, noise);
  if (lane < 0) return {};

  Drawn<S> out;
  out.token = start + lane;
  out.sampling_logprob = greedy ? S(0) : mass.mixture.logprob(mixed[lane], divisor);
  // mixing may have overwritten the policy's tile
  load(row.policy, row.policy_dtype, out.token, 1, policy_x);
  out.policy_logprob = mass.policy.logprob(policy_x[0], divisor);
  if (row.ref) out.ref_logprob = mass.ref.logprob(ref_x[lane], divisor);
  out.log_kept_mass = 0;
  return out;
}

}  // namespace

template <class S>
void mixture_sample(const Logits& policy, const std::optional<Logits>& ref, PerRow<S> mixture_coef,
                    PerRow<S> temperature, PerRow<int64_t> seed, PerRow<int64_t> position,
                    MixtureSampleOut<S> out) {
  parallel_rows(policy.rows, policy.vocab, [&](int64_t n) {
    const MixtureRow<S> row{policy.row(n), policy.dtype, ref ? ref->row(n) : nullptr,
                            ref ? ref->dtype : policy.dtype, mixture_coef[n]};
    const Noise noise{seed.rows ? seed.rows[n] : fold_in(seed.value, n),
                      static_cast<uint32_t>(position[n])};
    const Drawn<S> drawn = draw(row, policy.vocab, temperature[n], noise);
    out.tokens[n] = drawn.token;
    out.policy_logprobs[n] = drawn.policy_logprob;
    if (ref) out.ref_logprobs[n] = drawn.ref_logprob;
    out.sampling_logprobs[n] = drawn.sampling_logprob;
    out.log_kept_mass[n] = drawn.log_kept_mass;
  });
}

#define NLHF_INSTANTIATE(S)                                                               \
  template void mixture_sample<S>(const Logits&, const std::optional<Logits>&, PerRow<S>, \
                                  PerRow<S>, PerRow<int64_t>, PerRow<int64_t>,            \
                                  MixtureSampleOut<S>)
NLHF_INSTANTIATE(float);
NLHF_INSTANTIATE(double);
#undef NLHF_INSTANTIATE

}  // namespace nlhf
