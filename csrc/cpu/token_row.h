// One token's row of logits, alone or next to the reference's: log-probability, entropy, KL and
// their gradient. The part that the token-level ops share.
#pragma once

#include "cpu/ops.h"

namespace nlhf {

// A row of both models; ref is null where there is no reference.
struct ModelRows {
  const char *policy, *ref;
  DType policy_dtype, ref_dtype;
  int64_t vocab;
};

template <class S>
struct TokenRow {
  S logprob = 0, entropy = 0, lse = 0;
  S ref_logprob = 0, ref_lse = 0, kl = 0;
};

// The log-probabilities are NaN if the token is outside the vocabulary.
template <class S>
TokenRow<S> token_row(const ModelRows& rows, int64_t token, ScoreSettings<S> settings);

// Of log-probability, entropy and KL.
template <class S>
struct TokenRowGrad {
  S logprob = 0, entropy = 0, kl = 0;
};

// Writes the gradient of the policy's row; out may be that row. A token outside the vocabulary has
// no gradient from its log-probability. Of saved, what a gradient of 0 belongs to is not looked at.
template <class S>
void token_row_grad(char* out, DType out_dtype, const ModelRows& rows, int64_t token,
                    const TokenRow<S>& saved, TokenRowGrad<S> grad, ScoreSettings<S> settings);

}  // namespace nlhf
