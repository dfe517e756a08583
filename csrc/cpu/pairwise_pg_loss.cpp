#include <stdexcept>

#include "cpu/ops.h"

namespace nlhf {
namespace {

// Tokens [begin, end) of one sequence.
struct Span {
  int64_t begin, end;
};

template <class S>
Span sequence_span(const PairwisePgCoefIn<S>& in, int64_t b) {
  if (in.cu_seqlens) return {in.cu_seqlens[b], in.cu_seqlens[b + 1]};
  const int64_t length = in.tokens / in.sequences;
  return {b * length, (b + 1) * length};
}

// The offsets are data, and a wrong one would be a read outside the tensors.
template <class S>
void check_offsets(const PairwisePgCoefIn<S>& in) {
  if (!in.cu_seqlens) return;
  bool good = in.cu_seqlens[0] == 0 && in.cu_seqlens[in.sequences] == in.tokens;
  for (int64_t b = 0; b < in.sequences; ++b) good &= in.cu_seqlens[b] <= in.cu_seqlens[b + 1];
  if (!good) {
    throw std::invalid_argument(
        "pairwise_pg_loss: cu_seqlens must never decrease and run from 0 to the number of tokens; "
        "check how the sequences were packed");
  }
}

// Writes coef and the sum of one sequence, and returns its part of the loss.
template <class S>
double sequence_loss(const PairwisePgCoefIn<S>& in, const PairwisePgCoefOut<S>& out, int64_t b) {
  const Span span = sequence_span(in, b);
  const auto counts = [&](int64_t n) { return !in.mask || in.mask[n]; };
  double total = 0;
  for (int64_t n = span.end - 1; in.cost && n >= span.begin; --n)
    if (counts(n)) total += in.cost[n];
  out.sums[b] = static_cast<S>(total);

  const double advantage = static_cast<double>(in.preference[b]) - in.baseline;
  const double later = in.later ? in.later[b] : S(0);
  double loss = 0, to_go = later;
  for (int64_t n = span.end - 1; n >= span.begin; --n) {
    out.coef[n] = 0;
    if (!counts(n)) continue;
    const double cost = in.cost ? in.cost[n] : S(0), after = to_go;
    to_go += cost;
    const double sum = in.kl == KlSum::token      ? cost
                       : in.kl == KlSum::sequence ? later + total
                       : in.kl == KlSum::exact    ? after
                                                  : to_go;
    out.coef[n] = static_cast<S>((sum - advantage) / static_cast<double>(in.sequences));
    // a token that the advantage leaves out must not bring its own infinity
    if (out.coef[n] != 0) loss += static_cast<double>(out.coef[n]) * in.logprobs[n];
  }
  return loss;
}

}  // namespace

template <class S>
void pairwise_pg_coef(const PairwisePgCoefIn<S>& in, const PairwisePgCoefOut<S>& out) {
  check_offsets(in);
  double loss = 0;
  for (int64_t b = in.sequences - 1; b >= 0; --b) loss += sequence_loss(in, out, b);
  *out.loss = static_cast<S>(loss);
}

template void pairwise_pg_coef<float>(const PairwisePgCoefIn<float>&,
                                      const PairwisePgCoefOut<float>&);
template void pairwise_pg_coef<double>(const PairwisePgCoefIn<double>&,
                                       const PairwisePgCoefOut<double>&);

}  // namespace nlhf
