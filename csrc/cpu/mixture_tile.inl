// The kernels of mixture_tile.h over a type of lanes, which brings the instruction set. Included
// once for each level, in a namespace of its own.

template <class Lanes, Mix kMix>
struct MixtureKernels {
  using S = typename Lanes::S;
  using F = typename Lanes::F;
  static constexpr int kWidth = Lanes::kWidth;

  static NLHF_INLINE F mixed(F x, F y, F policy_coef, F ref_coef) {
    if constexpr (kMix == Mix::alone || kMix == Mix::policy) return x;
    if constexpr (kMix == Mix::ref) return y;
    const F z = Lanes::multiply_add(ref_coef, y, Lanes::multiply(policy_coef, x));
    if constexpr (kMix == Mix::both) return z;
    const F never = Lanes::all(kNever<S>);
    return Lanes::where(Lanes::equal(x, never), never,
                        Lanes::where(Lanes::equal(y, never), never, z));
  }

  // the two models' lanes at i
  static NLHF_INLINE void load(const TileLogits<S>& tile, int64_t i, F& x, F& y) {
    x = Lanes::load(tile.policy + i);
    if constexpr (kMix == Mix::alone) {
      y = x;
    } else {
      y = Lanes::load(tile.ref + i);
    }
  }

  template <bool kMax>
  static TileSums<S> sums(const TileLogits<S>& tile, const Mixture<S>& how,
                          const ByModel<S>& anchor) {
    constexpr bool kBoth = kMix == Mix::both || kMix == Mix::anything;
    const F policy_coef = Lanes::all(how.policy_coef), ref_coef = Lanes::all(how.ref_coef);
    const F scale = Lanes::all(how.scale);
    const F policy_scale = Lanes::all(how.policy_coef * how.scale);
    const F ref_scale = Lanes::all(how.ref_coef * how.scale);
    const F policy_anchor = Lanes::all(-anchor.policy), ref_anchor = Lanes::all(-anchor.ref);
    const F mixture_anchor = Lanes::all(-anchor.mixture);
    F policy = Lanes::all(0), ref = policy, mixture = policy, max = Lanes::all(kNever<S>);
    for (int64_t i = 0; i < tile.n; i += kWidth) {
      F x, y;
      load(tile, i, x, y);
      // a tile ahead: the hardware stops at the end of a page
      __builtin_prefetch(tile.policy + i + kTile);
      if constexpr (kMix != Mix::alone) __builtin_prefetch(tile.ref + i + kTile);
      policy = Lanes::add(policy, Lanes::power(Lanes::multiply_add(x, scale, policy_anchor)));
      if constexpr (kMix != Mix::alone)
        ref = Lanes::add(ref, Lanes::power(Lanes::multiply_add(y, scale, ref_anchor)));
      F score;
      if constexpr (kMax || kMix == Mix::anything) {
        const F z = mixed(x, y, policy_coef, ref_coef);
        max = Lanes::larger(z, max);
        score = Lanes::multiply_add(z, scale, mixture_anchor);
      } else {
        // where nobody asks for the mixed logit, its score takes one step less
        score = Lanes::multiply_add(x, policy_scale, mixture_anchor);
        score = Lanes::multiply_add(y, ref_scale, score);
      }
      if constexpr (kBoth) mixture = Lanes::add(mixture, Lanes::power(score));
    }
    TileSums<S> out{{Lanes::sum(policy), Lanes::sum(ref), Lanes::sum(mixture)}, Lanes::top(max)};
    if (kMix == Mix::alone || kMix == Mix::policy) out.sum.mixture = out.sum.policy;
    if (kMix == Mix::ref) out.sum.mixture = out.sum.ref;
    return out;
  }

  static void mix(const TileLogits<S>& tile, const Mixture<S>& how, S* out) {
    const F policy_coef = Lanes::all(how.policy_coef), ref_coef = Lanes::all(how.ref_coef);
    for (int64_t i = 0; i < tile.n; i += kWidth) {
      F x, y;
      load(tile, i, x, y);
      Lanes::store(out + i, mixed(x, y, policy_coef, ref_coef));
    }
  }

  static ByModel<S> maxima(const TileLogits<S>& tile, const Mixture<S>& how) {
    const F policy_coef = Lanes::all(how.policy_coef), ref_coef = Lanes::all(how.ref_coef);
    F policy = Lanes::all(kNever<S>), ref = policy, mixture = policy;
    for (int64_t i = 0; i < tile.n; i += kWidth) {
      F x, y;
      load(tile, i, x, y);
      policy = Lanes::larger(x, policy);
      ref = Lanes::larger(y, ref);
      mixture = Lanes::larger(mixed(x, y, policy_coef, ref_coef), mixture);
    }
    return {Lanes::top(policy), Lanes::top(ref), Lanes::top(mixture)};
  }

