// The noise of a draw, many numbers at a time.
#pragma once

#include <cstdint>

namespace nlhf {

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
