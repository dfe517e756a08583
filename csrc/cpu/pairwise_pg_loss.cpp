#include <cstring>
#include <stdexcept>

#include "common/parallel.h"
#include "cpu/ops.h"
#include "cpu/token_row.h"

namespace nlhf {
namespace {

// Rows [begin, end) of one sequence.
struct Span {
  int64_t begin, end;
};

template <class S>
Span sequence_span(const PairwisePgLossIn<S>& in, int64_t rows, int64_t b) {
  if (in.cu_seqlens) return {in.cu_seqlens[b], in.cu_seqlens[b + 1]};
  const int64_t length = rows / in.sequences;
  return {b * length, (b + 1) * length};
}

// The offsets are data, and a wrong one would be a read outside the tensors.
template <class S>
void check_offsets(const PairwisePgLossIn<S>& in, int64_t rows) {
  if (!in.cu_seqlens) return;
  bool good = in.cu_seqlens[0] == 0 && in.cu_seqlens[in.sequences] == rows;
  for (int64_t b = 0; b < in.sequences; ++b) good &= in.cu_seqlens[b] <= in.cu_seqlens[b + 1];
  if (!good) {
    throw std::invalid_argument(
        "pairwise_pg_loss: cu_seqlens must never decrease and run from 0 to the number of tokens; "
        "check how the sequences were packed");
  }
}

// Writes kl and coef of one sequence, and returns its part of the loss.
template <class S>
S sequence_loss(const PairwisePgLossIn<S>& in, const PairwisePgLossOut<S>& out, Span span, S p) {
  const S* policy = in.policy_logprobs ? in.policy_logprobs : out.logprobs;
  S total = 0;
  if (in.ref_logprobs) {
    for (int64_t n = span.begin; n < span.end; ++n) {
      out.kl[n] = in.mask[n] ? policy[n] - in.ref_logprobs[n] : S(0);
      total += out.kl[n];
    }
  }
  S loss = 0, to_go = 0;
  for (int64_t n = span.end - 1; n >= span.begin; --n) {
    S advantage = p - in.baseline;
    // tau = 0 leaves the term out, because 0 * inf would be NaN
    if (in.ref_logprobs && in.tau != 0) {
      to_go += out.kl[n];
      const S sum = in.kl == KlSum::token ? out.kl[n] : in.kl == KlSum::sequence ? total : to_go;
      advantage -= in.tau * sum;
    }
    out.coef[n] = in.mask[n] ? -advantage / static_cast<S>(in.sequences) : S(0);
    // a token that the advantage leaves out must not bring its own infinity
    if (out.coef[n] != 0) loss += out.coef[n] * out.logprobs[n];
  }
  return loss;
}

}  // namespace

template <class S>
void pairwise_pg_loss(const Logits& logits, const PairwisePgLossIn<S>& in,
                      ScoreSettings<S> settings, const PairwisePgLossOut<S>& out) {
  check_offsets(in, logits.rows);
  parallel_rows(logits.rows, logits.vocab, [&](int64_t n) {
    TokenRow<S> row{0, 0, 0};
    if (in.mask[n]) {
      row = token_row<S>(logits.row(n), logits.dtype, logits.vocab, in.tokens[n], settings);
    }
    out.logprobs[n] = row.logprob;
    out.entropy[n] = row.entropy;
    out.lse[n] = row.lse;
  });
  S loss = 0;
  for (int64_t b = 0; b < in.sequences; ++b) {
    loss += sequence_loss(in, out, sequence_span(in, logits.rows, b), in.preference[b]);
  }
  *out.loss = loss;
}

template <class S>
void pairwise_pg_loss_grad(const Logits& grad, const Logits& logits, const int64_t* tokens,
                           const bool* mask, const S* lse, const S* coef, S grad_loss,
                           ScoreSettings<S> settings) {
  parallel_rows(logits.rows, logits.vocab, [&](int64_t n) {
    if (mask[n]) {
      token_row_grad<S>(grad.row(n), logits.row(n), logits.dtype, logits.vocab, tokens[n], lse[n],
                        0, grad_loss * coef[n], 0, settings);
    } else {
      std::memset(grad.row(n), 0, grad.vocab * element_size(grad.dtype));
    }
  });
}

#define NLHF_INSTANTIATE(S)                                                                      \
  template void pairwise_pg_loss<S>(const Logits&, const PairwisePgLossIn<S>&, ScoreSettings<S>, \
                                    const PairwisePgLossOut<S>&);                                \
  template void pairwise_pg_loss_grad<S>(const Logits&, const Logits&, const int64_t*,           \
                                         const bool*, const S*, const S*, S, ScoreSettings<S>)
NLHF_INSTANTIATE(float);
NLHF_INSTANTIATE(double);
#undef NLHF_INSTANTIATE

}  // namespace nlhf
