#include "cpu/ema_update.h"

#include <algorithm>
#include <cstring>
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

// Only the lower half of a word is drawn with: four of them are one number of 64 bits.
NLHF_CLONES void lower_halves(const uint64_t* low, const uint64_t* high, int64_t blocks,
                              uint64_t* out) {
  constexpr uint64_t kHalf = 0xFFFFu;
#pragma omp simd
  for (int64_t i = 0; i < blocks; ++i) {
    const uint64_t first = (low[i] & kHalf) | (low[i] >> 32 & kHalf) << 16;
    const uint64_t second = (high[i] & kHalf) | (high[i] >> 32 & kHalf) << 16;
    out[i] = first | second << 32;
  }
}

void unpack(const uint64_t* packed, int64_t blocks, uint16_t* halves) {
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
  std::memcpy(halves, packed, blocks * sizeof(uint64_t));
#else
  for (int64_t i = 0; i < 4 * blocks; ++i) {
    halves[i] = static_cast<uint16_t>(packed[i / 4] >> 16 * (i % 4));
  }
#endif
}

// How a value comes about: the two steps above, or a copy.
enum class Way { toward, away_from, copy };

template <Way way, class S, class P>
NLHF_UNFUSED NLHF_CLONES void round_stochastically(uint16_t* ema, const P* param, int64_t n, S coef,
                                                   const uint16_t* halves) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const S old = read<S>(BFloat16{ema[i]}), now = read<S>(param[i]);
    S exact = now;
    if constexpr (way != Way::copy) {
      exact = (way == Way::toward ? old : now) + coef * (now - old);
    }
    const uint32_t bits = bit_cast<uint32_t>(static_cast<float>(exact)), size = bits & 0x7FFFFFFFu;
    // a NaN whose upper half is that of an infinity must stay one
    const uint32_t special = bits >> 16 | (size > 0x7F800000u ? 0x40u : 0u);
    const uint32_t drawn = (bits + halves[i]) >> 16;
    ema[i] = static_cast<uint16_t>(size < 0x7F800000u ? drawn : special);
  }
}

template <class S, class P>
void update_stochastically(uint16_t* ema, const P* param, int64_t start, int64_t n, Step step,
                           int64_t seed) {
  const S coef = static_cast<S>(step.coef);
  // what the average holds is exact
  if (coef == 0 && step.near) return;
  uint64_t low[kPhiloxBatch], high[kPhiloxBatch];
  uint64_t packed[kPhiloxBatch];
  uint16_t halves[kWords];
  for (int64_t done = 0; done < n; done += kWords) {
    const int64_t count = std::min(kWords, n - done), blocks = (count + 3) / 4;
    const auto block = static_cast<uint64_t>(start + done) / 4;
    // a batch begins at a multiple of its size, so its counters share their upper word
    const Words counter{{static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32), 0, 3}};
    philox_batch(counter, 0, blocks, seed, low, high);
    lower_halves(low, high, blocks, packed);
    unpack(packed, blocks, halves);
    if (coef == 0) {
      round_stochastically<Way::copy, S>(ema + done, param + done, count, coef, halves);
    } else if (step.near) {
      round_stochastically<Way::toward, S>(ema + done, param + done, count, coef, halves);
    } else {
      round_stochastically<Way::away_from, S>(ema + done, param + done, count, coef, halves);
    }
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
      if (seed) {
        auto* bits = reinterpret_cast<uint16_t*>(tensor.ema) + start;
        return update_stochastically<S>(bits, param + start, start, n, step, *seed);
      }
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
