#include "cpu/mixture_tile.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "common/simd.h"
#include "cpu/lanes_plain.h"

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

namespace {

struct Level {
  const char* name;
  const TileKernels<float>* kernels;
};

const std::vector<Level>& levels() {
  static const std::vector<Level> found = [] {
    std::vector<Level> levels;
#if defined(NLHF_X86_REGIONS)
    if (__builtin_cpu_supports("x86-64-v4"))
      levels.push_back({"avx512", &avx512::Dispatch<avx512::Lanes>::kernels});
    if (__builtin_cpu_supports("x86-64-v3"))
      levels.push_back({"avx2", &avx2::Dispatch<avx2::Lanes>::kernels});
#endif
    levels.push_back({"plain", &plain::Dispatch<PlainLanes<float>>::kernels});
    return levels;
  }();
  return found;
}

const TileKernels<float>*& chosen() {
  static const TileKernels<float>* kernels = levels().front().kernels;
  return kernels;
}

}  // namespace

template <>
const TileKernels<float>& tile_kernels<float>() {
  return *chosen();
}

template <>
const TileKernels<double>& tile_kernels<double>() {
  return plain::Dispatch<PlainLanes<double>>::kernels;
}

std::vector<std::string> tile_levels() {
  std::vector<std::string> names;
  for (const Level& level : levels()) names.push_back(level.name);
  return names;
}

bool uses_avx512() {
#if defined(NLHF_X86_REGIONS)
  return chosen() == &avx512::Dispatch<avx512::Lanes>::kernels;
#else
  return false;
#endif
}

void use_tile_level(const std::string& name) {
  for (const Level& level : levels()) {
    if (name != level.name) continue;
    chosen() = level.kernels;
    return;
  }
  throw std::invalid_argument("use_tile_level: this machine has no level \"" + name + "\"");
}

template struct Mixture<float>;
template struct Mixture<double>;

}  // namespace nlhf
