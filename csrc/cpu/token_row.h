// Log-probability of one token and its gradient: the part that the token-level ops share.
#pragma once

#include "cpu/ops.h"

namespace nlhf {

template <class S>
struct TokenRow {
  S logprob, entropy, lse;
};

// logprob is NaN if the token is outside the vocabulary.
template <class S>
TokenRow<S> token_row(const char* row, DType dtype, int64_t vocab, int64_t token,
                      ScoreSettings<S> settings);

// Writes the gradient of grad_logprob * logprob + grad_entropy * entropy over a row of dtype; grad
// may be row. A token outside the vocabulary has no gradient from its log-probability.
template <class S>
void token_row_grad(char* grad, const char* row, DType dtype, int64_t vocab, int64_t token, S lse,
                    S entropy, S grad_logprob, S grad_entropy, ScoreSettings<S> settings);

}  // namespace nlhf
