"""The losses beside what they must beat: time, memory, and shares of the machine's limits.

    python -m bench losses --save
    python -m bench losses --only linear,memory --device cuda

Ours is the backend that an op chooses by itself, and every figure is of forward and backward, of
one run, behind its gate; contenders take turns.

  logits   token_logprobs and pairwise_pg_loss over logits of two vocabularies: in place, into a
           fresh buffer, eager, torch.compile and the peers
  linear   the loss from hidden states and a head that is trained, beside the same over logits
  kl       exact KL divergences: token_kl, and pairwise_pg_loss with kl="exact"
  step     the quickstart's own shape, where the head is frozen: from hidden states to a loss and
           back, over logits or in chunks
  ema      the average of 135 million weights
  memory   what a loss from hidden states takes beyond its inputs, in a fresh process each

Tables show each target and whether it is met. The standing run takes about 6 minutes on 2 cores,
and 13 GB for what eager needs; with less memory that is measured with fewer tokens. Exit status: 0;
1 if ours is wrong; 2 for bad input.
"""

import argparse
import contextlib
import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

import nlhf_kernels as nk
from bench import cli, ema, gates, heads, losses_memory, losses_tables, measure, ops, peers
from bench.phases import settle
from bench.problem import Contender, Problem
from bench.setting import MODELS
from nlhf import config
from nlhf_kernels.testing.case import BF16, F32, VOCABULARY, Case
from nlhf_kernels.testing.cases import OPS

NAMES = ("logits", "linear", "kl", "step", "ema", "memory")
BOTH = ("smollm2-135m", "qwen2.5-1.5b")
LARGEST = "qwen2.5-1.5b"
UNMASKED = {"masked": "none"}
EXACT = {**UNMASKED, "kl": "exact", "ref": "logits"}
# sequences and tokens
ROWS = {"cpu": (4, 24), "cuda": (16, 512)}
DTYPES = {"cpu": (F32, BF16), "cuda": (BF16,)}
LINEAR = {
    "cpu": ("linear_pairwise_pg_loss",),
    "cuda": ("linear_pairwise_pg_loss", "linear_token_logprobs", "linear_token_kl"),
}
# of a contender
SECONDS = {"cpu": 0.6, "cuda": 0.2}
QUICK_SECONDS = 0.2
MODE = "fwd+bwd"
QUICKSTART = "smollm2-135m"


# ---- what is measured


def cases(device: str, quick: bool) -> dict[str, list[Case]]:
    """Those that say most first."""
    over_logits = [
        case(op, model, device, dtype, options)
        for dtype in DTYPES[device]
        for model in BOTH
        for op, options in (("pairwise_pg_loss", UNMASKED), ("token_logprobs", {}))
    ]
    kls = [
        case("token_kl", LARGEST, device, DTYPES[device][0], {}),
        case("pairwise_pg_loss", LARGEST, device, DTYPES[device][0], EXACT, "exact KL, "),
    ]
    linear = [x for op in LINEAR[device] for x in OPS[op].bench[device]]
    if device == "cpu":
        linear = linear[:1]
    if quick and device == "cpu":
        return {"logits": over_logits[:2], "linear": [heads.quick(linear[0])], "kl": kls[:1]}
    if quick:
        # fewer tokens would say nothing of a GPU
        linear, kls = linear[:1], kls[:1]
    return {"logits": over_logits, "linear": linear, "kl": kls}


def case(
    op: str, model: str, device: str, dtype: torch.dtype, options: dict, what: str = ""
) -> Case:
    B, T = ROWS[device]
    why = f"{what}{model}, {B * T:,} rows"
    return Case(op, why, (B, T, VOCABULARY[model]), dtype, options)


def problem(case: Case, device: str, quick: bool = False) -> Problem:
    chosen = dict.fromkeys((nk.resolve(case.op, device), "eager"))
    rivals = [
        # compiling takes longer than measuring all the others
        x for x in peers.contenders(case, device)
        if not (quick and "compile" in x.name) and not x.name.startswith("matmul + eager")
    ]  # fmt: skip
    found = ops.problem(case, device, list(chosen), rivals)
    # what eager's copy back takes is of no interest
    some = tuple(x for x in found.contenders if x.name != "eager, in place")
    return dataclasses.replace(found, contenders=some)


