#include <algorithm>
#include <vector>

#include "common/parallel.h"
#include "common/philox.h"
#include "cpu/mixture_row.h"
#include "cpu/ops.h"
#include "cpu/skinny_linear.h"

namespace nlhf {
namespace {

using S = float;

// weights that are converted or gathered at a time stay in the second-level cache
constexpr int64_t kGathered = 1 << 16;

// The logits of all rows in one tile, (rows, kTile), and the row's end filled with -inf.
class HeadTile {
 public:
  // hidden: (B, D) in float32, or (2 B, D) of two models, of which the second adds other_bias
  HeadTile(const Head& head, const std::vector<S>& hidden, const char* other_bias, S softcap)
      : head_(head),
        other_bias_(other_bias),
        hidden_(hidden.data()),
        rows_(hidden.size() / head.weight.columns),
        softcap_(softcap),
        logits_(rows_ * kTile) {}

  void compute(int64_t start, int64_t n) {
    const Matrix& weight = head_.weight;
    const int64_t D = weight.columns;
    if (weight.dtype == DType::float32 && weight.stride == D) {
      multiply(reinterpret_cast<const S*>(weight.row(start)), 0, n);
    } else {
      const int64_t step = std::max<int64_t>(1, kGathered / D);
      gathered_.resize(step * D);
      for (int64_t first = 0; first < n; first += step) {
        const int64_t count = std::min(step, n - first);
        for (int64_t i = 0; i < count; ++i)
          load(weight.row(start + first + i), weight.dtype, 0, D, gathered_.data() + i * D);
        multiply(gathered_.data(), first, count);
      }
    }
    const int64_t B = head_.hidden.rows;
    add_bias(head_.bias, 0, B, start, n);
    if (rows_ > B) add_bias(other_bias_, B, rows_, start, n);
    for (int64_t m = 0; m < rows_; ++m) {
      S* row = logits_.data() + m * kTile;
      if (softcap_ != 0) softcap<S>(row, n, softcap_, nullptr);
      std::fill(row + n, row + std::min(kTile, n + kPadding), kNever<S>);
    }
  }

  const S* row(int64_t m) const { return logits_.data() + m * kTile; }

 private:
  void multiply(const S* weight, int64_t first, int64_t count) {
    skinny_block(hidden_, weight, logits_.data() + first, rows_, count, head_.weight.columns,
                 kTile);
  }

  void add_bias(const char* bias, int64_t first, int64_t last, int64_t start, int64_t n) {
    if (!bias) return;
    S x[kTile];
    load(bias, head_.weight.dtype, start, n, x);
    for (int64_t m = first; m < last; ++m)
      for (int64_t i = 0; i < n; ++i) logits_[m * kTile + i] += x[i];
  }

  const Head& head_;
  const char* other_bias_;
  const S* hidden_;
  int64_t rows_;
  S softcap_;
  std::vector<S> logits_, gathered_;
};

// What is known of a row after some of its tiles: their masses, and who would win among them. A
// race is run only in a tile that beats all before it, so there are few.
struct Contest {
  ByModel<Mass> mass;
  double best = kNever<double>;
  Token<S> token;

  void add(const Contest& later) {
    nlhf::add(mass, later.mass);
    if (later.best > best) {
      best = later.best;
      token = later.token;
    }
  }
};

class Row {
 public:
  Row(const Mixture<S>& how, bool greedy, Noise noise)
      : how_(how), greedy_(greedy), noise_(noise) {}

  void add(const TileLogits<S>& tile, int64_t j) {
    const TileMass<S> mass = sum_.add(tile, how_);
    double score = mass.max;
    if (!greedy_) {
      S noise;
      noise_.of_tiles(j, 1, &noise);
      score = mass.mass().log2() * 0.69314718055994531 + noise;
    }
    if (!(score > contest_.best)) return;
    alignas(64) S mixed[kTile];
    tile_kernels<S>().mix(tile, how_, mixed);
    const int64_t lane = greedy_ ? std::find(mixed, mixed + tile.n, mass.max) - mixed
                                 : draw_lane(mixed, tile.n, how_.scale, j, noise_);
    if (lane < 0 || lane == tile.n) return;
    contest_.best = score;
    contest_.token = {j * kTile + lane, tile.policy[lane], tile.ref ? tile.ref[lane] : S(0),
                      mixed[lane]};
  }

