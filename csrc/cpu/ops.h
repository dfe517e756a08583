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
};

// One value for all rows, or one per row.
template <class T>
struct PerRow {
  T value;
  const T* rows;  // optional

  T operator[](int64_t n) const { return rows ? rows[n] : value; }
};

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

template <class S>
void token_logprobs(const Logits& logits, const int64_t* tokens, ScoreSettings<S> settings,
                    S* logprobs, S* entropy, S* lse);

// grad may be the memory of logits itself.
template <class S>
void token_logprobs_grad(const Logits& grad, const Logits& logits, const int64_t* tokens,
                         const S* lse, const S* entropy, const S* grad_logprobs,
                         const S* grad_entropy, ScoreSettings<S> settings);

enum class KlSum { reward_to_go, sequence, token };

template <class S>
struct PairwisePgLossIn {
  const int64_t* tokens;
  const bool* mask;
  const S* preference;
  const S* ref_logprobs;      // optional
  const S* policy_logprobs;   // optional
  const int64_t* cu_seqlens;  // optional; without it every sequence has N / B rows
  int64_t sequences;
  S tau, baseline;
  KlSum kl;
};

template <class S>
struct PairwisePgLossOut {
  S *loss, *logprobs, *entropy;
  S* kl;  // written only with ref_logprobs
  S *lse, *coef;
};

// Throws std::invalid_argument if cu_seqlens does not run from 0 to N.
template <class S>
void pairwise_pg_loss(const Logits& logits, const PairwisePgLossIn<S>& in,
                      ScoreSettings<S> settings, const PairwisePgLossOut<S>& out);

// grad may be the memory of logits itself.
template <class S>
void pairwise_pg_loss_grad(const Logits& grad, const Logits& logits, const int64_t* tokens,
                           const bool* mask, const S* lse, const S* coef, S grad_loss,
                           ScoreSettings<S> settings);

}  // namespace nlhf
