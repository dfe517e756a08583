#include "cpu/filters.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "common/parallel.h"
#include "common/simd.h"

namespace nlhf {
namespace {

// mixed logits that are looked at together; more of them are narrowed down first
constexpr int64_t kCandidates = 1 << 15;
// a tile more than that, and what is written beyond the last
constexpr int64_t kRoom = kCandidates + kTile + 2 * kPadding;
// among more than so many, a sample says where to look, if it has so many of equal weight
constexpr int64_t kSampled = 1 << 13;
constexpr double kTrusted = 256;

// Floating-point numbers in their order, as integers; both zeros are 0.
template <class S>
struct Ordered {
  using Key = std::conditional_t<sizeof(S) == 4, int32_t, int64_t>;
  static constexpr Key kSign = std::numeric_limits<Key>::min();

  static Key key(S x) {
    const Key bits = bit_cast<Key>(x);
    return bits < 0 ? -(bits & ~kSign) : bits;
  }
  static S value(Key key) { return bit_cast<S>(key < 0 ? -key | kSign : key); }
  static S next(S x) { return value(key(x) + 1); }
  static S between(S low, S high) {
    const Key a = key(low), b = key(high);
    return value((a & b) + ((a ^ b) >> 1));
  }
};

// How long the prefix must be: so many ids, or so much mass.
struct Target {
  int64_t count;
  double mass;

  bool met(const Above<double>& above) const {
    return count ? above.count >= count : above.mass >= mass;
  }
};

Above<double> operator+(const Above<double>& one, const Above<double>& other) {
  return {one.count + other.count, one.mass + other.mass};
}

constexpr int64_t kAll = std::numeric_limits<int64_t>::max();

// The prefix of a filter: mixed logits above bound, and of those equal to it so many.
template <class S>
struct Prefix {
  S bound;
  int64_t ties;
  // of all ids of at least bound, or more
  int64_t count;
  double mass;
};

// Where mixed logits end to be in a prefix: what lies above bound, and how many are equal to it.
template <class S>
struct End {
  S bound;
  Above<double> above;
  int64_t equal;
};

// mass and number of x > bound, and how many equal it
template <class S>
NLHF_CLONES void beyond(const S* x, const S* weight, int64_t n, S bound, S* mass, int64_t* ties) {
  S sum = 0;
  int32_t equal = 0;
#pragma omp simd reduction(+ : sum, equal)
  for (int64_t i = 0; i < n; ++i) {
    sum += x[i] > bound ? weight[i] : S(0);
    equal += x[i] == bound;
  }
  *mass = sum;
  *ties = equal;
}

template <class S>
NLHF_CLONES double sum_of_squares(const S* x, const S* weight, int64_t n, S bound) {
  S sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += x[i] >= bound ? weight[i] * weight[i] : S(0);
  return sum;
}

template <class S>
class Selector {
 public:
  static Selector& of_thread() {
    thread_local Selector selector;
    return selector;
  }

  Selection<S> select(TileReader<S>& reader, const Mixture<S>& how,
                      const std::vector<TileMass<S>>& tiles, S max, double whole,
                      const Filters<S>& filters) {
    reader_ = &reader;
    how_ = &how;
    tiles_ = &tiles;
    max_ = max;
    low_ = high_ = max;
    complete_ = false;
    x_.resize(kRoom);
    weight_.resize(x_.size());
    narrow_x_.resize(x_.size());
    narrow_weight_.resize(x_.size());
    tile_above_.resize(tiles.size());
    tile_mass_.resize(tiles.size());
    between_.resize(tiles.size());

    const int64_t vocab = reader.vocab();
    Prefix<S> kept{std::numeric_limits<S>::lowest(), kAll, vocab, whole};
    if (filters.top_k > 0 && filters.top_k < vocab) kept = find({filters.top_k, 0}, kept);
    if (!(filters.top_p >= 1)) {
      // at least one id is kept, by NaN too
      const double mass = filters.top_p > 0 ? filters.top_p * kept.mass : 0;
      kept = stricter(kept, find({0, std::max(mass, kLeast)}, kept));
    }
    if (filters.min_p > 0) {
      const double bound = max + std::log(static_cast<double>(filters.min_p)) * kLn2Inverse /
                                     static_cast<double>(how.scale);
      S least = static_cast<S>(std::max<double>(bound, std::numeric_limits<S>::lowest()));
      if (least < bound) least = Ordered<S>::next(least);
      kept = stricter(kept, {std::min(least, max), kAll, vocab, whole});
    }
    return finish(kept);
  }

