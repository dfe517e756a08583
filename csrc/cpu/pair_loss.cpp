#include "cpu/pair_loss.h"

#include <cmath>
#include <limits>

namespace nlhf {
namespace {

// What the anchors leave of a pair: its margin and the log-ratio of each response.
template <class S>
struct Ratios {
  S margin, own, other;
};

template <class S>
Ratios<S> ratios(const PairLossIn<S>& in, int64_t b) {
  const S y = in.logprobs[b], z = in.other_logprobs[b];
  Ratios<S> r{y - z, y, z};
  for (int64_t j = 0; j < in.anchors; ++j) {
    const S weight = static_cast<S>(in.weights[j]);
    // 0 * inf must not be formed
    if (weight == 0) continue;
    const S own = in.anchor_logprobs[j * in.pairs + b];
    const S other = in.other_anchor_logprobs[j * in.pairs + b];
    r.margin -= weight * (own - other);
    r.own -= weight * own;
    r.other -= weight * other;
  }
  return r;
}

template <class S>
S sigmoid(S x) {
  const S e = std::exp(-std::fabs(x));
  return (x < 0 ? e : S(1)) / (1 + e);
}

template <class S>
struct Term {
  S loss, grad, other_grad;
};

template <class S>
Term<S> term(const PairLossIn<S>& in, int64_t b, const Ratios<S>& r) {
  const S p = in.preference[b], s = in.scale, h = r.margin;
  const S q = in.other_preference ? in.other_preference[b] : S(0);
  // a margin that is not a number must not end as 0, and logistic losses of infinities can
  if (!std::isfinite(h)) {
    const S nan = std::numeric_limits<S>::quiet_NaN();
    return {nan, nan, nan};
  }
  switch (in.form) {
    case PairForm::label: {
      const S grad = 2 * (p * (h - s) + (1 - p) * (h + s));
      return {p * (h - s) * (h - s) + (1 - p) * (h + s) * (h + s), grad, -grad};
    }
    case PairForm::difference: {
      const S away = h - s * (p - q);
      return {away * away, 2 * away, -2 * away};
    }
    case PairForm::response: {
      const S own = r.own - s * (p - S(0.5)), other = r.other - s * (q - S(0.5));
      return {(own * own + other * other) / 2, own, other};
    }
    case PairForm::logistic: {
      const S label = in.other_preference ? sigmoid(p - q) : p;
      const S x = s * h;
      const S loss = (x > 0 ? x : S(0)) - x * label + std::log1p(std::exp(-std::fabs(x)));
      const S grad = s * (sigmoid(x) - label);
      return {loss, grad, -grad};
    }
  }
  return {};
}

}  // namespace

template <class S>
void pair_loss(const PairLossIn<S>& in, const PairLossOut<S>& out) {
  double total = 0;
  for (int64_t b = 0; b < in.pairs; ++b) {
    const Ratios<S> r = ratios(in, b);
    const Term<S> t = term(in, b, r);
    total += t.loss;
    out.margins[b] = r.margin;
    out.grad[b] = t.grad / static_cast<S>(in.pairs);
    out.other_grad[b] = t.other_grad / static_cast<S>(in.pairs);
  }
  *out.loss = static_cast<S>(total / static_cast<double>(in.pairs ? in.pairs : 1));
}

template void pair_loss<float>(const PairLossIn<float>&, const PairLossOut<float>&);
template void pair_loss<double>(const PairLossIn<double>&, const PairLossOut<double>&);

}  // namespace nlhf
