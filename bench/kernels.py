"""What ``python -m bench aot`` compiles: each Triton kernel in the variants that are launched.

Beside what the compiler needs, a kernel states where its work is and how much: the loops that visit
every element (0: the whole kernel does, straight through), the elements of one thread in one
iteration, and the bytes that an element moves.
"""

from collections.abc import Callable
from dataclasses import dataclass

from bench import yardsticks
from nlhf_kernels.backends.triton import common, mixture_sample, pairwise_pg_loss

WARP = 32
LOGITS = ("logits_ptr", "grad_ptr", "policy_ptr", "ref_ptr")
INTEGERS = ("tokens_ptr", "seed_rows_ptr", "position_rows_ptr", "cu_seqlens_ptr")
FLOATS = ("temperature", "softcap", "coef", "tau", "baseline")
# the values that the launches leave out of the specialisation, or that no hint would fit
PLAIN = ("length", "batch", "tiles", "seed_low", "seed_high", "position", "seed")
COUNTERS = ("winner_ptr", "arrived_ptr")

ROW = {"BLOCK": common.BLOCK}
ROW_OPTIONS = {"num_warps": common.WARPS}
NO_MASK = {"mask_ptr": None}
NO_ENTROPY = {"entropy_ptr": None, "grad_entropy_ptr": None}
NO_ROWS = {"coef_rows_ptr": None, "temperature_rows_ptr": None}
NO_DRAW_ROWS = {**NO_ROWS, "seed_rows_ptr": None, "position_rows_ptr": None}
NO_REF = {"ref_ptr": None}
TILE = common.TILE.value
# of a row of 152 thousand ids
TILES = 256
FLOAT32 = 4


@dataclass(frozen=True)
class Variant:
    constants: dict
    # of the dtype of the row: read and written for one element
    values: int
    # other bytes of an element
    more: float = 0
    loops: int = 0


@dataclass(frozen=True)
class Kernel:
    function: Callable
    options: dict
    # of the widest load that is due
    load_bits: int
    # the most that may be used: triton 3.9 needs two thirds, and its versions differ by a quarter
    registers: int
    # that one program visits in one iteration
    block: int
    variants: dict[str, Variant]
    # of the logits; empty: all, and for all variants but the first the two that matter
    dtypes: tuple[str, ...] = ()
    # of scalars with a fraction
    floats: str = "fp64"

    @property
    def threads(self) -> int:
        return WARP * self.options["num_warps"]

    @property
    def elements(self) -> float:
        """Of one thread, in one iteration."""
        return self.block / self.threads


KERNELS = {
    # one loop reads a row and sums it; an element is a logit
    "row_statistics_kernel": Kernel(
        common.row_statistics_kernel,
        ROW_OPTIONS,
        load_bits=128,
        registers=64,
        block=common.BLOCK,
        variants={
            "plain": Variant({**ROW, **NO_MASK, "SOFTCAP": False}, values=1, loops=1),
            "mask+softcap": Variant({**ROW, "SOFTCAP": True}, values=1, loops=1),
        },
    ),
    # a program is one block: a logit is read, its gradient written
    "row_gradient_kernel": Kernel(
        common.row_gradient_kernel,
        ROW_OPTIONS,
        load_bits=128,
        registers=112,
        block=common.BLOCK,
        variants={
            "entropy": Variant(
                {**ROW, **NO_MASK, "grad_scale_ptr": None, "SOFTCAP": False}, values=2
            ),
            "mask": Variant({**ROW, **NO_ENTROPY, "SOFTCAP": False}, values=2),
            "mask+softcap": Variant({**ROW, **NO_ENTROPY, "SOFTCAP": True}, values=2),
        },
    ),
    # an element is a token: three log-probabilities and a mask are read, the log-ratio and the
    # coefficient written; the sum over a whole sequence is a loop before, whose reads stay cached
    "sequence_coefficient_kernel": Kernel(
        pairwise_pg_loss.sequence_coefficient_kernel,
        ROW_OPTIONS,
        load_bits=0,
        registers=144,
        block=pairwise_pg_loss.STEP,
        variants={
            "padded": Variant(
                {"SUMS": 0, "STEP": pairwise_pg_loss.STEP, "cu_seqlens_ptr": None},
                values=5,
                more=1,
                loops=1,
            ),
            "packed": Variant(
                {"SUMS": 1, "STEP": pairwise_pg_loss.STEP}, values=5, more=1, loops=2
            ),
        },
        # of numbers per token, which are statistics
        dtypes=("float32", "float64"),
    ),
    # a program is GROUP tiles; an element is an id, with the logits of each model
    "mixture_tile_kernel": Kernel(
        mixture_sample.mixture_tile_kernel,
        mixture_sample.TILE_OPTIONS,
        load_bits=128,
        registers=104,
        block=mixture_sample.GROUP * TILE,
        variants={
            "mixture": Variant(
                {"GROUP": mixture_sample.GROUP, **NO_ROWS}, values=2, more=6 * FLOAT32 / TILE
            ),
            "plain": Variant(
                {"GROUP": mixture_sample.GROUP, **NO_ROWS, **NO_REF},
                values=1,
                more=2 * FLOAT32 / TILE,
            ),
        },
    ),
    # a program is a row; an element is an id of the one tile that it reads again, with its part of
    # the statistics of all tiles
    "mixture_draw_kernel": Kernel(
        mixture_sample.mixture_draw_kernel,
        mixture_sample.DRAW_OPTIONS,
        load_bits=64,
        registers=96,
        block=TILE,
        variants={
            "rows": Variant({"TILES": TILES}, values=2, more=6 * FLOAT32 * TILES / TILE),
            "scalars": Variant(
                {"TILES": TILES, **NO_DRAW_ROWS}, values=2, more=6 * FLOAT32 * TILES / TILE
            ),
        },
    ),
    # not ours: what noise for every element costs
    "gumbel_kernel": Kernel(
        yardsticks.gumbel_kernel,
        {"num_warps": yardsticks.WARPS},
        load_bits=128,
        registers=128,
        block=yardsticks.BLOCK,
        variants={"yardstick": Variant({"BLOCK": yardsticks.BLOCK, "BLOCKS": 64}, values=2)},
        dtypes=("float32", "bfloat16"),
        floats="fp32",
    ),
}


def signature(kernel: Kernel, variant: Variant, dtype: str) -> tuple[dict, dict, dict]:
    """(types, constants, hints) of a kernel as its launch would specialise it."""
    function, constants = kernel.function, variant.constants
    statistics = "fp64" if dtype == "fp64" else "fp32"
    types, hints = {}, {}
    for place, name in enumerate(function.arg_names):
        if name in constants:
            types[name] = "constexpr"
            continue
        if name in LOGITS:
            types[name] = f"*{dtype}"
        elif name in INTEGERS:
            types[name] = "*i64"
        elif name in COUNTERS:
            types[name] = "*i32"
        elif name == "mask_ptr":
            types[name] = "*u8"
        elif name.endswith("_ptr"):
            types[name] = f"*{statistics}"
        else:
            types[name] = kernel.floats if name in FLOATS else "i32"
        if name not in FLOATS + PLAIN:
            hints[(place,)] = [["tt.divisibility", 16]]
    places = {(function.arg_names.index(name),): value for name, value in constants.items()}
    return types, places, hints
