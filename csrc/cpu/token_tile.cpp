#include "cpu/token_tile.h"

#include "common/simd.h"
#include "cpu/lanes_plain.h"
#include "cpu/tile_level.h"

namespace nlhf {
namespace {

namespace plain {
#include "cpu/token_tile.inl"
}

#if defined(NLHF_X86_REGIONS)
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4")
namespace avx512 {
#include "cpu/eight_floats.inl"
#include "cpu/lanes_avx512.inl"
#include "cpu/token_tile.inl"
}  // namespace avx512
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
namespace avx2 {
#include "cpu/eight_floats.inl"
#include "cpu/lanes_avx2.inl"
#include "cpu/token_tile.inl"
}  // namespace avx2
#pragma GCC pop_options
#endif

}  // namespace

template <>
const TokenKernels<float>& token_kernels<float>() {
#if defined(NLHF_X86_REGIONS)
  if (runs_at(TileLevel::avx512)) return avx512::TokenTile<avx512::Lanes>::kernels;
  if (runs_at(TileLevel::avx2)) return avx2::TokenTile<avx2::Lanes>::kernels;
#endif
  runs_at(TileLevel::plain);
  return plain::TokenTile<PlainLanes<float>>::kernels;
}

template <>
const TokenKernels<double>& token_kernels<double>() {
  return plain::TokenTile<PlainLanes<double>>::kernels;
}

}  // namespace nlhf