 private:
  using O = Ordered<S>;
  static constexpr double kLn2Inverse = 1.4426950408889634, kLeast = 1e-300;

  static Prefix<S> stricter(const Prefix<S>& one, const Prefix<S>& other) {
    if (one.bound != other.bound) return one.bound > other.bound ? one : other;
    return one.ties < other.ties ? one : other;
  }

  S power(S x) const { return power_of_two((x - max_) * how_->scale); }

  // Reads all tiles that reach low: what lies above high is counted, what lies in between is kept
  // with its weights if there is room for it. A row that is alone is shared by the threads.
  void scan(S low, S high) {
    low_ = low;
    high_ = high;
    const int64_t tiles = tiles_->size(),
                  share = std::max<int64_t>(kPiece, 1 + (tiles - 1) / free_threads());
    const int64_t parts = (tiles + share - 1) / share;
    if (parts_.size() < static_cast<size_t>(parts)) parts_.resize(parts);
    parallel_rows(parts, share * kTile, [&](int64_t i) {
      scan_part(low, high, i * share, std::min(tiles, (i + 1) * share), parts_[i]);
    });
    above_ = {0, 0};
    in_between_ = 0;
    for (int64_t j = 0; j < tiles; ++j) {
      above_ = above_ + tile_above_[j];
      in_between_ += between_[j];
    }
    complete_ = in_between_ <= kCandidates;
    stored_ = 0;
    if (!complete_) return;
    for (int64_t i = 0; i < parts; ++i) {
      std::copy_n(parts_[i].x.begin(), parts_[i].stored, x_.begin() + stored_);
      stored_ += parts_[i].stored;
    }
    weigh();
  }

  struct Part {
    std::vector<S> x;
    int64_t stored;
  };

  void scan_part(S low, S high, int64_t first, int64_t last, Part& part) {
    part.x.resize(kRoom);
    part.stored = 0;
    TileReader<S> reader = *reader_;
    for (int64_t j = first; j < last; ++j) {
      between_[j] = 0;
      tile_above_[j] = {0, 0};
      if (!((*tiles_)[j].max >= low)) continue;
      const bool room = part.stored <= kCandidates;
      Above<S> above;
      between_[j] = tile_kernels<S>().split(reader.read_tile(j), *how_, max_, low, high, &above,
                                            room ? part.x.data() + part.stored : nullptr);
      tile_above_[j] = {above.count, above.mass};
      if (room) part.stored += between_[j];
    }
  }

  void weigh() {
    std::fill(x_.begin() + stored_, x_.begin() + stored_ + kPadding, kNever<S>);
    tile_kernels<S>().powers(x_.data(), stored_, max_, how_->scale, weight_.data());
  }

  // Of what is stored.
  Above<double> at_least(S bound) const {
    return tile_kernels<S>().at_least(x_.data(), weight_.data(), stored_, bound);
  }

  // The end of the prefix that meets the target: that of low does, that of high, which is above,
  // does not. What is stored has all between them.
  End<S> bisect(const Target& target, S low, S high, Above<double> above) {
    const TileKernels<S>& kernels = tile_kernels<S>();
    const S *x = x_.data(), *weight = weight_.data();
    int64_t n = stored_;
    const auto narrow = [&] {
      n = kernels.narrow(x, weight, n, low, high, narrow_x_.data(), narrow_weight_.data());
      x = narrow_x_.data();
      weight = narrow_weight_.data();
    };
    while (O::key(low) + 1 < O::key(high)) {
      const S middle = O::between(low, high);
      const Above<double> both = above + kernels.at_least(x, weight, n, middle);
      if (target.met(both)) {
        low = middle;
      } else {
        high = middle;
        above = both;
      }
      narrow();
    }
    narrow();
    return {low, above, n};
  }

