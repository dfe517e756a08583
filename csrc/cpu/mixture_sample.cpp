#include <vector>

#include "common/parallel.h"
#include "common/philox.h"
#include "cpu/mixture_row.h"
#include "cpu/ops.h"

namespace nlhf {
namespace {

template <class S>
class Sampler {
 public:
  Sampler(const Logits& policy, const std::optional<Logits>& ref, const MixtureSampleIn<S>& in,
          const MixtureSampleOut<S>& out)
      : policy_(policy),
        ref_(ref),
        in_(in),
        out_(out),
        tiles_((policy.vocab + kTile - 1) / kTile),
        pieces_((tiles_ + kPiece - 1) / kPiece) {}

  // Each row by one thread, or, if there are few, the pieces of all rows first.
  void run() const {
    const int64_t rows = policy_.rows;
    if (rows >= 4 * most_threads() || pieces_ == 1) {
      parallel_rows(rows, policy_.vocab, [&](int64_t n) {
        thread_local std::vector<TileMass<S>> tiles;
        tiles.resize(tiles_);
        TileReader<S> reader = row(n);
        ByModel<Mass> mass;
        for (int64_t i = 0; i < pieces_; ++i) add(mass, piece(reader, n, i, tiles.data()));
        finish(n, reader, mass, tiles);
      });
      return;
    }
    std::vector<std::vector<TileMass<S>>> tiles(rows, std::vector<TileMass<S>>(tiles_));
    std::vector<ByModel<Mass>> masses(rows * pieces_);
    parallel_rows(rows * pieces_, kPiece * kTile, [&](int64_t i) {
      TileReader<S> reader = row(i / pieces_);
      masses[i] = piece(reader, i / pieces_, i % pieces_, tiles[i / pieces_].data());
    });
    parallel_rows(rows, policy_.vocab, [&](int64_t n) {
      ByModel<Mass> mass;
      for (int64_t i = 0; i < pieces_; ++i) add(mass, masses[n * pieces_ + i]);
      TileReader<S> reader = row(n);
      finish(n, reader, mass, tiles[n]);
    });
  }

 private:
  TileReader<S> row(int64_t n) const {
    return {policy_.row(n), policy_.dtype, ref_ ? ref_->row(n) : nullptr,
            ref_ ? ref_->dtype : policy_.dtype, policy_.vocab};
  }

  Mixture<S> mixture(int64_t n) const {
    const S temperature = in_.temperature[n];
    const bool wants_max = temperature == 0 || !filters(n).off(policy_.vocab);
    return Mixture<S>::of(ref_.has_value(), in_.mixture_coef[n], temperature, wants_max);
  }

  Filters<S> filters(int64_t n) const { return {in_.top_k[n], in_.top_p[n], in_.min_p[n]}; }

  ByModel<Mass> piece(TileReader<S>& reader, int64_t n, int64_t i, TileMass<S>* tiles) const {
    const Mixture<S> how = mixture(n);
    PieceMass<S> sum;
    for (int64_t j = i * kPiece; j < std::min(tiles_, (i + 1) * kPiece); ++j)
      tiles[j] = sum.add(reader.read_tile(j), how);
    return sum.mass();
  }

  void finish(int64_t n, TileReader<S>& reader, const ByModel<Mass>& mass,
              const std::vector<TileMass<S>>& tiles) const {
    const int64_t seed = in_.seed.rows ? in_.seed.rows[n] : fold_in(in_.seed.value, n);
    const Drawn<S> drawn = draw(reader, mixture(n), mass, tiles, in_.temperature[n], filters(n),
                                {seed, static_cast<uint32_t>(in_.position[n])});
    out_.tokens[n] = drawn.token;
    out_.policy_logprobs[n] = drawn.policy_logprob;
    if (ref_) out_.ref_logprobs[n] = drawn.ref_logprob;
    out_.sampling_logprobs[n] = drawn.sampling_logprob;
    out_.log_kept_mass[n] = drawn.log_kept_mass;
  }

  const Logits& policy_;
  const std::optional<Logits>& ref_;
  const MixtureSampleIn<S>& in_;
  const MixtureSampleOut<S>& out_;
  int64_t tiles_, pieces_;
};

}  // namespace

template <class S>
void mixture_sample(const Logits& policy, const std::optional<Logits>& ref,
                    const MixtureSampleIn<S>& in, const MixtureSampleOut<S>& out) {
  Sampler<S>(policy, ref, in, out).run();
}

#define NLHF_INSTANTIATE(S)                                                    \
  template void mixture_sample<S>(const Logits&, const std::optional<Logits>&, \
                                  const MixtureSampleIn<S>&, const MixtureSampleOut<S>&)
NLHF_INSTANTIATE(float);
NLHF_INSTANTIATE(double);
#undef NLHF_INSTANTIATE

}  // namespace nlhf
