#include "cpu/mixture_row.h"

#include "common/simd.h"
#include "cpu/filters.h"

namespace nlhf {
namespace {

constexpr double kLn2 = 0.69314718055994531;

// from here on the rounding of an anchor would be a power by itself
template <class S>
bool fits(S anchor) {
  return std::fabs(anchor) < (1 << 20);
}

// Whether these are sums over powers of scores, and not what an overflow left.
template <class S>
bool in_range(const ByModel<S>& sum) {
  constexpr S kBig = S(1 << 30) * S(1 << 30) * S(1 << 30);
  return sum.policy < kBig && sum.ref < kBig && sum.mixture < kBig;
}

// For any scores: shifted by the maximum of these. NaN and inf come out as a sum of NaN, and stay.
template <class S>
Mass exact_mass(const S* x, int64_t n, S max, S scale) {
  if (max == kNever<S>) return {Mass().base, tile_kernels<S>().power_sum(x, n, S(0), scale)};
  return {static_cast<double>(max) * scale, tile_kernels<S>().power_sum(x, n, max, scale)};
}

template <class S>
NLHF_CLONES void add_logarithms(const S* sum, int64_t n, S* score) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) score[j] += logarithm(sum[j]);
}

template <class S>
NLHF_CLONES void add_scores(const S* x, int64_t n, S max, S scale, S* score) {
  constexpr S natural = S(kLn2);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) score[i] += (x[i] - max) * scale * natural;
}

// -1 if all are -inf
template <class S>
int64_t first_largest(const S* x, int64_t n) {
  const S top = maximum(x, n);
  return top == kNever<S> ? -1 : std::find(x, x + n, top) - x;
}

// Stage 1: the tile with the largest noisy log-mass, relative to 2^base; -1 if none has any.
template <class S>
int64_t draw_tile(const std::vector<TileMass<S>>& tiles, double base, const Selection<S>& kept,
                  Noise noise) {
  const int64_t n = tiles.size();
  thread_local std::vector<S> sums, scores;
  sums.resize(n);
  scores.resize(n);
  noise.of_tiles(0, n, scores.data());
  for (int64_t j = 0; j < n; ++j) {
    if (kept.all()) {
      sums[j] = tiles[j].sum;
      if (tiles[j].base != base && sums[j] > 0) scores[j] += kLn2 * (tiles[j].base - base);
    } else {
      sums[j] = kept.tile_mass(j);
    }
  }
  add_logarithms(sums.data(), n, scores.data());
  return first_largest(scores.data(), n);
}

}  // namespace

template <class S>
Anchors<S>::Anchors(const ByModel<S>& max, S scale)
    : at{max.policy * scale, max.ref * scale, max.mixture * scale} {
  usable = fits(at.policy) && fits(at.ref) && fits(at.mixture);
}

template <class S>
void Anchors<S>::raise(const Anchors& other) {
  if (!other.usable) return;
  if (!usable) *this = other;
  at.policy = std::max(at.policy, other.at.policy);
  at.ref = std::max(at.ref, other.at.ref);
  at.mixture = std::max(at.mixture, other.at.mixture);
}

template <class S>
TileMass<S> PieceMass<S>::add(const TileLogits<S>& tile, const Mixture<S>& how) {
  const TileKernels<S>& kernels = tile_kernels<S>();
  if (!anchors_.usable) {
    // a few say enough: their own powers are part of the sum
    const TileLogits<S> few{tile.policy, tile.ref, std::min(kPadding, tile.n)};
    anchors_ = Anchors<S>(kernels.maxima(few, how), how.scale);
  }
  if (anchors_.usable) {
    const ByModel<S>& at = anchors_.at;
    const TileSums<S> sums = kernels.sums(tile, how, at);
    if (in_range(sums.sum)) {
      mass_.policy.add({at.policy, sums.sum.policy});
      if (tile.ref) mass_.ref.add({at.ref, sums.sum.ref});
      mass_.mixture.add({at.mixture, sums.sum.mixture});
      return {at.mixture, sums.sum.mixture, sums.max};
    }
  }
  alignas(64) S mixed[kTile];
  kernels.mix(tile, how, mixed);
  const ByModel<S> max = kernels.maxima(tile, how);
  const Mass mixture = exact_mass(mixed, tile.n, max.mixture, how.scale);
  mass_.policy.add(exact_mass(tile.policy, tile.n, max.policy, how.scale));
  if (tile.ref) mass_.ref.add(exact_mass(tile.ref, tile.n, max.ref, how.scale));
  mass_.mixture.add(mixture);
  anchors_.raise(Anchors<S>(max, how.scale));
  return {mixture.base, static_cast<S>(mixture.sum), max.mixture};
}

