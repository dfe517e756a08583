#include "cpu/tile.h"

#include <cassert>
#include <cmath>
#include <limits>
#include <type_traits>

namespace nlhf {
namespace {

template <class T, class S>
NLHF_CLONES void convert_in(const T* row, int64_t n, S* x) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) x[i] = static_cast<S>(to_float(row[i]));
}

template <class T>
NLHF_CLONES void convert_out(const float* x, int64_t n, T* row) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) from_float(x[i], row[i]);
}

template <class T>
const T* at(const char* row, int64_t start) {
  return reinterpret_cast<const T*>(row) + start;
}

template <class T>
T* at(char* row, int64_t start) {
  return reinterpret_cast<T*>(row) + start;
}

}  // namespace

template <class S>
void load(const char* row, DType dtype, int64_t start, int64_t n, S* x) {
  switch (dtype) {
    case DType::float16:
      return convert_in(at<Float16>(row, start), n, x);
    case DType::bfloat16:
      return convert_in(at<BFloat16>(row, start), n, x);
    case DType::float32:
      return convert_in(at<float>(row, start), n, x);
    case DType::float64:
      for (int64_t i = 0; i < n; ++i) x[i] = static_cast<S>(at<double>(row, start)[i]);
  }
}

template <class S>
void store(const S* x, int64_t n, char* row, DType dtype, int64_t start) {
  if constexpr (std::is_same_v<S, double>) {
    assert(dtype == DType::float64);
    std::memcpy(at<double>(row, start), x, n * sizeof(double));
  } else {
    switch (dtype) {
      case DType::float16:
        return convert_out(x, n, at<Float16>(row, start));
      case DType::bfloat16:
        return convert_out(x, n, at<BFloat16>(row, start));
      case DType::float32:
        return convert_out(x, n, at<float>(row, start));
      case DType::float64:
        assert(false);
    }
  }
}

template <class S>
NLHF_CLONES S maximum(const S* x, int64_t n) {
  S top = -std::numeric_limits<S>::infinity();
#pragma omp simd reduction(max : top)
  for (int64_t i = 0; i < n; ++i) top = x[i] > top ? x[i] : top;
  return top;
}

template <class S>
NLHF_CLONES S exp_sum(const S* x, int64_t n, S shift, S divisor) {
  S sum = 0;
  // the division costs as much as the exponential, and by 1 it changes nothing
  if (divisor == 1) {
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; ++i) sum += exponential(x[i] - shift);
  } else {
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; ++i) sum += exponential((x[i] - shift) / divisor);
  }
  return sum;
}

template <class S>
NLHF_CLONES Moments<S> exp_moments(const S* x, int64_t n, S shift) {
  S sum = 0, weighted = 0;
#pragma omp simd reduction(+ : sum, weighted)
  for (int64_t i = 0; i < n; ++i) {
    const S below = x[i] - shift;
    const S e = exponential(below);
    sum += e;
    weighted += e > 0 ? e * below : S(0);
  }
  return {sum, weighted};
}

template <class S>
NLHF_CLONES void mix(S* policy, const S* ref, int64_t n, S policy_coef, S ref_coef) {
  constexpr S never = -std::numeric_limits<S>::infinity();
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const S mixed = policy_coef * policy[i] + ref_coef * ref[i];
    const S kept = ref[i] == never ? never : mixed;
    policy[i] = policy[i] == never ? never : kept;
  }
}

template <class S>
NLHF_CLONES void divide(S* x, int64_t n, S divisor) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) x[i] /= divisor;
}

template <class S>
NLHF_CLONES void multiply(S* x, int64_t n, const S* factor) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) x[i] *= factor[i];
}

template <class S>
NLHF_CLONES void softcap(S* x, int64_t n, S cap, S* slope) {
  if (slope == nullptr) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) x[i] = cap * hyperbolic_tangent(x[i] / cap);
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const S t = hyperbolic_tangent(x[i] / cap);
      slope[i] = 1 - t * t;
      x[i] = cap * t;
    }
  }
}

template <class S>
NLHF_CLONES void softmax_gradient(S* x, int64_t n, S lse, S entropy, S grad_logprob,
                                  S grad_entropy) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const S log_p = x[i] - lse;
    const S p = exponential(log_p);
    const S gradient = -p * (grad_logprob + grad_entropy * (log_p + entropy));
    x[i] = p == 0 ? S(0) : gradient;
  }
}

#define NLHF_INSTANTIATE(S)                                         \
  template void load<S>(const char*, DType, int64_t, int64_t, S*);  \
  template void store<S>(const S*, int64_t, char*, DType, int64_t); \
  template S maximum<S>(const S*, int64_t);                         \
  template S exp_sum<S>(const S*, int64_t, S, S);                   \
  template Moments<S> exp_moments<S>(const S*, int64_t, S);         \
  template void mix<S>(S*, const S*, int64_t, S, S);                \
  template void divide<S>(S*, int64_t, S);                          \
  template void multiply<S>(S*, int64_t, const S*);                 \
  template void softcap<S>(S*, int64_t, S, S*);                     \
  template void softmax_gradient<S>(S*, int64_t, S, S, S, S)
NLHF_INSTANTIATE(float);
NLHF_INSTANTIATE(double);
#undef NLHF_INSTANTIATE

}  // namespace nlhf
