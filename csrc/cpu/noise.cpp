#include "cpu/noise.h"

#include <algorithm>

#include "common/simd.h"
#include "cpu/tile.h"
#include "cpu/tile_level.h"

namespace nlhf {
namespace {

constexpr int64_t kBatch = kPhiloxBatch;

// In lanes of 64 bits, where a product of two words has room; what lies above a word is left there
// and never read.
NLHF_CLONES void philox_plain(Words counter, int varying, int64_t n, int64_t seed, uint64_t* low,
                              uint64_t* high) {
  constexpr uint64_t kWord = 0xFFFFFFFFu;
  const auto key = static_cast<uint64_t>(seed);
  const uint64_t step[4] = {varying == 0, varying == 1, varying == 2, varying == 3};
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const auto k = static_cast<uint64_t>(i);
    uint64_t c0 = counter.w[0] + step[0] * k, c1 = counter.w[1] + step[1] * k;
    uint64_t c2 = counter.w[2] + step[2] * k, c3 = counter.w[3] + step[3] * k;
    uint32_t key0 = static_cast<uint32_t>(key), key1 = static_cast<uint32_t>(key >> 32);
    for (int round = 0; round < 10; ++round) {
      const uint64_t one = (c0 & kWord) * 0xD2511F53u, other = (c2 & kWord) * 0xCD9E8D57u;
      c0 = (other >> 32) ^ c1 ^ key0;
      c1 = other;
      c2 = (one >> 32) ^ c3 ^ key1;
      c3 = one;
      key0 += 0x9E3779B9u;
      key1 += 0xBB67AE85u;
    }
    low[i] = (c0 & kWord) | c1 << 32;
    high[i] = (c2 & kWord) | c3 << 32;
  }
}

#if defined(NLHF_X86_REGIONS)
// The same: left to itself the compiler multiplies whole numbers of 64 bits, which takes three
// times as long.
__attribute__((target("arch=x86-64-v4"))) void philox_avx512(Words counter, int varying, int64_t n,
                                                             int64_t seed, uint64_t* low,
                                                             uint64_t* high) {
  const __m512i factor0 = _mm512_set1_epi64(0xD2511F53u), factor1 = _mm512_set1_epi64(0xCD9E8D57u);
  const __m512i word = _mm512_set1_epi64(0xFFFFFFFFu);
  const auto key = static_cast<uint64_t>(seed);
  for (int64_t i = 0; i < n; i += 8) {
    __m512i c[4];
    for (int j = 0; j < 4; ++j) c[j] = _mm512_set1_epi64(counter.w[j]);
    const __m512i lanes = _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0);
    c[varying] = _mm512_add_epi64(c[varying], _mm512_add_epi64(lanes, _mm512_set1_epi64(i)));
    uint32_t key0 = static_cast<uint32_t>(key), key1 = static_cast<uint32_t>(key >> 32);
    for (int round = 0; round < 10; ++round) {
      const __m512i one = _mm512_mul_epu32(c[0], factor0), other = _mm512_mul_epu32(c[2], factor1);
      c[0] = _mm512_xor_si512(_mm512_xor_si512(_mm512_srli_epi64(other, 32), c[1]),
                              _mm512_set1_epi64(key0));
      c[1] = other;
      c[2] = _mm512_xor_si512(_mm512_xor_si512(_mm512_srli_epi64(one, 32), c[3]),
                              _mm512_set1_epi64(key1));
      c[3] = one;
      key0 += 0x9E3779B9u;
      key1 += 0xBB67AE85u;
    }
    _mm512_storeu_si512(low + i,
                        _mm512_or_si512(_mm512_and_si512(c[0], word), _mm512_slli_epi64(c[1], 32)));
    _mm512_storeu_si512(high + i,
                        _mm512_or_si512(_mm512_and_si512(c[2], word), _mm512_slli_epi64(c[3], 32)));
  }
}
#endif

}  // namespace

void philox_batch(Words counter, int varying, int64_t n, int64_t seed, uint64_t* low,
                  uint64_t* high) {
#if defined(NLHF_X86_REGIONS)
  if (tile_level() == TileLevel::avx512) return philox_avx512(counter, varying, n, seed, low, high);
#endif
  philox_plain(counter, varying, n, seed, low, high);
}

namespace {

NLHF_CLONES void to_gumbel(const uint32_t* words, int64_t n, float* out) {
  constexpr float kTop = 1.0f - 1.0f / (1 << 24);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const float x = (static_cast<float>(words[i]) + 0.5f) * (1.0f / 65536 / 65536);
    const float u = x < kTop ? x : kTop;
    // log(1 - u) from the rounded 1 - u and what the rounding lost, so that small u keep all bits
    const float rest = 1.0f - u;
    const float lost = (1.0f - rest) - u;
    out[i] = -logarithm(-(logarithm(rest) + (lost + lost * u)));
  }
}

void to_gumbel(const uint32_t* words, int64_t n, double* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = gumbel<double>(words[i]);
}

}  // namespace

template <class S>
void Noise::of_tiles(int64_t first, int64_t n, S* out) const {
  uint64_t low[kBatch], high[kBatch];
  uint32_t words[kBatch];
  for (int64_t start = 0; start < n; start += kBatch) {
    const int64_t count = std::min(kBatch, n - start);
    philox_batch({{position, static_cast<uint32_t>(first + start), 1, 0}}, 1, count, seed, low,
                 high);
    for (int64_t i = 0; i < count; ++i) words[i] = static_cast<uint32_t>(low[i]);
    to_gumbel(words, count, out + start);
  }
}

template <class S>
void Noise::of_lanes(int64_t tile, int64_t n, S* out) const {
  static_assert(4 * kBatch == kTile);
  const int64_t blocks = (n + 3) / 4;
  uint64_t low[kBatch], high[kBatch];
  uint32_t words[4 * kBatch];
  philox_batch({{position, static_cast<uint32_t>(tile), 2, 0}}, 3, blocks, seed, low, high);
  for (int64_t i = 0; i < blocks; ++i) {
    words[4 * i] = static_cast<uint32_t>(low[i]);
    words[4 * i + 1] = static_cast<uint32_t>(low[i] >> 32);
    words[4 * i + 2] = static_cast<uint32_t>(high[i]);
    words[4 * i + 3] = static_cast<uint32_t>(high[i] >> 32);
  }
  to_gumbel(words, n, out);
}

template void Noise::of_tiles<float>(int64_t, int64_t, float*) const;
template void Noise::of_tiles<double>(int64_t, int64_t, double*) const;
template void Noise::of_lanes<float>(int64_t, int64_t, float*) const;
template void Noise::of_lanes<double>(int64_t, int64_t, double*) const;

}  // namespace nlhf