  // The end of the prefix that meets the target, within the prefix of an earlier filter.
  Prefix<S> find(const Target& target, const Prefix<S>& within) {
    // the prefix of low meets the target, that of high does not
    S low = within.bound, high = O::next(max_);
    int64_t low_count = within.count, high_count = 0;
    // the same, but not for sure
    S likely_low = low, likely_high = high;
    bool guess = low_count > kSampled;
    while (true) {
      if (complete_ && low_ <= low && high <= high_)
        return prefix(target, bisect(target, low, high, above_in(high)));
      if (O::next(low) == high) {
        // one value, more often than there is room for
        scan(low, high);
        return prefix(target, {low, above_, in_between_});
      }
      S from = low, to = high;
      if (guess) {
        likely_low = bracket(target, within, &from, &to);
      } else if (low_count - high_count > kCandidates) {
        from = O::between(std::max(low, likely_low), std::min(high, likely_high));
        if (!(low < from && from < high)) from = O::between(low, high);
        to = from;
      }
      scan(from, to);
      if (guess && !complete_) {
        likely_low = from;
        likely_high = to;
      }
      guess = false;
      const Above<double> between{in_between_, complete_ ? at_least(kNever<S>).mass : 0};
      if (target.met(above_)) {
        low = to;
        low_count = above_.count;
      } else if (target.met(above_ + between) || from == low) {
        low = from;
        low_count = above_.count + in_between_;
        high = to;
        high_count = above_.count;
      } else if (complete_) {
        high = from;
        high_count = above_.count + in_between_;
      }
    }
  }

  // What lies above high, of which nothing more is stored.
  Above<double> above_in(S high) const { return high < high_ ? above_ + at_least(high) : above_; }

  Prefix<S> prefix(const Target& target, const End<S>& end) const {
    double ties = static_cast<double>(target.count - end.above.count);
    const double weight = power(end.bound);
    if (!target.count) ties = std::ceil((target.mass - end.above.mass) / weight);
    // rounding must not lose the one that meets the target; a weight of 0 gives NaN
    const int64_t kept = ties < end.equal ? std::max<int64_t>(1, ties) : end.equal;
    return {end.bound, kept, end.above.count + end.equal, end.above.mass + kept * weight};
  }

  // Where the end of the prefix is to be expected: in [from, to). Returns a bound that it does not
  // pass, but for rounding.
  S bracket(const Target& target, const Prefix<S>& within, S* from, S* to) {
    const int64_t tiles = tiles_->size(), vocab = reader_->vocab();
    if (target.count && target.count <= tiles) {
      // as many tiles reach it, and so at least as many ids
      narrow_x_.resize(std::max<size_t>(narrow_x_.size(), tiles));
      const auto first = narrow_x_.begin();
      for (int64_t j = 0; j < tiles; ++j) first[j] = (*tiles_)[j].max;
      std::nth_element(first, first + target.count - 1, first + tiles, std::greater<S>());
      *from = std::max(*from, first[target.count - 1]);
      return *from;
    }
    if (!target.count) {
      // all ids below it together are not worth what may be left out
      const double rest = std::max(within.mass - target.mass, 0.0) / vocab;
      const double least = max_ + std::log2(rest) / static_cast<double>(how_->scale);
      if (least > *from) *from = std::min(static_cast<S>(least), max_);
    }
    const S bound = *from;
    sample();
    const Above<double> all = at_least(within.bound);
    const double reached = at_least(*from).count;
    if (reached / stored_ * vocab < kCandidates / 4) return bound;
    // as many equal weights would say as much
    double n = all.count, share = target.mass / within.mass;
    if (target.count) {
      share = static_cast<double>(target.count) / vocab * stored_ / all.count;
    } else {
      n = all.mass * all.mass / sum_of_squares(x_.data(), weight_.data(), stored_, within.bound);
    }
    if (n < kTrusted) {
      // the few that weigh most may all have been missed, but they are few
      const Target few{kCandidates / 2 * stored_ / vocab, 0};
      *from = std::max(*from, bisect(few, *from, O::next(max_), {0, 0}).bound);
      return bound;
    }
    // so many standard deviations to both sides
    const double off = 3.5 * std::sqrt(share * (1 - share) / n);
    const auto at = [&](double part) {
      const Target sampled{target.count ? std::max<int64_t>(1, part * all.count) : 0,
                           part * all.mass};
      return bisect(sampled, *from, O::next(max_), {0, 0}).bound;
    };
    if (share > off) *to = at(share - off);
    if (share + off < 1) *from = std::max(*from, at(share + off));
    if (!(*to > *from)) *to = O::next(*from);
    return bound;
  }

