// The operations as the bindings call them. S is the statistics dtype: float, or double as soon as
// one of the logits is float64. Pointers marked optional may be null.
#pragma once

#include <cstdint>
#include <optional>

#include "common/dtype.h"

namespace nlhf {

// Rows of logits, element stride 1 within a row. Row n of a (B, T, V) tensor is (n / T, n % T); a
// matrix (N, V) is the case T = 1. Strides are in elements.
struct Logits {
  char* data;
  DType dtype;
  int64_t rows, steps, vocab, batch_stride, step_stride;

  char* row(int64_t n) const {
    const int64_t offset = n / steps * batch_stride + n % steps * step_stride;
    return data + offset * element_size(dtype);
  }
  // of the memory between the first row and the last
  char* end() const { return rows ? row(rows - 1) + vocab * element_size(dtype) : data; }
};

// One value for all rows, or one per row.
template <class T>
struct PerRow {
  T value;
  const T* rows;  // optional

  T operator[](int64_t n) const { return rows ? rows[n] : value; }
};

// A token of another part of the vocabulary: it has no logit here, and its log-probability a
// gradient.
constexpr int64_t kElsewhere = -(int64_t{1} << 62);

template <class S>
struct ScoreSettings {
  S temperature;
  S softcap;  // 0 is off
};

// Off: 0, 1, 0.
template <class S>
struct Filters {
  int64_t top_k;
  S top_p, min_p;

  bool off(int64_t vocab) const {
    return (top_k <= 0 || top_k >= vocab) && top_p >= 1 && !(min_p > 0);
  }
};

template <class S>
struct MixtureSampleIn {
  PerRow<S> mixture_coef, temperature;
  PerRow<int64_t> top_k;
  PerRow<S> top_p, min_p;
  PerRow<int64_t> seed, position;
};

template <class S>
struct MixtureSampleOut {
  int64_t* tokens;
  S *policy_logprobs, *ref_logprobs, *sampling_logprobs, *log_kept_mass;
};

template <class S>
void mixture_sample(const Logits& policy, const std::optional<Logits>& ref,
                    const MixtureSampleIn<S>& in, const MixtureSampleOut<S>& out);

// Rows of vectors: the hidden states (B, D), or the weights (V, D) of a head.
struct Matrix {
  char* data;
  DType dtype;
  int64_t rows, columns, stride;

  char* row(int64_t n) const { return data + n * stride * element_size(dtype); }
};

// A model's last layer. bias is optional, in the dtype of the weights.
struct Head {
  Matrix hidden, weight;
  char* bias;
};

// In float32, whatever the dtypes but float64, and without filters. ref without weights is read
// from the policy's.
void linear_mixture_sample(const Head& policy, const std::optional<Head>& ref, float softcap,
                           const MixtureSampleIn<float>& in, const MixtureSampleOut<float>& out);

// What is under the mask (optional) is not read: its statistics are 0, and so is its gradient.
template <class S>
struct TokenLogprobsOut {
  S *logprobs, *entropy, *lse;
};

template <class S>
void token_logprobs(const Logits& logits, const int64_t* tokens, const bool* mask,
                    ScoreSettings<S> settings, const TokenLogprobsOut<S>& out);

template <class S>
struct TokenLogprobsGradIn {
  const S *lse, *entropy;  // entropy is optional, as grad_entropy
  const S *grad_logprobs, *grad_entropy;
};

// grad may be the memory of logits itself.
template <class S>
void token_logprobs_grad(const Logits& grad, const Logits& logits, const int64_t* tokens,
                         const bool* mask, const TokenLogprobsGradIn<S>& in,
                         ScoreSettings<S> settings);

template <class S>
struct TokenKlOut {
  S *logprobs, *ref_logprobs, *entropy, *kl, *lse, *ref_lse;
};

template <class S>
void token_kl(const Logits& policy, const Logits& ref, const int64_t* tokens, const bool* mask,
              ScoreSettings<S> settings, const TokenKlOut<S>& out);

template <class S>
struct TokenKlGradIn {
  const S *lse, *ref_lse, *entropy, *kl;  // entropy is optional, as grad_entropy
  const S *grad_logprobs, *grad_entropy, *grad_kl;
};

// grad may be the memory of policy itself.
template <class S>
void token_kl_grad(const Logits& grad, const Logits& policy, const Logits& ref,
                   const int64_t* tokens, const bool* mask, const TokenKlGradIn<S>& in,
                   ScoreSettings<S> settings);

// Which costs a token answers for: its own and all later ones, those after its own, all of its
// sequence, its own.
enum class KlSum { reward_to_go, exact, sequence, token };

template <class S>
struct PairwisePgCoefIn {
  const S* logprobs;
  const S* cost;     // optional
  const bool* mask;  // optional
  const S* preference;
  const int64_t* cu_seqlens;  // optional; without it every sequence has tokens / sequences
  const S* later;             // optional: costs after the end of each sequence
  int64_t tokens, sequences;
  KlSum kl;
  S baseline;
};

template <class S>
struct PairwisePgCoefOut {
  S *loss, *coef, *sums;
};

// Throws std::invalid_argument if cu_seqlens does not run from 0 to the number of tokens.
template <class S>
void pairwise_pg_coef(const PairwisePgCoefIn<S>& in, const PairwisePgCoefOut<S>& out);

}  // namespace nlhf
