// Counter-based random numbers: Philox 4x32-10 (Salmon et al. 2011) and what the ops derive from
// it.
#pragma once

#include <cmath>
#include <cstdint>

namespace nlhf {

struct Words {
  uint32_t w[4];
};

constexpr Words philox4x32(Words counter, uint32_t key0, uint32_t key1) {
  uint32_t c0 = counter.w[0], c1 = counter.w[1], c2 = counter.w[2], c3 = counter.w[3];
  for (int round = 0; round < 10; ++round) {
    const uint64_t low = uint64_t{0xD2511F53u} * c0;
    const uint64_t high = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(high >> 32) ^ c1 ^ key0;
    c1 = static_cast<uint32_t>(high);
    c2 = static_cast<uint32_t>(low >> 32) ^ c3 ^ key1;
    c3 = static_cast<uint32_t>(low);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

constexpr Words philox4x32(Words counter, int64_t seed) {
  const auto key = static_cast<uint64_t>(seed);
  return philox4x32(counter, static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32));
}

// A new seed from a seed and a number; counter word 3 keeps it apart from every draw.
constexpr int64_t fold_in(int64_t seed, int64_t k) {
  const auto count = static_cast<uint64_t>(k);
  const Words out = philox4x32(
      {{static_cast<uint32_t>(count), static_cast<uint32_t>(count >> 32), 0, 0x80000000u}}, seed);
  return static_cast<int64_t>(out.w[0] | uint64_t{out.w[1]} << 32);
}

// Standard Gumbel noise from one word. The bound keeps log1p finite; small u keep all their bits.
template <class S>
S gumbel(uint32_t word) {
  const S top = 1 - S(1) / (1 << 24);
  const S u = (static_cast<S>(word) + S(0.5)) * (S(1) / 65536 / 65536);
  return -std::log(-std::log1p(-(u < top ? u : top)));
}

}  // namespace nlhf
