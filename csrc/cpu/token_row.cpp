#include "cpu/token_row.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "cpu/token_tile.h"

namespace nlhf {
namespace {

constexpr double kLn2 = 0.69314718055994531, kLog2E = 1.4426950408889634;

template <class S>
constexpr S kNever = -std::numeric_limits<S>::infinity();

template <class S>
S score_scale(ScoreSettings<S> settings) {
  return std::min(static_cast<S>(kLog2E / settings.temperature), std::numeric_limits<S>::max());
}

template <class S>
bool is_own(DType dtype) {
  return dtype == (sizeof(S) == 8 ? DType::float64 : DType::float32);
}

int64_t rounded_up(int64_t n) { return (n + kStep - 1) / kStep * kStep; }

// A row, tile by tile in statistics dtype and after the softcap.
template <class S>
class RowReader {
 public:
  RowReader(const char* row, DType dtype, S softcap) : row_(row), dtype_(dtype), cap_(softcap) {}

  // valid until the next call; slope, if not null, gets the derivative of the softcap if there is
  // one
  const S* read(int64_t start, int64_t n, S* slope = nullptr) {
    if (is_own<S>(dtype_) && cap_ == 0 && n % kStep == 0)
      return reinterpret_cast<const S*>(row_) + start;
    load(row_, dtype_, start, n, x_);
    // the tile after it: the hardware stops at the end of a page
    const int64_t size = element_size(dtype_);
    for (int64_t i = 0; i < n * size; i += 64) __builtin_prefetch(row_ + (start + n) * size + i);
    if (cap_ != 0) softcap(x_, n, cap_, slope);
    std::fill(x_ + n, x_ + rounded_up(n), kNever<S>);
    return x_;
  }

  S one(int64_t i) const {
    S x;
    load(row_, dtype_, i, 1, &x);
    if (cap_ != 0) softcap<S>(&x, 1, cap_, nullptr);
    return x;
  }

 private:
  const char* row_;
  DType dtype_;
  S cap_;
  alignas(64) S x_[kTile];
};

// What is subtracted from a model's logits: the largest of the tiles that asked for it, so that no
// tile needs its own.
template <class S>
struct Anchor {
  S at = 0;
  bool found = false;

  // to the largest of x, if that is larger: returns the step down of all logits so far
  double raise(const S* x, int64_t n) {
    const S top = maximum(x, n);
    if (found ? !(top > at) : top == kNever<S>) return 0;
    // before the first there is no power to step down
    const double step = found ? static_cast<double>(at) - top : 0;
    at = top;
    found = true;
    return step;
  }
};

// The sums of token_tile.h over the tiles so far, relative to the anchors.
template <class S>
class RowSums {
 public:
  explicit RowSums(ScoreSettings<S> settings)
      : scale_(score_scale(settings)), temperature_(settings.temperature) {}

  // y is null without a reference
  void add(const S* x, const S* y, int64_t n) {
    if (!policy_.found) policy_.raise(x, n);
    if (y && !ref_.found) ref_.raise(y, n);
    TokenKlSums<S> tile = sums(x, y, n);
    if (!(exact(tile.sum) && exact(tile.ref_sum))) {
      if (!exact(tile.sum)) step_down(policy_.raise(x, n) * scale_);
      if (!exact(tile.ref_sum)) step_ref_down(ref_.raise(y, n) * scale_);
      tile = sums(x, y, n);
    }
    sum_ += tile.sum;
    weighted_ += tile.weighted;
    ref_sum_ += tile.ref_sum;
    relative_ += tile.relative;
  }

  TokenRow<S> row(S x, S y) const {
    const double log_sum = std::log2(sum_), ref_log_sum = std::log2(ref_sum_);
    const auto natural = [](double value) { return static_cast<S>(kLn2 * value); };
    TokenRow<S> out;
    out.logprob = natural((static_cast<double>(x) - policy_.at) * scale_ - log_sum);
    out.entropy = natural(log_sum - weighted_ / sum_);
    out.lse = static_cast<S>(policy_.at / temperature_ + kLn2 * log_sum);
    out.ref_logprob = natural((static_cast<double>(y) - ref_.at) * scale_ - ref_log_sum);
    out.ref_lse = static_cast<S>(ref_.at / temperature_ + kLn2 * ref_log_sum);
    out.kl = natural(relative_ / sum_ - log_sum + ref_log_sum);
    return out;
  }

 private:
  // above, a score would have too few digits after the point
  static bool exact(S sum) { return sum < (1 << 14); }

  TokenKlSums<S> sums(const S* x, const S* y, int64_t n) const {
    const TokenKernels<S>& kernels = token_kernels<S>();
    if (y) return kernels.kl_sums(x, y, n, scale_, policy_.at, ref_.at);
    const TokenSums<S> policy = kernels.sums(x, n, scale_, policy_.at);
    return {policy.sum, policy.weighted, 0, 0};
  }

  void step_down(double step) {
    if (step == 0) return;
    // what has become 0 must not bring an infinite ratio along
    constexpr double kGone = sizeof(S) == 8 ? -1074 : -149;
    const double factor = step < kGone ? 0 : std::exp2(step);
    weighted_ = factor > 0 ? factor * (weighted_ + sum_ * step) : 0;
    relative_ = factor > 0 ? factor * (relative_ + sum_ * step) : 0;
    sum_ *= factor;
  }

  void step_ref_down(double step) {
    if (step == 0) return;
    relative_ -= sum_ * step;
    ref_sum_ *= std::exp2(step);
  }

