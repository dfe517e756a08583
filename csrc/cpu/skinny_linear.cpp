#include "cpu/skinny_linear.h"

#include <algorithm>
#include <cstring>

#include "common/parallel.h"
#include "common/simd.h"

namespace nlhf {
namespace {

struct Shape {
  // N is the stride of y
  int64_t M, N, D;
};

// Columns [n, end) of y.
using Columns = void (*)(const float* x, const float* w, float* y, Shape, int64_t n, int64_t end);

#if defined(__GNUC__)

template <int L>
struct Lanes {
  typedef float type __attribute__((vector_size(L * sizeof(float))));
};

// Adds the upper half of the lanes to the lower, until four are left.
template <int L>
NLHF_INLINE void fold(const typename Lanes<L>::type& x, float* four) {
  if constexpr (L > 4) {
    typename Lanes<L / 2>::type half[2];
    std::memcpy(half, &x, sizeof(x));
    half[0] += half[1];
    fold<L / 2>(half[0], four);
  } else {
    std::memcpy(four, &x, sizeof(x));
  }
}

// Rows [0, R) of x with columns [0, C) of y, so that each register of weights serves R rows. The
// loads are too many streams for the hardware to read ahead, so the next weights are asked for.
template <int L, int R, int C>
NLHF_INLINE void block(const float* x, const float* w, float* y, int64_t N, int64_t D) {
  constexpr int kAhead = 4;
  using V = typename Lanes<L>::type;
  V sums[C][R] = {};
  int64_t d = 0;
  for (; d + L <= D; d += L) {
    V weights[C];
    for (int c = 0; c < C; ++c) {
      std::memcpy(&weights[c], w + c * D + d, sizeof(V));
      __builtin_prefetch(w + (c + kAhead) * D + d);
    }
    for (int r = 0; r < R; ++r) {
      V inputs;
      std::memcpy(&inputs, x + r * D + d, sizeof(V));
      for (int c = 0; c < C; ++c) sums[c][r] += inputs * weights[c];
    }
  }
  for (int c = 0; c < C; ++c) {
    float four[R][4], out[R];
    for (int r = 0; r < R; ++r) fold<L>(sums[c][r], four[r]);
    for (int r = 0; r < R; ++r) out[r] = (four[r][0] + four[r][2]) + (four[r][1] + four[r][3]);
    for (int64_t rest = d; rest < D; ++rest)
      for (int r = 0; r < R; ++r) out[r] += x[r * D + rest] * w[c * D + rest];
    for (int r = 0; r < R; ++r) y[r * N + c] = out[r];
  }
}

template <int L, int R, int C>
NLHF_INLINE int64_t blocks(int64_t m, const float* x, const float* w, float* y, Shape s) {
  for (; m + R <= s.M; m += R) block<L, R, C>(x + m * s.D, w, y + m * s.N, s.N, s.D);
  return m;
}

// C columns of all rows; the weights come from memory with the first block, then from the cache.
template <int L, int C>
NLHF_INLINE void rows(const float* x, const float* w, float* y, Shape s) {
  int64_t m = blocks<L, 8, C>(0, x, w, y, s);
  m = blocks<L, 4, C>(m, x, w, y, s);
  m = blocks<L, 2, C>(m, x, w, y, s);
  blocks<L, 1, C>(m, x, w, y, s);
}

template <int L>
NLHF_INLINE void columns(const float* x, const float* w, float* y, Shape s, int64_t n,
                         int64_t end) {
  // with eight rows, as many sums as there are registers for
  constexpr int C = L == 16 ? 3 : 2;
  for (; n + C <= end; n += C) rows<L, C>(x, w + n * s.D, y + n, s);
  for (; n < end; ++n) rows<L, 1>(x, w + n * s.D, y + n, s);
}

// NLHF_CLONES is for loops that the compiler vectorises; here the width is part of the code
#if defined(__x86_64__) && (defined(__clang__) || __GNUC__ >= 12)
#define NLHF_X86_LEVELS
__attribute__((target("arch=x86-64-v4"))) void columns_v4(const float* x, const float* w, float* y,
                                                          Shape s, int64_t n, int64_t end) {
  columns<16>(x, w, y, s, n, end);
}
__attribute__((target("arch=x86-64-v3"))) void columns_v3(const float* x, const float* w, float* y,
                                                          Shape s, int64_t n, int64_t end) {
  columns<8>(x, w, y, s, n, end);
}
#endif

Columns choose() {
#if defined(NLHF_X86_LEVELS)
  if (__builtin_cpu_supports("x86-64-v4")) return columns_v4;
  if (__builtin_cpu_supports("x86-64-v3")) return columns_v3;
#endif
  return columns<4>;
}

#else

void columns(const float* x, const float* w, float* y, Shape s, int64_t n, int64_t end) {
  for (; n < end; ++n) {
    for (int64_t m = 0; m < s.M; ++m) {
      float sum = 0;
      for (int64_t d = 0; d < s.D; ++d) sum += x[m * s.D + d] * w[n * s.D + d];
      y[m * s.N + n] = sum;
    }
  }
}

Columns choose() { return columns; }

#endif

}  // namespace

void skinny_block(const float* x, const float* w, float* y, int64_t M, int64_t N, int64_t D,
                  int64_t stride) {
  static const Columns columns = choose();
  columns(x, w, y, {M, stride, D}, 0, N);
}

void skinny_linear(const float* x, const float* w, float* y, int64_t M, int64_t N, int64_t D) {
  // long pieces, as what is read ahead at the end of one is another thread's; a few for each
  // thread, for one that is slow
  const int64_t pieces = 4 * most_threads();
  const int64_t size = std::max<int64_t>(32, (N + pieces - 1) / pieces);
  parallel_rows((N + size - 1) / size, size * D, [&](int64_t i) {
    const int64_t n = i * size;
    skinny_block(x, w + n * D, y + n, M, std::min(size, N - n), D, N);
  });
}

}  // namespace nlhf