  // Some of every tile instead of what was stored.
  void sample() {
    complete_ = false;
    stored_ = 0;
    const int64_t each = kPadding / 2, tiles = tiles_->size(), vocab = reader_->vocab();
    const int64_t stride = 1 + tiles * each / (kCandidates / 4);
    alignas(64) S mixed[kPadding];
    for (int64_t j = 0; j < tiles; j += stride) {
      const int64_t start = j * kTile + j * 5 * kPadding % kTile;
      if (start + each > vocab) break;
      tile_kernels<S>().mix(reader_->read(start, each), *how_, mixed);
      std::copy(mixed, mixed + each, x_.begin() + stored_);
      stored_ += each;
    }
    weigh();
  }

  // The mass of every tile.
  Selection<S> finish(const Prefix<S>& kept) {
    const S after = O::next(kept.bound);
    const bool known = complete_ && low_ <= kept.bound && after <= high_;
    const bool one_value = low_ == kept.bound && high_ == after;
    if (!known && !one_value) scan(kept.bound, after);
    const S weight = power(kept.bound);
    double mass = 0;
    int64_t left = kept.ties;
    const S *x = x_.data(), *w = weight_.data();
    for (size_t j = 0; j < tiles_->size(); ++j) {
      S more = 0;
      int64_t ties = between_[j];
      if (known) {
        beyond(x, w, between_[j], kept.bound, &more, &ties);
        x += between_[j];
        w += between_[j];
      }
      between_[j] = std::min(ties, left);
      left -= between_[j];
      tile_mass_[j] = static_cast<S>(tile_above_[j].mass) + more + between_[j] * weight;
      mass += tile_mass_[j];
    }
    return {kept.bound, tile_mass_, between_, mass};
  }

  TileReader<S>* reader_;
  const Mixture<S>* how_;
  const std::vector<TileMass<S>>* tiles_;
  S max_;
  // the latest scan
  S low_, high_;
  Above<double> above_;
  int64_t in_between_, stored_;
  bool complete_ = false;
  std::vector<S> x_, weight_, narrow_x_, narrow_weight_, tile_mass_;
  std::vector<Above<double>> tile_above_;
  std::vector<Part> parts_;
  std::vector<int64_t> between_;
};

}  // namespace

template <class S>
Selection<S> select(TileReader<S>& reader, const Mixture<S>& how,
                    const std::vector<TileMass<S>>& tiles, S max, double whole,
                    const Filters<S>& filters) {
  return Selector<S>::of_thread().select(reader, how, tiles, max, whole, filters);
}

#define NLHF_INSTANTIATE(S)                                          \
  template Selection<S> select<S>(TileReader<S>&, const Mixture<S>&, \
                                  const std::vector<TileMass<S>>&, S, double, const Filters<S>&)
NLHF_INSTANTIATE(float);
NLHF_INSTANTIATE(double);
#undef NLHF_INSTANTIATE

}  // namespace nlhf
