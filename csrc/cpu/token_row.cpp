#include "cpu/token_row.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/tile.h"

namespace nlhf {
namespace {

template <class S>
constexpr S kNever = -std::numeric_limits<S>::infinity();

// Tempered scores of a tile; slope, if not null, gets the derivative of the softcap if there is
// one.
template <class S>
void load_scores(const char* row, DType dtype, int64_t start, int64_t n, ScoreSettings<S> settings,
                 S* x, S* slope) {
  load(row, dtype, start, n, x);
  if (settings.softcap != 0) softcap(x, n, settings.softcap, slope);
  if (settings.temperature != 1) divide(x, n, settings.temperature);
}

// Softmax and the mean of its exponents so far, relative to the largest score so far.
template <class S>
struct Running {
  S max = kNever<S>, sum = 0, weighted = 0;

  void add(const S* x, int64_t n) {
    const S tile_max = maximum(x, n);
    const S top = std::max(max, tile_max);
    // without a finite score the shift must not turn -inf into NaN
    const S shift = top == kNever<S> ? S(0) : top;
    const Moments<S> tile = exp_moments(x, n, shift);
    const S drop = max - shift;
    const S scale = exponential(drop);
    if (scale > 0) {
      weighted = scale * (weighted + sum * drop);
      sum *= scale;
    } else if (sum == sum) {
      weighted = sum = 0;
    }
    weighted += tile.weighted;
    sum += tile.sum;
    max = top;
  }
};

}  // namespace

template <class S>
TokenRow<S> token_row(const char* row, DType dtype, int64_t vocab, int64_t token,
                      ScoreSettings<S> settings) {
  alignas(64) S x[kTile];
  Running<S> all;
  S chosen = std::numeric_limits<S>::quiet_NaN();
  for (int64_t start = 0; start < vocab; start += kTile) {
    const int64_t n = std::min(kTile, vocab - start);
    load_scores<S>(row, dtype, start, n, settings, x, nullptr);
    all.add(x, n);
    if (token >= start && token < start + n) chosen = x[token - start];
  }
  const S log_sum = std::log(all.sum);
  return {(chosen - all.max) - log_sum, log_sum - all.weighted / all.sum, all.max + log_sum};
}

template <class S>
void token_row_grad(char* grad, const char* row, DType dtype, int64_t vocab, int64_t token, S lse,
                    S entropy, S grad_logprob, S grad_entropy, ScoreSettings<S> settings) {
  alignas(64) S x[kTile], slope[kTile];
  if (token < 0 || token >= vocab) grad_logprob = 0;
  grad_logprob /= settings.temperature;
  grad_entropy /= settings.temperature;
  for (int64_t start = 0; start < vocab; start += kTile) {
    const int64_t n = std::min(kTile, vocab - start);
    load_scores(row, dtype, start, n, settings, x, slope);
    softmax_gradient(x, n, lse, entropy, grad_logprob, grad_entropy);
    if (token >= start && token < start + n) x[token - start] += grad_logprob;
    if (settings.softcap != 0) multiply(x, n, slope);
    store(x, n, grad, dtype, start);
  }
}

#define NLHF_INSTANTIATE(S)                                                                  \
  template TokenRow<S> token_row<S>(const char*, DType, int64_t, int64_t, ScoreSettings<S>); \
  template void token_row_grad<S>(char*, const char*, DType, int64_t, int64_t, S, S, S, S,   \
                                  ScoreSettings<S>)
NLHF_INSTANTIATE(float);
NLHF_INSTANTIATE(double);
#undef NLHF_INSTANTIATE

}  // namespace nlhf
