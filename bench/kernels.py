"""What ``python -m bench aot`` compiles: each Triton kernel in the variants that are launched.

Beside what the compiler needs, a kernel states where its work is and how much: the loops that visit
every element (0: the whole kernel does, straight through), the elements of one thread in one
iteration, and the bytes that an element moves.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch

from bench import yardsticks
from nlhf_kernels.backends.triton import (
    common,
    ema_update,
    linear_mixture_sample,
    mixture_sample,
    pair_loss,
    pairwise_pg_loss,
    token_rows,
)

WARP = 32
LOGITS = ("logits_ptr", "grad_ptr", "policy_ptr", "ref_ptr")
HEADS = tuple(
    f"{model}_{x}_ptr" for model in ("policy", "ref") for x in ("hidden", "weight", "bias")
)
INTEGERS = (
    "tokens_ptr", "seed_rows_ptr", "position_rows_ptr", "top_k_rows_ptr", "cu_seqlens_ptr",
    "table_ptr", "seed_ptr",
)  # fmt: skip
PAIR_WEIGHTS = tuple(f"weight{j}" for j in range(pair_loss.MOST_ANCHORS))
FLOATS = (
    "temperature", "softcap", "scale", "offset", "rate", "slope", "coef", "baseline", "top_p",
    "min_p", "decay", *PAIR_WEIGHTS,
)  # fmt: skip
# the values that the launches leave out of the specialisation, or that no hint would fit
PLAIN = (
    "length", "batch", "tiles", "spans", "seed_low", "seed_high", "position", "seed", "top_k",
    "first_row", "rows", "pairs",
)  # fmt: skip
COUNTERS = ("winner_ptr", "arrived_ptr", "lanes_ptr", "owners_ptr")

NO_MASK = {"mask_ptr": None}
NO_ENTROPY = {"entropy_ptr": None, "grad_entropy_ptr": None}
NO_ROWS = {"coef_rows_ptr": None, "temperature_rows_ptr": None}
NO_DRAW_ROWS = {**NO_ROWS, "seed_rows_ptr": None, "position_rows_ptr": None}
NO_FILTER_ROWS = {"top_k_rows_ptr": None, "top_p_rows_ptr": None, "min_p_rows_ptr": None}
NO_REF = {"ref_ptr": None}
# without a soft cap, and without a reference
ROW = {"BLOCK": token_rows.BLOCK, "SOFTCAP": False}
ROW_ONE = {**ROW, **NO_REF, "kl_ptr": None, "ref_lse_ptr": None}
READ_ONE = {**ROW_ONE, "ref_logprobs_ptr": None}
WRITE_ONE = {**ROW_ONE, "grad_kl_ptr": None}
TILE = common.TILE.value
# of a row of 152 thousand ids
TILES = 256
SAMPLED = {"TILES": TILES, "ORDINARY": True, **NO_DRAW_ROWS}
FLOAT32 = 4
SPAN = linear_mixture_sample.BLOCK_V


@dataclass(frozen=True)
class Variant:
    constants: dict
    # of the dtype of the row: read and written for one element
    values: float
    # other bytes of an element
    more: float = 0
    loops: int = 0
    # of them, the last ones, that few elements or none pass: not counted
    rare: int = 0
    # where they are not the kernel's
    options: dict | None = None
    block: int | None = None
    dtypes: tuple[str, ...] = ()
    # of arguments that have not the dtype of the row
    types: tuple[tuple[str, str], ...] = ()


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

    def of(self, variant: str) -> "Kernel":
        """The kernel as it is launched for one variant."""
        own = self.variants[variant]
        return dataclasses.replace(
            self,
            options=own.options or self.options,
            block=own.block or self.block,
            dtypes=own.dtypes or self.dtypes,
        )

    @property
    def threads(self) -> int:
        return WARP * self.options["num_warps"]

    @property
    def elements(self) -> float:
        """Of one thread, in one iteration."""
        return self.block / self.threads


NO_NUMBERS = {"decay_ptr": None, "seed_ptr": None}
NO_SPAN_ROWS = {k: None for k in NO_DRAW_ROWS if k != "coef_rows_ptr"}
NO_REF_HEAD = {"ref_hidden_ptr": None, "ref_weight_ptr": None, "ref_bias_ptr": None}
ONE_HEAD = {"ref_weight_ptr": None, "policy_bias_ptr": None, "ref_bias_ptr": None, **NO_DRAW_ROWS}


def _ema_variant(ema: str, param: str, stochastic: bool, **more) -> Variant:
    """Averages and parameters of one dtype each; the two numbers come from the device, or not."""
    codes = {"float16": 0, "bfloat16": 1, "float32": 2, "float64": 3}
    kind = 4 * codes[ema] + codes[param]
    constants = {"PRESENT": 1 << kind, "STOCHASTIC": stochastic, "BLOCK": ema_update.BLOCK}
    return Variant(constants | NO_NUMBERS, dtypes=(ema,), **more)


def _span_variant(rows: int, itemsize: int, without: dict) -> Variant:
    """A block of so many rows; whatever is not left out is given: a soft cap too."""
    constants, options = linear_mixture_sample.span_settings(rows, itemsize)
    heads = 1 if "ref_weight_ptr" in without else 2
    return Variant(
        {**constants, **without, "SOFTCAP": not without},
        values=heads,
        loops=heads,
        options=options,
        block=constants["BLOCK_V"] * constants["BLOCK_D"],
        dtypes=("float32",) if itemsize == 4 else ("bfloat16", "float16"),
    )


KERNELS = {
    # one loop reads a row and sums it; an element is a logit, or one of each model. Beside it: the
    # rest of the row, and its second reading if it outgrows its anchor
    "row_statistics_kernel": Kernel(
        token_rows.row_statistics_kernel,
        token_rows.ROW_OPTIONS,
        load_bits=128,
        registers=96,
        block=token_rows.BLOCK,
        variants={
            "plain": Variant({**READ_ONE, **NO_MASK}, values=1, loops=4, rare=3),
            "mask+softcap": Variant({**READ_ONE, "SOFTCAP": True}, values=1, loops=4, rare=3),
            "kl": Variant(ROW, values=2, loops=5, rare=4),
            "kl+softcap": Variant({**ROW, "SOFTCAP": True}, values=2, loops=5, rare=4),
        },
    ),
    # a program is one block: a logit is read, its gradient written
    "row_gradient_kernel": Kernel(
        token_rows.row_gradient_kernel,
        token_rows.ROW_OPTIONS,
        load_bits=128,
        registers=112,
        block=token_rows.BLOCK,
        variants={
            "entropy": Variant({**WRITE_ONE, **NO_MASK}, values=2),
            "mask": Variant({**WRITE_ONE, **NO_ENTROPY}, values=2),
            "mask+softcap": Variant({**WRITE_ONE, **NO_ENTROPY, "SOFTCAP": True}, values=2),
            "to bfloat16": Variant(
                {**WRITE_ONE, **NO_ENTROPY},
                values=1.5,
                dtypes=("float32",),
                types=(("grad_ptr", "*bf16"),),
            ),
            "kl": Variant({**ROW, **NO_ENTROPY}, values=3),
            "kl+entropy": Variant(ROW, values=3),
            "kl+softcap": Variant({**ROW, **NO_ENTROPY, "SOFTCAP": True}, values=3),
        },
    ),
    # an element is a token: its log-probability, its cost and a mask are read, its coefficient
    # written; the sum over a whole sequence is a loop before, whose reads stay cached
    "sequence_coefficient_kernel": Kernel(
        pairwise_pg_loss.sequence_coefficient_kernel,
        {"num_warps": common.WARPS},
        load_bits=0,
        registers=144,
        block=pairwise_pg_loss.STEP,
        variants={
            "padded": Variant(
                {"SUMS": 0, "STEP": pairwise_pg_loss.STEP, "cu_seqlens_ptr": None},
                values=3,
                more=1,
                loops=1,
            ),
            "packed": Variant(
                {"SUMS": 2, "STEP": pairwise_pg_loss.STEP}, values=3, more=1, loops=2
            ),
            "exact": Variant({"SUMS": 1, "STEP": pairwise_pg_loss.STEP}, values=3, more=1, loops=1),
        },
        # of numbers per token, which are statistics
        dtypes=("float32", "float64"),
    ),
    # a loop reads GROUP tiles and sums them; an element is an id, with the logits of each model.
    # The draw, which the last program of a row adds, is counted with the other kernel
    "mixture_tile_kernel": Kernel(
        mixture_sample.mixture_tile_kernel,
        mixture_sample.TILE_OPTIONS,
        load_bits=128,
        registers=160,
        block=mixture_sample.group(torch.float32) * TILE,
        variants={
            "mixture": Variant(SAMPLED, values=2, more=6 * FLOAT32 / TILE, loops=1),
            # both ways of an unlikely branch are counted
            "rows": Variant(
                {"TILES": TILES, "ORDINARY": False}, values=2, more=6 * FLOAT32 / TILE, loops=1
            ),
            "plain": Variant({**SAMPLED, **NO_REF}, values=1, more=2 * FLOAT32 / TILE, loops=1),
            "undrawn": Variant(
                {**SAMPLED, "arrived_ptr": None}, values=2, more=6 * FLOAT32 / TILE, loops=1
            ),
        },
    ),
    # a program is a row. Its loops: the bound from the tiles, the list, two searches of the list,
    # each with a sum above what it found, and the sums of the tiles. An element is an id of a flat
    # row, of which both models are read twice and one in four is listed, and searched once. Two
    # programs share a multiprocessor; triton 3.6 needs half as many registers again, and one has it
    "mixture_filter_kernel": Kernel(
        mixture_sample.mixture_filter_kernel,
        mixture_sample.FILTER_OPTIONS,
        load_bits=64,
        registers=192,
        block=mixture_sample.group(torch.float32) * TILE,
        variants={
            "rows": Variant({"TILES": TILES, "ORDINARY": False}, values=4, loops=7),
            "scalars": Variant({**SAMPLED, **NO_FILTER_ROWS}, values=4, loops=7),
        },
    ),
    # a loop multiplies BLOCK_D columns of a span's weights with a block of rows; an element is a
    # weight, or with two heads one of each. The epilogue of a span, which is not in a loop, is not
    # counted; hidden states, read again for each span, come from the cache
    "linear_span_kernel": Kernel(
        linear_mixture_sample.linear_span_kernel,
        linear_mixture_sample.span_settings(16, 2)[1],
        load_bits=128,
        registers=208,
        block=0,
        variants={
            "one head": _span_variant(16, 2, ONE_HEAD),
            "64 rows": _span_variant(64, 2, ONE_HEAD),
            "two heads": _span_variant(64, 2, {}),
            "plain": _span_variant(32, 2, NO_REF_HEAD),
            "float32": _span_variant(16, 4, ONE_HEAD),
            "32 rows": _span_variant(32, 4, {}),
        },
    ),
    # a program is a row; an element is a span, with what is kept of it
    "linear_draw_kernel": Kernel(
        linear_mixture_sample.linear_draw_kernel,
        linear_mixture_sample.DRAW_OPTIONS,
        load_bits=32,
        registers=128,
        block=TILES * TILE // SPAN,
        variants={
            "rows": Variant({"TILES": TILES, "BLOCK_V": SPAN, "REFERENCE": True}, values=6),
            "scalars": Variant(
                {"TILES": TILES, "BLOCK_V": SPAN, "REFERENCE": False, **NO_SPAN_ROWS}, values=2
            ),
        },
        dtypes=("float32",),
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
    # one program has all pairs, which are few: their sum needs no second launch
    "pair_kernel": Kernel(
        pair_loss.pair_kernel,
        pair_loss.OPTIONS,
        load_bits=32,
        registers=128,
        block=pair_loss.STEP,
        variants={
            "label": Variant(
                {
                    "ANCHORS": 2,
                    "FORM": pair_loss.LABEL.value,
                    "STEP": pair_loss.STEP,
                    "other_preference_ptr": None,
                },
                values=10,
                loops=1,
            ),
            "logistic": Variant(
                {"ANCHORS": 1, "FORM": pair_loss.LOGISTIC.value, "STEP": pair_loss.STEP},
                values=9,
                loops=1,
            ),
        },
        dtypes=("float32", "float64"),
    ),
    # an element is one of a weight and of its average. Both ways of a branch are counted, that of
    # the last block of a tensor too
    "ema_kernel": Kernel(
        ema_update.ema_kernel,
        ema_update.OPTIONS,
        load_bits=128,
        registers=128,
        block=ema_update.BLOCK,
        variants={
            "float32": _ema_variant("float32", "float32", False, values=3),
            "bfloat16": _ema_variant("bfloat16", "bfloat16", False, values=3),
            "master": _ema_variant("float32", "bfloat16", False, values=2, more=2),
            "stochastic": _ema_variant("bfloat16", "bfloat16", True, values=3),
            "float64": _ema_variant("float64", "float64", False, values=3),
        },
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
        if name in LOGITS + HEADS:
            types[name] = dict(variant.types).get(name, f"*{dtype}")
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
