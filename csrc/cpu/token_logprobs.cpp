#include "common/parallel.h"
#include "cpu/ops.h"
#include "cpu/token_row.h"

namespace nlhf {

template <class S>
void token_logprobs(const Logits& logits, const int64_t* tokens, ScoreSettings<S> settings,
                    S* logprobs, S* entropy, S* lse) {
  parallel_rows(logits.rows, logits.vocab, [&](int64_t n) {
    const auto out = token_row<S>(logits.row(n), logits.dtype, logits.vocab, tokens[n], settings);
    logprobs[n] = out.logprob;
    entropy[n] = out.entropy;
    lse[n] = out.lse;
  });
}

template <class S>
void token_logprobs_grad(const Logits& grad, const Logits& logits, const int64_t* tokens,
                         const S* lse, const S* entropy, const S* grad_logprobs,
                         const S* grad_entropy, ScoreSettings<S> settings) {
  parallel_rows(logits.rows, logits.vocab, [&](int64_t n) {
    token_row_grad<S>(grad.row(n), logits.row(n), logits.dtype, logits.vocab, tokens[n], lse[n],
                      entropy[n], grad_logprobs[n], grad_entropy[n], settings);
  });
}

#define NLHF_INSTANTIATE(S)                                                                     \
  template void token_logprobs<S>(const Logits&, const int64_t*, ScoreSettings<S>, S*, S*, S*); \
  template void token_logprobs_grad<S>(const Logits&, const Logits&, const int64_t*, const S*,  \
                                       const S*, const S*, const S*, ScoreSettings<S>)
NLHF_INSTANTIATE(float);
NLHF_INSTANTIATE(double);
#undef NLHF_INSTANTIATE

}  // namespace nlhf
