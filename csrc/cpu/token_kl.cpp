#include <cstring>

#include "common/pages.h"
#include "common/parallel.h"
#include "cpu/ops.h"
#include "cpu/token_row.h"

namespace nlhf {
namespace {

ModelRows rows_of(const Logits& policy, const Logits& ref, int64_t n) {
  return {policy.row(n), ref.row(n), policy.dtype, ref.dtype, policy.vocab};
}

}  // namespace

template <class S>
void token_kl(const Logits& policy, const Logits& ref, const int64_t* tokens, const bool* mask,
              ScoreSettings<S> settings, const TokenKlOut<S>& out) {
  parallel_rows(policy.rows, policy.vocab, [&](int64_t n) {
    TokenRow<S> row;
    if (!mask || mask[n]) row = token_row<S>(rows_of(policy, ref, n), tokens[n], settings);
    out.logprobs[n] = row.logprob;
    out.ref_logprobs[n] = row.ref_logprob;
    out.entropy[n] = row.entropy;
    out.kl[n] = row.kl;
    out.lse[n] = row.lse;
    out.ref_lse[n] = row.ref_lse;
  });
}

template <class S>
void token_kl_grad(const Logits& grad, const Logits& policy, const Logits& ref,
                   const int64_t* tokens, const bool* mask, const TokenKlGradIn<S>& in,
                   ScoreSettings<S> settings) {
  if (grad.data != policy.data) use_large_pages(grad.data, grad.end());
  parallel_rows(policy.rows, policy.vocab, [&](int64_t n) {
    if (mask && !mask[n]) {
      std::memset(grad.row(n), 0, grad.vocab * element_size(grad.dtype));
      return;
    }
    TokenRow<S> saved;
    TokenRowGrad<S> of;
    saved.lse = in.lse[n];
    saved.ref_lse = in.ref_lse[n];
    saved.kl = in.kl[n];
    of.logprob = in.grad_logprobs[n];
    of.kl = in.grad_kl[n];
    if (in.grad_entropy) {
      saved.entropy = in.entropy[n];
      of.entropy = in.grad_entropy[n];
    }
    token_row_grad<S>(grad.row(n), grad.dtype, rows_of(policy, ref, n), tokens[n], saved, of,
                      settings);
  });
}

#define NLHF_INSTANTIATE(S)                                                                   \
  template void token_kl<S>(const Logits&, const Logits&, const int64_t*, const bool*,        \
                            ScoreSettings<S>, const TokenKlOut<S>&);                          \
  template void token_kl_grad<S>(const Logits&, const Logits&, const Logits&, const int64_t*, \
                                 const bool*, const TokenKlGradIn<S>&, ScoreSettings<S>)
NLHF_INSTANTIATE(float);
NLHF_INSTANTIATE(double);
#undef NLHF_INSTANTIATE

}  // namespace nlhf
