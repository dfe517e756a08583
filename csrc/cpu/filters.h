// Top-k, top-p and min-p without a sort: each keeps a prefix of a row's ids in the order of falling
// mixed logits, equal ones by rising id, so all there is to find is where the prefix ends.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/mixture_row.h"

namespace nlhf {

// The ids of a row that are kept. It refers to memory of its thread and lasts until the next one.
template <class S>
class Selection {
 public:
  // everything
  Selection() = default;
  // the mixed logits of at least bound, of those equal to it the first ties in the order of ids
  Selection(S bound, const std::vector<S>& tile_mass, const std::vector<int64_t>& tile_ties,
            double mass)
      : bound_(bound), tile_mass_(tile_mass.data()), tile_ties_(tile_ties.data()), mass_(mass) {}

  bool all() const { return tile_mass_ == nullptr; }
  // sum 2^(score - that of the row's maximum)
  double mass() const { return mass_; }
  S tile_mass(int64_t tile) const { return tile_mass_[tile]; }

  // mixed logits of a tile become -inf where they are not kept
  void drop_others(int64_t tile, S* mixed, int64_t n) const {
    if (all()) return;
    int64_t ties = tile_ties_[tile];
    for (int64_t i = 0; i < n; ++i)
      if (!(mixed[i] > bound_) && !(mixed[i] == bound_ && ties-- > 0)) mixed[i] = kNever<S>;
  }

 private:
  S bound_ = kNever<S>;
  const S* tile_mass_ = nullptr;
  const int64_t* tile_ties_ = nullptr;
  double mass_ = 0;
};

// What the filters keep of a row whose largest mixed logit is max; whole is the mass of all, as
// sum 2^(score - that of max).
template <class S>
Selection<S> select(TileReader<S>& reader, const Mixture<S>& how,
                    const std::vector<TileMass<S>>& tiles, S max, double whole,
                    const Filters<S>& filters);

}  // namespace nlhf
