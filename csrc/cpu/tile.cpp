#include "cpu/tile.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "common/simd.h"
#include "cpu/tile_level.h"

namespace nlhf {
namespace {

namespace plain {

template <class T>
void convert_in(const T* row, int64_t n, float* x) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) x[i] = to_float(row[i]);
}

template <class T>
void convert_out(const float* x, int64_t n, T* row) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) from_float(x[i], row[i]);
}

}  // namespace plain

#if defined(NLHF_X86_REGIONS)
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4")
namespace avx512 {
#include "cpu/eight_floats.inl"
#include "cpu/lanes_avx512.inl"
#include "cpu/tile.inl"
}  // namespace avx512
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
namespace avx2 {
#include "cpu/eight_floats.inl"
#include "cpu/lanes_avx2.inl"
#include "cpu/tile.inl"
}  // namespace avx2
#pragma GCC pop_options
#endif

template <class T>
void convert_in(const T* row, int64_t n, float* x) {
#if defined(NLHF_X86_REGIONS)
  if (tile_level() == TileLevel::avx512) return avx512::convert_in(row, n, x);
  if (tile_level() == TileLevel::avx2) return avx2::convert_in(row, n, x);
#endif
  plain::convert_in(row, n, x);
}

template <class T>
void convert_out(const float* x, int64_t n, T* row) {
#if defined(NLHF_X86_REGIONS)
  if (tile_level() == TileLevel::avx512) return avx512::convert_out(x, n, row);
  if (tile_level() == TileLevel::avx2) return avx2::convert_out(x, n, row);
#endif
  plain::convert_out(x, n, row);
}

// for a float64 reference next to a policy of fewer bits
template <class T>
void convert_in(const T* row, int64_t n, double* x) {
  for (int64_t i = 0; i < n; ++i) x[i] = to_float(row[i]);
}

// Of the two floats around x the one whose last bit is odd: rounding it again, to fewer bits, gives
// what rounding x would.
float to_odd(double x) {
  float y = static_cast<float>(x);
  if (y == x || std::isnan(x)) return y;
  if (std::fabs(static_cast<double>(y)) > std::fabs(x)) y = std::nextafter(y, 0.0f);
  return bit_cast<float>(bit_cast<uint32_t>(y) | 1u);
}

// for gradients whose statistics are those of a float64 reference
template <class T>
void convert_out(const double* x, int64_t n, T* row) {
  for (int64_t i = 0; i < n; ++i) from_float(to_odd(x[i]), row[i]);
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
    case DType::float32: {
      const float* from = at<float>(row, start);
      std::copy(from, from + n, x);
      return;
    }
    case DType::float64:
      for (int64_t i = 0; i < n; ++i) x[i] = static_cast<S>(at<double>(row, start)[i]);
  }
}

template <class S>
void store(const S* x, int64_t n, char* row, DType dtype, int64_t start) {
  switch (dtype) {
    case DType::float16:
      return convert_out(x, n, at<Float16>(row, start));
    case DType::bfloat16:
      return convert_out(x, n, at<BFloat16>(row, start));
    case DType::float32: {
      float* to = at<float>(row, start);
      for (int64_t i = 0; i < n; ++i) to[i] = static_cast<float>(x[i]);
      return;
    }
    case DType::float64:
      std::copy(x, x + n, at<double>(row, start));
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

#define NLHF_INSTANTIATE(S)                                         \
  template void load<S>(const char*, DType, int64_t, int64_t, S*);  \
  template void store<S>(const S*, int64_t, char*, DType, int64_t); \
  template S maximum<S>(const S*, int64_t);                         \
  template void multiply<S>(S*, int64_t, const S*);                 \
  template void softcap<S>(S*, int64_t, S, S*)
NLHF_INSTANTIATE(float);
NLHF_INSTANTIATE(double);
#undef NLHF_INSTANTIATE

}  // namespace nlhf
