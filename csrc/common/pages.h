// Memory that has never been written is handed out page by page at the first write.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace nlhf {

// Asks for large pages in [begin, end), which is about to be written. Small ones would take longer
// than what is written there; where the system refuses, nothing is lost.
inline void use_large_pages(char* begin, char* end) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t{1} << 21, kWorthIt = 4 * kPage;
  const auto first = (reinterpret_cast<uintptr_t>(begin) + kPage - 1) & ~(kPage - 1);
  const auto last = reinterpret_cast<uintptr_t>(end) & ~(kPage - 1);
  if (last < first + kWorthIt) return;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  static_cast<void>(begin);
  static_cast<void>(end);
#endif
}

}  // namespace nlhf