  S scale_;
  double temperature_;
  Anchor<S> policy_, ref_;
  double sum_ = 0, weighted_ = 0, ref_sum_ = 0, relative_ = 0;
};

// What makes a model's scores log-probabilities: a step that is subtracted from logits, one that is
// from scores, and the rest, which S could not hold.
template <class S>
struct Normaliser {
  S from_logits = 0, from_scores = 0;
  double rest;

  Normaliser(S lse, double temperature) {
    const double log2 = lse * kLog2E;
    if (std::fabs(log2) <= token_kernels<S>().largest_base) {
      from_scores = static_cast<S>(log2);
      rest = log2 - from_scores;
    } else {
      from_logits = static_cast<S>(lse * temperature);
      // more than that is what lse itself has lost
      rest = std::clamp(log2 - from_logits * (kLog2E / temperature), -1.0, 1.0);
    }
  }

  // buffer has room for a tile
  const S* near(const S* x, int64_t n, S* buffer) const {
    if (from_logits == 0) return x;
    for (int64_t i = 0; i < rounded_up(n); ++i) buffer[i] = x[i] - from_logits;
    return buffer;
  }
};

// A row's gradient, tile by tile: without the token's own part, and the softcap's.
template <class S>
class RowGradient {
 public:
  RowGradient(const TokenRow<S>& saved, const TokenRowGrad<S>& grad, ScoreSettings<S> settings)
      : policy_(saved.lse, settings.temperature), ref_(saved.ref_lse, settings.temperature) {
    // of all powers: what their normaliser lacks, and the temperature
    const double factor = std::exp2(-policy_.rest) / settings.temperature;
    double constant = -static_cast<double>(grad.logprob);
    how_ = {score_scale(settings), policy_.from_scores, ref_.from_scores, 0, 0, 0};
    // 0 leaves a term out, because 0 * inf would be NaN
    if (grad.entropy != 0) {
      constant -= grad.entropy * (saved.entropy - kLn2 * policy_.rest);
      how_.by_score = static_cast<S>(-factor * kLn2 * grad.entropy);
    }
    if (grad.kl != 0) {
      constant -= grad.kl * (saved.kl - kLn2 * (ref_.rest - policy_.rest));
      how_.by_ratio = static_cast<S>(factor * kLn2 * grad.kl);
    }
    how_.constant = static_cast<S>(factor * constant);
  }

  // y is null without a gradient of the KL
  void write(const S* x, const S* y, int64_t n, S* out) const {
    alignas(64) S x_buffer[kTile], y_buffer[kTile];
    x = policy_.near(x, n, x_buffer);
    if (y) y = ref_.near(y, n, y_buffer);
    token_kernels<S>().gradient(x, y, n, how_, out);
  }

 private:
  Normaliser<S> policy_, ref_;
  TokenGradient<S> how_;
};

}  // namespace

template <class S>
TokenRow<S> token_row(const ModelRows& rows, int64_t token, ScoreSettings<S> settings) {
  RowReader<S> policy(rows.policy, rows.policy_dtype, settings.softcap);
  RowReader<S> ref(rows.ref, rows.ref_dtype, settings.softcap);
  RowSums<S> sums(settings);
  for (int64_t start = 0; start < rows.vocab; start += kTile) {
    const int64_t n = std::min(kTile, rows.vocab - start);
    sums.add(policy.read(start, n), rows.ref ? ref.read(start, n) : nullptr, n);
  }
  S x = std::numeric_limits<S>::quiet_NaN(), y = x;
  if (token >= 0 && token < rows.vocab) {
    x = policy.one(token);
    if (rows.ref) y = ref.one(token);
  }
  return sums.row(x, y);
}

template <class S>
void token_row_grad(char* out, DType out_dtype, const ModelRows& rows, int64_t token,
                    const TokenRow<S>& saved, TokenRowGrad<S> grad, ScoreSettings<S> settings) {
  if ((token < 0 || token >= rows.vocab) && token != kElsewhere) grad.logprob = 0;
  const bool none = grad.logprob == 0 && grad.entropy == 0 && grad.kl == 0;
  // a row with a finite normaliser holds no NaN
  if (none && std::isfinite(saved.lse)) {
    std::memset(out, 0, rows.vocab * element_size(out_dtype));
    return;
  }
  const RowGradient<S> gradient(saved, grad, settings);
  const S at_token = grad.logprob / settings.temperature;
  RowReader<S> policy(rows.policy, rows.policy_dtype, settings.softcap);
  RowReader<S> ref(rows.ref, rows.ref_dtype, settings.softcap);
  alignas(64) S slope[kTile], buffer[kTile];
  for (int64_t start = 0; start < rows.vocab; start += kTile) {
    const int64_t n = std::min(kTile, rows.vocab - start);
    const S* x = policy.read(start, n, slope);
    const S* y = grad.kl != 0 ? ref.read(start, n) : nullptr;
    const bool direct = is_own<S>(out_dtype) && n % kStep == 0;
    S* tile = direct ? reinterpret_cast<S*>(out) + start : buffer;
    gradient.write(x, y, n, tile);
    if (token >= start && token < start + n) tile[token - start] += at_token;
    if (settings.softcap != 0) multiply(tile, n, slope);
    if (!direct) store(tile, n, out, out_dtype, start);
  }
}

#define NLHF_INSTANTIATE(S)                                                                    \
  template TokenRow<S> token_row<S>(const ModelRows&, int64_t, ScoreSettings<S>);              \
  template void token_row_grad<S>(char*, DType, const ModelRows&, int64_t, const TokenRow<S>&, \
                                  TokenRowGrad<S>, ScoreSettings<S>)
NLHF_INSTANTIATE(float);
NLHF_INSTANTIATE(double);
#undef NLHF_INSTANTIATE

}  // namespace nlhf
