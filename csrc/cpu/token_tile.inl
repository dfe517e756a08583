// The kernels of token_tile.h over a type of lanes, which brings the instruction set. Included once
// for each level, in a namespace of its own.

template <class Lanes>
struct TokenTile {
  using S = typename Lanes::S;
  using F = typename Lanes::F;
  static constexpr int kWidth = Lanes::kWidth;

  // stands for all scores below it, whose powers are 0 or as good as that
  static NLHF_INLINE F finite(F t) { return Lanes::larger(t, Lanes::all(-150)); }

  // x, or 0 where e is 0
  static NLHF_INLINE F unless_zero(F e, F x) {
    return Lanes::where(Lanes::equal(e, Lanes::all(0)), e, x);
  }

  static TokenSums<S> sums(const S* x, int64_t n, S scale, S anchor) {
    const F factor = Lanes::all(scale), top = Lanes::all(anchor);
    F sum = Lanes::all(0), weighted = sum;
    for (int64_t i = 0; i < n; i += kWidth) {
      // a tile ahead: the hardware stops at the end of a page
      __builtin_prefetch(x + i + kTile);
      const F t = Lanes::multiply(Lanes::subtract(Lanes::load(x + i), top), factor);
      const F e = Lanes::power(t);
      sum = Lanes::add(sum, e);
      weighted = Lanes::multiply_add(e, finite(t), weighted);
    }
    return {Lanes::sum(sum), Lanes::sum(weighted)};
  }

  static TokenKlSums<S> kl_sums(const S* x, const S* y, int64_t n, S scale, S anchor,
                                S ref_anchor) {
    const F factor = Lanes::all(scale);
    const F top = Lanes::all(anchor), ref_top = Lanes::all(ref_anchor);
    F sum = Lanes::all(0), weighted = sum, ref_sum = sum, relative = sum;
    for (int64_t i = 0; i < n; i += kWidth) {
      __builtin_prefetch(x + i + kTile);
      __builtin_prefetch(y + i + kTile);
      const F t = Lanes::multiply(Lanes::subtract(Lanes::load(x + i), top), factor);
      const F u = Lanes::multiply(Lanes::subtract(Lanes::load(y + i), ref_top), factor);
      const F e = Lanes::power(t);
      sum = Lanes::add(sum, e);
      weighted = Lanes::multiply_add(e, finite(t), weighted);
      ref_sum = Lanes::add(ref_sum, Lanes::power(u));
      const F ratio = Lanes::multiply(e, Lanes::subtract(t, u));
      relative = Lanes::add(relative, unless_zero(e, ratio));
    }
    return {Lanes::sum(sum), Lanes::sum(weighted), Lanes::sum(ref_sum), Lanes::sum(relative)};
  }

  template <bool kScore, bool kRatio>
  static void gradient(const S* x, const S* y, int64_t n, const TokenGradient<S>& how, S* out) {
    const F factor = Lanes::all(how.scale);
    const F shift = Lanes::all(-how.base), ref_shift = Lanes::all(-how.ref_base);
    const F constant = Lanes::all(how.constant), by_score = Lanes::all(how.by_score);
    const F by_ratio = Lanes::all(how.by_ratio);
    for (int64_t i = 0; i < n; i += kWidth) {
      __builtin_prefetch(x + i + kTile);
      const F t = Lanes::multiply_add(Lanes::load(x + i), factor, shift);
      const F p = Lanes::power(t);
      F slope = constant;
      if constexpr (kScore) slope = Lanes::multiply_add(t, by_score, slope);
      if constexpr (kRatio) {
        __builtin_prefetch(y + i + kTile);
        const F u = Lanes::multiply_add(Lanes::load(y + i), factor, ref_shift);
        slope = Lanes::multiply_add(Lanes::subtract(t, u), by_ratio, slope);
      }
      // 0 whatever the slope, which may be infinite
      Lanes::store(out + i, unless_zero(p, Lanes::multiply(p, slope)));
    }
  }

  static void gradient(const S* x, const S* y, int64_t n, const TokenGradient<S>& how, S* out) {
    if (y) {
      return how.by_score != 0 ? gradient<true, true>(x, y, n, how, out)
                               : gradient<false, true>(x, y, n, how, out);
    }
    return how.by_score != 0 ? gradient<true, false>(x, y, n, how, out)
                             : gradient<false, false>(x, y, n, how, out);
  }

  static constexpr TokenKernels<S> kernels{Lanes::kFused || sizeof(S) == 8 ? 1 << 20 : 0, sums,
                                           kl_sums, gradient};
};
