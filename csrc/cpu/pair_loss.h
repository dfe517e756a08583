// The contrastive losses of pairs, as the bindings call them.
#pragma once

#include <cstdint>

namespace nlhf {

// p is the preference, q the other one, s the scale; u, v the log-ratios of the two responses and
// h = u - v.
enum class PairForm {
  label,       // p (h - s)^2 + (1 - p) (h + s)^2
  difference,  // (h - s (p - q))^2
  response,    // 1/2 [(u - s (p - 1/2))^2 + (v - s (q - 1/2))^2]
  logistic,    // cross-entropy of sigma(s h), its label p, or sigma(p - q) if there is a q
};

template <class S>
struct PairLossIn {
  const S *logprobs, *other_logprobs;                // (pairs,)
  const S *anchor_logprobs, *other_anchor_logprobs;  // (anchors, pairs)
  const S *preference, *other_preference;            // the second is optional
  const double* weights;                             // (anchors,)
  int64_t anchors, pairs;
  PairForm form;
  S scale;
};

// The gradients are those of the loss, the mean over the pairs.
template <class S>
struct PairLossOut {
  S *loss, *margins, *grad, *other_grad;
};

template <class S>
void pair_loss(const PairLossIn<S>& in, const PairLossOut<S>& out);

}  // namespace nlhf
