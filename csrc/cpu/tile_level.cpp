#include "cpu/tile_level.h"

#include <atomic>
#include <stdexcept>

#include "common/simd.h"

namespace nlhf {
namespace {

struct Named {
  const char* name;
  TileLevel level;
};

const std::vector<Named>& levels() {
  static const std::vector<Named> found = [] {
    std::vector<Named> levels;
#if defined(NLHF_X86_REGIONS)
    if (__builtin_cpu_supports("x86-64-v4")) levels.push_back({"avx512", TileLevel::avx512});
    if (__builtin_cpu_supports("x86-64-v3")) levels.push_back({"avx2", TileLevel::avx2});
#endif
    levels.push_back({"plain", TileLevel::plain});
    return levels;
  }();
  return found;
}

TileLevel& chosen() {
  static TileLevel level = levels().front().level;
  return level;
}

std::atomic<bool>& has_run(TileLevel level) {
  static std::atomic<bool> flags[3];
  return flags[static_cast<int>(level)];
}

}  // namespace

TileLevel tile_level() { return chosen(); }

bool runs_at(TileLevel level) {
  if (level != chosen()) return false;
  // a flag, and written once: a count would be a cache line that all threads write to at every tile
  std::atomic<bool>& flag = has_run(level);
  if (!flag.load(std::memory_order_relaxed)) flag.store(true, std::memory_order_relaxed);
  return true;
}

std::vector<std::string> tile_levels() {
  std::vector<std::string> names;
  for (const Named& level : levels()) names.push_back(level.name);
  return names;
}

void use_tile_level(const std::string& name) {
  for (const Named& level : levels()) {
    if (name != level.name) continue;
    chosen() = level.level;
    return;
  }
  throw std::invalid_argument("use_tile_level: this machine has no level \"" + name + "\"");
}

std::vector<std::string> take_tile_levels_run() {
  std::vector<std::string> names;
  for (const Named& level : levels())
    if (has_run(level.level).exchange(false)) names.push_back(level.name);
  return names;
}

}  // namespace nlhf