def step(device: str, quick: bool = False) -> Problem:
    """The quickstart's batch behind its model: its adapter trains no head."""
    settings = config.load("quickstart")
    B, T = settings.micro_batch_size or settings.batch_size, settings.max_new_tokens
    model = MODELS[QUICKSTART]
    B = B // 8 if quick else B
    shape = (B, T, model["hidden_size"], model["vocab_size"])
    options = {**UNMASKED, "tau": settings.tau, "temperature": settings.temperature}
    dtype = getattr(torch, settings.dtype)
    case = Case("linear_pairwise_pg_loss", f"quickstart, {B} x {T}", shape, dtype, options)
    own = nk.resolve(case.op, device)

    def contender(path: str, backend: str) -> Contender:
        solve = functools.partial(PATHS[path], backend)
        gate = functools.partial(gates.gradients, solve, case, device)
        return Contender(f"{path}, {backend}", False, solve, gate)

    found = [contender(path, x) for path in PATHS for x in dict.fromkeys((own, "eager"))]
    return dataclasses.replace(
        ops.problem(case, device, [], found),
        # with weights that nobody trains there is one product less
        leaves=(0,),
        traffic=functools.partial(_frozen_traffic, ops.problem(case, device, [], []).traffic),
    )


def _over_logits(backend: str, args: tuple, kwargs: dict) -> Tensor:
    """As ``nlhf.losses`` has it."""
    hidden, weight, *rest = args
    logits = torch.nn.functional.linear(hidden, weight)
    return nk.pairwise_pg_loss(logits, *rest, **kwargs, inplace_backward=True, backend=backend).loss


def _in_chunks(backend: str, args: tuple, kwargs: dict) -> Tensor:
    return nk.linear_pairwise_pg_loss(*args, **kwargs, backend=backend).loss


PATHS: dict[str, Callable] = {"logits": _over_logits, "chunks": _in_chunks}


def _frozen_traffic(trained: Callable, mode: str) -> tuple[int, int, str]:
    moved, flops, limit = trained(mode)
    return moved, flops * 2 // 3, limit


# ---- rows


def timed(name: str, problem: Problem, device: str, seconds: float, limits: dict) -> Iterator[dict]:
    """A row for each contender."""
    verdicts = ops.judge(problem)
    modes = (MODE,) if MODE in problem.modes else problem.modes
    for row in ops.measure(problem, verdicts, modes, device, seconds, limits):
        yield row | {"kind": "losses", "table": name}


def problems(device: str, quick: bool) -> Iterator[tuple[str, Callable[[], Problem]]]:
    """(table, how to make it), those that say most first."""
    found = cases(device, quick)
    for name in NAMES:
        for x in found.get(name, ()):
            yield name, functools.partial(problem, x, device, quick)
        if name == "step":
            yield name, functools.partial(step, device, quick)
        if name == "ema":
            yield name, functools.partial(ema.problem, device, quick)


def measured(arguments: argparse.Namespace) -> Iterator[dict]:
    device, quick = arguments.device, arguments.quick
    names = arguments.only or NAMES
    with _aside():
        limits = measure.limits(device)
    yield from ops.limit_rows(limits)
    seconds = QUICK_SECONDS if quick else SECONDS[device]
    for name, make in problems(device, quick):
        if name in names:
            with _aside():
                rows = list(timed(name, make(), device, seconds, limits))
                settle()
            yield from rows
    if "memory" in names:
        yield from losses_memory.rows(device, quick)


def _aside() -> contextlib.AbstractContextManager:
    """Whatever a peer prints: rows and tables alone belong on standard output."""
    return contextlib.redirect_stdout(sys.stderr)


def main(argv: Sequence[str]) -> int:
    try:
        arguments = parser().parse(argv)
    except cli.BadInput as error:
        return cli.refuse(error)
    out = cli.Rows(arguments)
    for row in measured(arguments):
        out.add(row)
        if row["kind"] != "limit":
            figure = f"{row['ms'][1]:.4g} ms" if row.get("ms") else row["note"]
            figure = f"{row['mb']:.4g} MB" if row.get("mb") is not None else figure
            where = f"{row['op']}, {row['shape']}, {row['dtype']}"
            cli.say(f"{where}: {row['variant']}: {figure}")
    if not arguments.json:
        print(losses_tables.text(out.found))
    return int(any(row.get("status") == "wrong" and not row["peer"] for row in out.found))


def parser() -> cli.Parser:
    p = cli.Parser("losses", __doc__)
    p.add_argument(
        "--only", type=cli.names_of(NAMES), metavar="NAME[,NAME]", help="these parts alone"
    )
    p.add_argument("--quick", action="store_true", help="few shapes, little time, nothing compiled")
    return p


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
