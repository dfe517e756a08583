"""What an H200 could do with an instruction stream: predictions, not measurements.

One number per unit: the time of an element if only that unit had to work. The slowest is the
bound. Latency, launches, tails of a grid and cache hits are left out, so this is the best case.
"""

import math

SMS = 132
CLOCK = 1.98e9
# bytes a second of a large copy on one of them, the assumption for all memory
COPY = 4.3e12
# lanes of a multiprocessor in a cycle
LANES = {"mufu": 16, "fma": 128, "alu": 64, "issue": 4 * 32}
WARP = 32
# of one multiprocessor
MOST_WARPS, MOST_BLOCKS, REGISTERS, SHARED = 64, 32, 65_536, 228 * 1024
# registers are given to a warp in units of 256; a block's shared memory has 1 KB for the system
REGISTER_UNIT, SHARED_RESERVED = 256, 1024


def occupancy(registers: int, shared_bytes: int, warps: int) -> float:
    """Resident warps over the most there can be, for blocks of so many warps."""
    per_warp = math.ceil(registers * WARP / REGISTER_UNIT) * REGISTER_UNIT
    blocks = min(
        MOST_BLOCKS,
        MOST_WARPS // warps,
        # whole warps fit in one quarter each
        4 * (REGISTERS // 4 // per_warp) // warps,
        SHARED // (shared_bytes + SHARED_RESERVED),
    )
    return blocks * warps / MOST_WARPS


def limit(per_element: dict[str, float], moved: float) -> tuple[str, float, float]:
    """(unit that binds, GB/s, share of the copy) where an element moves ``moved`` bytes."""
    work = {unit: per_element[unit] for unit in ("mufu", "fma", "alu")}
    work["issue"] = sum(per_element[x] for x in ("mufu", "fma", "other", "load", "store"))
    seconds = {"memory": moved / COPY}
    for unit, count in work.items():
        seconds[unit] = count / (SMS * LANES[unit] * CLOCK)
    bound = max(seconds, key=seconds.get)
    share = seconds["memory"] / seconds[bound]
    return bound, share * COPY / 1e9, share