  Contest result() const {
    Contest out = contest_;
    out.mass = sum_.mass();
    return out;
  }

 private:
  Mixture<S> how_;
  bool greedy_;
  Noise noise_;
  PieceMass<S> sum_;
  Contest contest_;
};

std::vector<S> hidden_states(const Matrix& hidden, const Matrix* more) {
  std::vector<S> out;
  for (const Matrix* x : {&hidden, more}) {
    if (!x) continue;
    const size_t start = out.size();
    out.resize(start + x->rows * x->columns);
    for (int64_t m = 0; m < x->rows; ++m)
      load(x->row(m), x->dtype, 0, x->columns, out.data() + start + m * x->columns);
  }
  return out;
}

}  // namespace

void linear_mixture_sample(const Head& policy, const std::optional<Head>& ref, float softcap,
                           const MixtureSampleIn<S>& in, const MixtureSampleOut<S>& out) {
  const int64_t B = policy.hidden.rows, vocab = policy.weight.rows;
  const int64_t pieces = (vocab + kPiece * kTile - 1) / (kPiece * kTile);
  // one product for both models if they share the head
  const bool shared = ref && !ref->weight.data;
  const auto policy_hidden = hidden_states(policy.hidden, shared ? &ref->hidden : nullptr);
  const auto ref_hidden = ref && !shared ? hidden_states(ref->hidden, nullptr) : std::vector<S>();
  const auto noise = [&](int64_t b) {
    return Noise{in.seed.rows ? in.seed.rows[b] : fold_in(in.seed.value, b),
                 static_cast<uint32_t>(in.position[b])};
  };
  const auto mixture = [&](int64_t b) {
    const S temperature = in.temperature[b];
    return Mixture<S>::of(ref.has_value(), in.mixture_coef[b], temperature, temperature == 0);
  };

  std::vector<Contest> contests(pieces * B);
  parallel_rows(pieces, kPiece * kTile * policy.weight.columns, [&](int64_t i) {
    HeadTile policy_tile(policy, policy_hidden, shared ? ref->bias : nullptr, softcap);
    std::optional<HeadTile> ref_tile;
    if (ref && !shared) ref_tile.emplace(*ref, ref_hidden, nullptr, softcap);
    std::vector<Row> rows;
    for (int64_t b = 0; b < B; ++b) rows.emplace_back(mixture(b), in.temperature[b] == 0, noise(b));
    const int64_t end = std::min(vocab, (i + 1) * kPiece * kTile);
    for (int64_t start = i * kPiece * kTile; start < end; start += kTile) {
      const int64_t n = std::min(kTile, end - start);
      policy_tile.compute(start, n);
      if (ref_tile) ref_tile->compute(start, n);
      for (int64_t b = 0; b < B; ++b) {
        const S* ref_row = ref_tile ? ref_tile->row(b) : shared ? policy_tile.row(B + b) : nullptr;
        rows[b].add({policy_tile.row(b), ref_row, n}, start / kTile);
      }
    }
    for (int64_t b = 0; b < B; ++b) contests[i * B + b] = rows[b].result();
  });

  for (int64_t b = 0; b < B; ++b) {
    Contest whole;
    for (int64_t i = 0; i < pieces; ++i) whole.add(contests[i * B + b]);
    Drawn<S> draw;
    if (whole.token.id >= 0 && usable(mixture(b), whole.mass, in.temperature[b]))
      draw =
          drawn(whole.token, mixture(b), whole.mass, whole.mass.mixture.log2(), in.temperature[b]);
    out.tokens[b] = draw.token;
    out.policy_logprobs[b] = draw.policy_logprob;
    if (ref) out.ref_logprobs[b] = draw.ref_logprob;
    out.sampling_logprobs[b] = draw.sampling_logprob;
    out.log_kept_mass[b] = draw.log_kept_mass;
  }
}

}  // namespace nlhf
