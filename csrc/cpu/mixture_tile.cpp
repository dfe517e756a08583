#include "cpu/mixture_tile.h"

#include <algorithm>
#include <cmath>

#include "common/simd.h"
#include "cpu/lanes_plain.h"
#include "cpu/tile_level.h"

namespace nlhf {
namespace {

namespace plain {
#include "cpu/mixture_tile.inl"
}

#if defined(NLHF_X86_REGIONS)
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4")
namespace avx512 {
#include "cpu/eight_floats.inl"
#include "cpu/lanes_avx512.inl"
#include "cpu/mixture_tile.inl"
}  // namespace avx512
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
namespace avx2 {
#include "cpu/eight_floats.inl"
#include "cpu/lanes_avx2.inl"
#include "cpu/mixture_tile.inl"
}  // namespace avx2
#pragma GCC pop_options
#endif

}  // namespace

template <class S>
Mixture<S> Mixture<S>::of(bool has_ref, S coef, S temperature, bool wants_max) {
  const Mix mix = !has_ref               ? Mix::alone
                  : coef == 0            ? Mix::policy
                  : coef == 1            ? Mix::ref
                  : coef > 0 && coef < 1 ? Mix::both
                                         : Mix::anything;
  // at temperature 0 log-probabilities are at 1; the colder of two that are both too cold for S
  // gives the same
  const S scale = S(1.4426950408889634) / (temperature == 0 ? S(1) : temperature);
  return {mix, 1 - coef, coef, std::min(scale, std::numeric_limits<S>::max()), wants_max};
}

template <>
const TileKernels<float>& tile_kernels<float>() {
#if defined(NLHF_X86_REGIONS)
  if (runs_at(TileLevel::avx512)) return avx512::Dispatch<avx512::Lanes>::kernels;
  if (runs_at(TileLevel::avx2)) return avx2::Dispatch<avx2::Lanes>::kernels;
#endif
  runs_at(TileLevel::plain);
  return plain::Dispatch<PlainLanes<float>>::kernels;
}

template <>
const TileKernels<double>& tile_kernels<double>() {
  return plain::Dispatch<PlainLanes<double>>::kernels;
}

template struct Mixture<float>;
template struct Mixture<double>;

}  // namespace nlhf
