#include "cpu/tile_level.h"

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

}  // namespace

TileLevel tile_level() { return chosen(); }

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

}  // namespace nlhf
