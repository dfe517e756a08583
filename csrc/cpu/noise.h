// The noise of a draw, many numbers at a time.
#pragma once

#include <cstdint>

#include "common/philox.h"

namespace nlhf {

// counters at a time: their words stay in the first-level cache
constexpr int64_t kPhiloxBatch = 256;

// Philox of n counters, at most kPhiloxBatch, that differ in one word: counter[varying] + 0, 1, ...
// Returns words 0 and 1 of each counter as a number, and words 2 and 3, in arrays of kPhiloxBatch.
void philox_batch(Words counter, int varying, int64_t n, int64_t seed, uint64_t* low,
                  uint64_t* high);

// Gumbel noise of one row at one position, as the sampling contract counts it.
struct Noise {
  int64_t seed;
  uint32_t position;

  // stage 1: of tiles [first, first + n)
  template <class S>
  void of_tiles(int64_t first, int64_t n, S* out) const;

  // stage 2: of the lanes [0, n) of a tile
  template <class S>
  void of_lanes(int64_t tile, int64_t n, S* out) const;
};

}  // namespace nlhf
