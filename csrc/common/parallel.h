// Rows over threads. Each row is computed whole by one thread, so results do not depend on how
// many.
#pragma once

#include <cstdint>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace nlhf {

inline int most_threads() {
#if defined(_OPENMP)
  return omp_get_max_threads();
#else
  return 1;
#endif
}

// How many more rows could be computed at a time: none for one of several that already are.
inline int free_threads() {
#if defined(_OPENMP)
  return omp_in_parallel() ? 1 : omp_get_max_threads();
#else
  return 1;
#endif
}

// Calls row(i) for i in [0, rows); work is the number of elements in a row. The number of threads
// is the OpenMP runtime's, which torch.set_num_threads sets because torch loads the same one.
template <class Row>
void parallel_rows(int64_t rows, int64_t work, const Row& row) {
  // below this, waking threads costs more than it saves
  constexpr int64_t kMinimumWork = 1 << 15;
  // not a region of one thread: a region inside of it would start its threads anew each time
  if (rows <= 1 || rows * work < kMinimumWork || free_threads() == 1) {
    for (int64_t i = 0; i < rows; ++i) row(i);
    return;
  }
  // dynamic, since masked rows cost nothing
#pragma omp parallel for schedule(dynamic)
  for (int64_t i = 0; i < rows; ++i) row(i);
}

}  // namespace nlhf
