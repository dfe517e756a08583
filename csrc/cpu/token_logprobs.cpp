#include <cstring>

#include "common/pages.h"
#include "common/parallel.h"
#include "cpu/ops.h"
#include "cpu/token_row.h"

namespace nlhf {

template <class S>
void token_logprobs(const Logits& logits, const int64_t* tokens, const bool* mask,
                    ScoreSettings<S> settings, const TokenLogprobsOut<S>& out) {
  parallel_rows(logits.rows, logits.vocab, [&](int64_t n) {
    TokenRow<S> row;
    if (!mask || mask[n])
      row = token_row<S>({logits.row(n), nullptr, logits.dtype, logits.dtype, logits.vocab},
                         tokens[n], settings);
    out.logprobs[n] = row.logprob;
    out.entropy[n] = row.entropy;
    out.lse[n] = row.lse;
  });
}

template <class S>
void token_logprobs_grad(const Logits& grad, const Logits& logits, const int64_t* tokens,
                         const bool* mask, const TokenLogprobsGradIn<S>& in,
                         ScoreSettings<S> settings) {
  if (grad.data != logits.data) use_large_pages(grad.data, grad.end());
  parallel_rows(logits.rows, logits.vocab, [&](int64_t n) {
    if (mask && !mask[n]) {
      std::memset(grad.row(n), 0, grad.vocab * element_size(grad.dtype));
      return;
    }
    TokenRow<S> saved;
    TokenRowGrad<S> of;
    saved.lse = in.lse[n];
    of.logprob = in.grad_logprobs[n];
    if (in.grad_entropy) {
      saved.entropy = in.entropy[n];
      of.entropy = in.grad_entropy[n];
    }
    token_row_grad<S>(grad.row(n), grad.dtype,
                      {logits.row(n), nullptr, logits.dtype, logits.dtype, logits.vocab}, tokens[n],
                      saved, of, settings);
  });
}

#define NLHF_INSTANTIATE(S)                                                                       \
  template void token_logprobs<S>(const Logits&, const int64_t*, const bool*, ScoreSettings<S>,   \
                                  const TokenLogprobsOut<S>&);                                    \
  template void token_logprobs_grad<S>(const Logits&, const Logits&, const int64_t*, const bool*, \
                                       const TokenLogprobsGradIn<S>&, ScoreSettings<S>)
NLHF_INSTANTIATE(float);
NLHF_INSTANTIATE(double);
#undef NLHF_INSTANTIATE

}  // namespace nlhf
