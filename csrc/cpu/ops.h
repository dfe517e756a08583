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

template <class S>
struct MixtureSampleOut {
  int64_t* tokens;
  S *policy_logprobs, *ref_logprobs, *sampling_logprobs, *log_kept_mass;
};

template <class S>
void mixture_sample(const Logits& policy, const std::optional<Logits>& ref, PerRow<S> mixture_coef,
                    PerRow<S> temperature, PerRow<int64_t> seed, PerRow<int64_t> position,
                    MixtureSampleOut<S> out);

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
