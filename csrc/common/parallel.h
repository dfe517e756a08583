// Rows over threads. Each row is computed whole by one thread, so results do not depend on how
// many.
#pragma once

#include <cstdint>

#if defined(__SANITIZE_THREAD__)
#include <algorithm>
#include <thread>
#include <vector>
#elif defined(_OPENMP)
#include <omp.h>
#endif

namespace nlhf {

#if defined(__SANITIZE_THREAD__)

// ThreadSanitizer knows what threads of the standard library wait for, and nothing of OpenMP's.
// Neighbouring rows always run in different threads, however little work they are.
constexpr int kSanitizedThreads = 16;
inline thread_local bool in_sanitized_rows = false;

inline int most_threads() { return kSanitizedThreads; }
inline int free_threads() { return in_sanitized_rows ? 1 : kSanitizedThreads; }

template <class Row>
void parallel_rows(int64_t rows, int64_t, const Row& row) {
  const int64_t count = std::min<int64_t>(rows, free_threads());
  if (count <= 1) {
    for (int64_t i = 0; i < rows; ++i) row(i);
    return;
  }
  std::vector<std::thread> threads;
  for (int64_t first = 0; first < count; ++first) {
    threads.emplace_back([&row, first, count, rows] {
      in_sanitized_rows = true;
      for (int64_t i = first; i < rows; i += count) row(i);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

#else

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

#endif

}  // namespace nlhf