template <class S>
int64_t draw_lane(const S* mixed, int64_t n, S scale, int64_t tile, Noise noise) {
  const S max = maximum(mixed, n);
  if (max == kNever<S>) return -1;
  alignas(64) S scores[kTile];
  noise.of_lanes(tile, n, scores);
  add_scores(mixed, n, max, scale, scores);
  return first_largest(scores, n);
}

template <class S>
bool usable(const Mixture<S>& how, const ByModel<Mass>& mass, S temperature) {
  const bool ref = how.mix == Mix::alone || mass.ref.usable();
  return ref && mass.policy.usable() && mass.mixture.usable() && temperature >= 0 &&
         std::isfinite(temperature);
}

template <class S>
Drawn<S> drawn(const Token<S>& token, const Mixture<S>& how, const ByModel<Mass>& mass, double kept,
               S temperature) {
  const bool greedy = temperature == 0;
  const auto logprob = [&](S x, double whole) {
    return static_cast<S>(kLn2 * (x * static_cast<double>(how.scale) - whole));
  };
  Drawn<S> out;
  out.token = token.id;
  out.policy_logprob = logprob(token.policy, mass.policy.log2());
  if (how.mix != Mix::alone) out.ref_logprob = logprob(token.ref, mass.ref.log2());
  out.sampling_logprob = greedy ? S(0) : logprob(token.mixed, kept);
  out.log_kept_mass = greedy ? S(0) : S(std::min(0.0, kLn2 * (kept - mass.mixture.log2())));
  return out;
}

template <class S>
Drawn<S> draw(TileReader<S>& reader, const Mixture<S>& how, const ByModel<Mass>& mass,
              const std::vector<TileMass<S>>& tiles, S temperature, const Filters<S>& filters,
              Noise noise) {
  if (!usable(how, mass, temperature)) return {};
  S max = kNever<S>;
  for (const TileMass<S>& tile : tiles) max = std::max(max, tile.max);

  const bool greedy = temperature == 0;
  Selection<S> kept;
  double kept_log2 = mass.mixture.log2();
  int64_t j = 0;
  if (greedy) {
    while (tiles[j].max != max) ++j;
  } else {
    if (!filters.off(reader.vocab())) {
      const double top = max * static_cast<double>(how.scale);
      kept = select(reader, how, tiles, max, std::exp2(kept_log2 - top), filters);
      kept_log2 = std::log2(kept.mass()) + top;
    }
    j = draw_tile(tiles, mass.mixture.base, kept, noise);
  }
  if (j < 0) return {};

  const TileLogits<S> tile = reader.read_tile(j);
  alignas(64) S mixed[kTile];
  tile_kernels<S>().mix(tile, how, mixed);
  kept.drop_others(j, mixed, tile.n);
  const int64_t lane = greedy ? std::find(mixed, mixed + tile.n, max) - mixed
                              : draw_lane(mixed, tile.n, how.scale, j, noise);
  if (lane < 0) return {};
  const Token<S> token{j * kTile + lane, tile.policy[lane], tile.ref ? tile.ref[lane] : S(0),
                       mixed[lane]};
  return drawn(token, how, mass, kept_log2, temperature);
}

#define NLHF_INSTANTIATE(S)                                                                        \
  template class PieceMass<S>;                                                                     \
  template int64_t draw_lane<S>(const S*, int64_t, S, int64_t, Noise);                             \
  template bool usable<S>(const Mixture<S>&, const ByModel<Mass>&, S);                             \
  template Drawn<S> drawn<S>(const Token<S>&, const Mixture<S>&, const ByModel<Mass>&, double, S); \
  template Drawn<S> draw<S>(TileReader<S>&, const Mixture<S>&, const ByModel<Mass>&,               \
                            const std::vector<TileMass<S>>&, S, const Filters<S>&, Noise)
NLHF_INSTANTIATE(float);
NLHF_INSTANTIATE(double);
#undef NLHF_INSTANTIATE

}  // namespace nlhf