  // kAbove: whether anything may be at least high
  template <bool kAbove>
  static int64_t split(const TileLogits<S>& tile, const Mixture<S>& how, S max, S low, S high,
                       Above<S>* above, S* middle) {
    constexpr int kGroup = kPadding / kWidth;
    const F policy_coef = Lanes::all(how.policy_coef), ref_coef = Lanes::all(how.ref_coef);
    const F scale = Lanes::all(how.scale), top = Lanes::all(max);
    const F lowest = Lanes::all(low), highest = Lanes::all(high);
    F mass = Lanes::all(0);
    int64_t count = 0, between = 0;
    for (int64_t i = 0; i < tile.n; i += kPadding) {
      const int64_t left = tile.n - i;
      const int group = left < kPadding ? (left + kWidth - 1) / kWidth : kGroup;
      F z[kGroup];
      F most = Lanes::all(kNever<S>);
      for (int g = 0; g < group; ++g) {
        F x, y;
        load(tile, i + g * kWidth, x, y);
        z[g] = mixed(x, y, policy_coef, ref_coef);
        most = Lanes::larger(z[g], most);
      }
      // a branch for each register would be guessed wrong too often
      if (!Lanes::any(Lanes::at_least(most, lowest))) continue;
      for (int g = 0; g < group; ++g) {
        auto inside = Lanes::at_least(z[g], lowest);
        if constexpr (kAbove) {
          const auto over = Lanes::at_least(z[g], highest);
          const F weight = Lanes::power(Lanes::multiply(Lanes::subtract(z[g], top), scale));
          mass = Lanes::add(mass, Lanes::where(over, weight, Lanes::all(0)));
          count += Lanes::count(over);
          inside = Lanes::without(inside, over);
        }
        if (middle) Lanes::compress(middle + between, inside, z[g]);
        between += Lanes::count(inside);
      }
    }
    *above = {count, Lanes::sum(mass)};
    return between;
  }
};

template <class Lanes>
struct ValueKernels {
  using S = typename Lanes::S;
  using F = typename Lanes::F;
  static constexpr int kWidth = Lanes::kWidth;

  static S power_sum(const S* x, int64_t n, S max, S scale) {
    const F top = Lanes::all(max), factor = Lanes::all(scale);
    F sum = Lanes::all(0);
    for (int64_t i = 0; i < n; i += kWidth) {
      const F below = Lanes::subtract(Lanes::load(x + i), top);
      sum = Lanes::add(sum, Lanes::power(Lanes::multiply(below, factor)));
    }
    return Lanes::sum(sum);
  }

  static void powers(const S* x, int64_t n, S max, S scale, S* weight) {
    const F top = Lanes::all(max), factor = Lanes::all(scale);
    for (int64_t i = 0; i < n; i += kWidth) {
      const F below = Lanes::subtract(Lanes::load(x + i), top);
      Lanes::store(weight + i, Lanes::power(Lanes::multiply(below, factor)));
    }
  }

  static Above<double> at_least(const S* x, const S* weight, int64_t n, S bound) {
    const F least = Lanes::all(bound);
    Above<double> out{0, 0};
    // in pieces, so that the sums of a long buffer keep their digits
    for (int64_t start = 0; start < n; start += kTile) {
      const int64_t end = start + kTile < n ? start + kTile : n;
      F mass = Lanes::all(0);
      for (int64_t i = start; i < end; i += kWidth) {
        const auto over = Lanes::at_least(Lanes::load(x + i), least);
        mass = Lanes::add(mass, Lanes::where(over, Lanes::load(weight + i), Lanes::all(0)));
        out.count += Lanes::count(over);
      }
      out.mass += Lanes::sum(mass);
    }
    return out;
  }

  static int64_t narrow(const S* x, const S* weight, int64_t n, S low, S high, S* x_out,
                        S* weight_out) {
    const F lowest = Lanes::all(low), highest = Lanes::all(high);
    int64_t kept = 0;
    for (int64_t i = 0; i < n; i += kWidth) {
      const F value = Lanes::load(x + i), its_weight = Lanes::load(weight + i);
      const auto inside =
          Lanes::without(Lanes::at_least(value, lowest), Lanes::at_least(value, highest));
      if (!Lanes::any(inside)) continue;
      Lanes::compress(x_out + kept, inside, value);
      Lanes::compress(weight_out + kept, inside, its_weight);
      kept += Lanes::count(inside);
    }
    for (int64_t i = 0; i < kPadding; i += kWidth)
      Lanes::store(x_out + kept + i, Lanes::all(kNever<S>));
    return kept;
  }
};

template <class Lanes>
struct Dispatch {
  using S = typename Lanes::S;

  // calls the kernel of the way of mixing
#define NLHF_BY_MIX(call)                              \
  switch (how.mix) {                                   \
    case Mix::alone:                                   \
      return MixtureKernels<Lanes, Mix::alone>::call;  \
    case Mix::policy:                                  \
      return MixtureKernels<Lanes, Mix::policy>::call; \
    case Mix::ref:                                     \
      return MixtureKernels<Lanes, Mix::ref>::call;    \
    case Mix::both:                                    \
      return MixtureKernels<Lanes, Mix::both>::call;   \
    case Mix::anything:                                \
      break;                                           \
  }                                                    \
  return MixtureKernels<Lanes, Mix::anything>::call

  static TileSums<S> sums(const TileLogits<S>& tile, const Mixture<S>& how,
                          const ByModel<S>& anchor) {
    if (how.wants_max) {
      NLHF_BY_MIX(template sums<true>(tile, how, anchor));
    }
    NLHF_BY_MIX(template sums<false>(tile, how, anchor));
  }
  static void mix(const TileLogits<S>& tile, const Mixture<S>& how, S* out) {
    NLHF_BY_MIX(mix(tile, how, out));
  }
  static ByModel<S> maxima(const TileLogits<S>& tile, const Mixture<S>& how) {
    NLHF_BY_MIX(maxima(tile, how));
  }
  static int64_t split(const TileLogits<S>& tile, const Mixture<S>& how, S max, S low, S high,
                       Above<S>* above, S* middle) {
    if (high > max) {
      NLHF_BY_MIX(template split<false>(tile, how, max, low, high, above, middle));
    }
    NLHF_BY_MIX(template split<true>(tile, how, max, low, high, above, middle));
  }
#undef NLHF_BY_MIX

  static constexpr TileKernels<S> kernels{sums,
                                          mix,
                                          maxima,
                                          ValueKernels<Lanes>::power_sum,
                                          split,
                                          ValueKernels<Lanes>::powers,
                                          ValueKernels<Lanes>::at_least,
                                          ValueKernels<Lanes>::narrow};
};
