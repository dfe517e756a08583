// Which instruction set the kernels of tiles use: one choice for all of them.
#pragma once

#include <string>
#include <vector>

namespace nlhf {

enum class TileLevel { avx512, avx2, plain };

TileLevel tile_level();

// Whether the tile at hand is worked on at this level; if so, it is remembered.
bool runs_at(TileLevel level);

// The levels of float that this machine has, the one that is used first; and another choice, for
// tests.
std::vector<std::string> tile_levels();
void use_tile_level(const std::string& name);

// The levels at which tiles of float were worked on since the last call of this function.
std::vector<std::string> take_tile_levels_run();

}  // namespace nlhf
