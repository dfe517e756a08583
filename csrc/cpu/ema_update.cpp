#include "cpu/ema_update.h"

#include <algorithm>
#include <type_traits>

#include "common/parallel.h"
#include "common/philox.h"
#include "common/simd.h"
#include "cpu/noise.h"

// a product and the sum around it must not become one instruction: the bits are part of the
// contract
#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#define NLHF_UNFUSED
#elif defined(__GNUC__)
#define NLHF_UNFUSED __attribute__((optimize("fp-contract=off")))
#else
#define NLHF_UNFUSED
#endif

namespace nlhf {
namespace {

// elements that a thread takes at a time, a multiple of what one batch of words serves
constexpr int64_t kPiece = 1 << 16;
constexpr int64_t kWords = 4 * kPhiloxBatch;
static_assert(kPiece % kWords == 0);

// value = (near ? ema : param) + coef * (param - ema), or just the first where coef is 0
struct Step {
  bool near;
  double coef;
};

template <class S, class T>
NLHF_INLINE S read(T x) {
  if constexpr (std::is_same_v<T, double>) {
    return static_cast<S>(x);
  } else {
    return static_cast<S>(to_float(x));
  }
}

template <class S, class T>
NLHF_INLINE void write(S x, T& out) {
  if constexpr (std::is_same_v<T, double>) {
    out = x;
  } else {
    from_float(static_cast<float>(x), out);
  }
}

template <class S, class E, class P>
NLHF_UNFUSED NLHF_CLONES void toward(E* ema, const P* param, int64_t n, S coef) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const S old = read<S>(ema[i]), step = read<S>(param[i]) - old;
    write<S>(old + coef * step, ema[i]);
  }
}

template <class S, class E, class P>
NLHF_UNFUSED NLHF_CLONES void away_from(E* ema, const P* param, int64_t n, S coef) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const S now = read<S>(param[i]), step = now - read<S>(ema[i]);
    write<S>(now + coef * step, ema[i]);
  }
}

template <class S, class E, class P>
NLHF_CLONES void copy(E* ema, const P* param, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) write<S>(read<S>(param[i]), ema[i]);
}

template <class S, class E, class P>
void update(E* ema, const P* param, int64_t n, Step step) {
  const S coef = static_cast<S>(step.coef);
  if (coef == 0) {
    if (!step.near) copy<S>(ema, param, n);
  } else if (step.near) {
    toward<S>(ema, param, n, coef);
  } else {
    away_from<S>(ema, param, n, coef);
  }
}

NLHF_CLONES void interleave(const uint64_t* low, const uint64_t* high, int64_t blocks,
                            uint32_t* words) {
#pragma omp simd
  for (int64_t i = 0; i < blocks; ++i) {
    words[4 * i] = static_cast<uint32_t>(low[i]);
    words[4 * i + 1] = static_cast<uint32_t>(low[i] >> 32);
    words[4 * i + 2] = static_cast<uint32_t>(high[i]);
    words[4 * i + 3] = static_cast<uint32_t>(high[i] >> 32);
  }
}

template <class S, class P>
NLHF_UNFUSED NLHF_CLONES void round_stochastically(BFloat16* ema, const P* param, int64_t n, S coef,
                                                   bool near, const uint32_t* words) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const S old = read<S>(ema[i]), now = read<S>(param[i]);
    const S base = near ? old : now;
    const S sum = base + coef * (now - old);
    const float value = static_cast<float>(coef == 0 ? base : sum);
    const uint32_t bits = bit_cast<uint32_t>(value);
    const bool finite = (bits & 0x7F800000u) != 0x7F800000u;
    BFloat16 nearest;
    from_float(value, nearest);
    const uint32_t drawn = (bits + (words[i] & 0xFFFFu)) >> 16;
    ema[i].bits = static_cast<uint16_t>(finite ? drawn : nearest.bits);
  }
}

template <class S, class P>
void update_stochastically(BFloat16* ema, const P* param, int64_t start, int64_t n, Step step,
                           int64_t seed) {
  uint64_t low[kPhiloxBatch], high[kPhiloxBatch];
  uint32_t words[kWords];
  for (int64_t done = 0; done < n; done += kWords) {
    const int64_t count = std::min(kWords, n - done), blocks = (count + 3) / 4;
    const auto block = static_cast<uint64_t>(start + done) / 4;
    // a batch begins at a multiple of its size, so its counters share their upper word
    const Words counter{{static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32), 0, 3}};
    philox_batch(counter, 0, blocks, seed, low, high);
    interleave(low, high, blocks, words);
    round_stochastically<S>(ema + done, param + done, count, static_cast<S>(step.coef), step.near,
                            words);
  }
}

// Elements [start, start + n) of a tensor.
struct Piece {
  const EmaTensor& tensor;
  int64_t start, n;
  Step step;
  const int64_t* seed;

  template <class E, class P>
  void run(E* ema, const P* param) const {
    using S =
        std::conditional_t<std::is_same_v<E, double> || std::is_same_v<P, double>, double, float>;
    if constexpr (std::is_same_v<E, BFloat16>) {
      if (seed) return update_stochastically<S>(ema + start, param + start, start, n, step, *seed);
    }
    update<S>(ema + start, param + start, n, step);
  }

  template <class E>
  void run(E* ema) const {
    switch (tensor.param_dtype) {
      case DType::float16:
        return run(ema, reinterpret_cast<const Float16*>(tensor.param));
      case DType::bfloat16:
        return run(ema, reinterpret_cast<const BFloat16*>(tensor.param));
      case DType::float32:
        return run(ema, reinterpret_cast<const float*>(tensor.param));
      case DType::float64:
        return run(ema, reinterpret_cast<const double*>(tensor.param));
    }
  }

  void run() const {
    switch (tensor.ema_dtype) {
      case DType::float16:
        return run(reinterpret_cast<Float16*>(tensor.ema));
      case DType::bfloat16:
        return run(reinterpret_cast<BFloat16*>(tensor.ema));
      case DType::float32:
        return run(reinterpret_cast<float*>(tensor.ema));
      case DType::float64:
        return run(reinterpret_cast<double*>(tensor.ema));
    }
  }
};

}  // namespace

void ema_update(const std::vector<EmaTensor>& tensors, double decay, const int64_t* seed) {
  const bool near = 1 - decay < 0.5;
  const Step step{near, near ? 1 - decay : -decay};
  // the first piece of each tensor, and the end
  std::vector<int64_t> first{0}, seeds;
  int64_t total = 0;
  for (size_t k = 0; k < tensors.size(); ++k) {
    first.push_back(first.back() + (tensors[k].size + kPiece - 1) / kPiece);
    total += tensors[k].size;
    if (seed) seeds.push_back(fold_in(*seed, static_cast<int64_t>(k)));
  }
  const int64_t pieces = first.back();
  if (pieces == 0) return;
  parallel_rows(pieces, total / pieces, [&](int64_t piece) {
    // the last tensor that begins here or before: empty ones have no piece
    const auto k = std::upper_bound(first.begin(), first.end(), piece) - first.begin() - 1;
    const int64_t start = (piece - first[k]) * kPiece;
    const int64_t n = std::min(kPiece, tensors[k].size - start);
    Piece{tensors[k], start, n, step, seed ? &seeds[k] : nullptr}.run();
  });
}

}  // namespace nlhf
