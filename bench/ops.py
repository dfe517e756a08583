"""Problems of our ops with their contenders, and the rows that measuring them gives."""

import dataclasses
import functools
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

import nlhf_kernels as nk
from bench import cli, gates, profile
from bench.measure import Rotation, Timing, Variant, first_line, interleave
from bench.problem import Contender, Problem
from bench.text import number, percent
from nlhf_kernels.testing import Case, traffic
from nlhf_kernels.testing.cases import HEADS, SAMPLERS
from nlhf_kernels.testing.check import check_by, unavailable
from nlhf_kernels.testing.compare import Answers

MODES = ("fwd", "bwd", "fwd+bwd")
DIMS = {"mixture_sample": "BV", "linear_mixture_sample": "BDV", **dict.fromkeys(HEADS, "BTDV")}
# how a contender may fail; anything else is a fault of the bench
FAILURES = (RuntimeError, ValueError, TypeError, ImportError, OSError, AttributeError, KeyError)
# a CUDA graph of more calls would take long to record
MOST_IN_GRAPH = 512


# ---- problems


def problem(case: Case, device: str, chosen: Sequence[str], rivals: Sequence[Contender]) -> Problem:
    """A case for our backends ``chosen``, and for ``rivals``."""
    sampler, head = case.op in SAMPLERS, case.op in HEADS
    ways = (False,) if sampler or head else (False, True)
    # a backend in place is judged by the same log-probabilities of its own as just before
    own = [_own(case, backend, device, inplace) for backend in chosen for inplace in ways]
    return Problem(
        op=case.op,
        shape=case.why,
        dims=dict(zip(DIMS.get(case.op, "BTV"), case.shape, strict=True)),
        dtype=str(case.dtype).removeprefix("torch."),
        modes=MODES[:1] if sampler else MODES,
        inputs=functools.partial(case.inputs, 0, device, device),
        leaves=() if sampler else (0, 1) if head else (0,),
        contenders=(*own, *rivals),
        traffic=functools.partial(_traffic, case),
    )


def _traffic(case: Case, mode: str) -> tuple[int, int, str]:
    passes = {"fwd": (False,), "bwd": (True,), "fwd+bwd": (False, True)}[mode]
    moved, flops = map(sum, zip(*(traffic(case, backward) for backward in passes), strict=True))
    if case.op in HEADS:
        return moved, flops, f"gemm {str(case.dtype).removeprefix('torch.')}"
    return moved, flops, "read" if mode == "fwd" else "copy"


def _own(case: Case, backend: str, device: str, inplace: bool = False) -> Contender:
    settings = {"backend": backend} | ({"inplace_backward": True} if inplace else {})
    sampler = case.op == "mixture_sample"
    exact = case.options.get("kl") == "exact"
    # sums over hundreds of tokens, or of factors rounded to 16 bits, are right as a whole and not
    # number by number: eager's in float32 are no nearer
    summed = case.op in HEADS

    def solve(args: tuple, kwargs: dict) -> tuple:
        # looked up at each call: a profile replaces the public functions
        return getattr(nk, case.op)(*args, **kwargs, **settings)

    def first(args: tuple, kwargs: dict) -> Tensor:
        return gates.differentiated(case.op, solve(args, kwargs))

    def gate() -> None:
        # sums over a large vocabulary in float32, as torch makes them, miss what a kernel must
        # reach: the losses of eager are held to what peers are held to
        if backend == "eager" and case.op == "token_logprobs":
            gates.logprobs(solve, case, device)
        elif backend == "eager" and case.op == "pairwise_pg_loss" and not exact:
            gates.pg_loss(first, case, device)
        elif case.op not in SAMPLERS and (backend == "eager" or summed):
            gates.gradients(first, case, device)
        else:
            known = gates.of_case(case, device)
            if sampler and "filters" in case.options:
                # what is right may depend on who is judged
                known = Answers(known.inputs())
                known.once("draw", functools.partial(gates.contract, solve))
            check_by(known, case.op, backend, by_own_logprobs=True, inplace=inplace)

    return Contender(
        name=f"{backend}, in place" if inplace else backend,
        peer=False,
        run=solve if case.op in SAMPLERS else first,
        gate=gate,
        missing=unavailable(case, backend, device),
        inplace=inplace,
    )


# ---- gates


def judge(problem: Problem) -> dict[str, tuple[str, str]]:
    """name -> (status, why it is not "ok") of each contender."""
    try:
        return {
            c.name: ("missing", c.missing) if c.missing else _tried(c, c.gate)
            for c in problem.contenders
        }
    finally:
        gates.forget()


def _tried(contender: Contender, action: Callable[[], object]) -> tuple[str, str]:
    try:
        with warnings.catch_warnings():
            # what it says of itself, and of the memory that the gate fills with NaN
            warnings.simplefilter("ignore")
            action()
    except AssertionError as error:
        return "wrong", first_line(error)
    except _failures() as error:
        # of ours it is a fault; a peer may have less memory, or other versions, than it needs
        return "missing" if contender.peer else "wrong", f"fails: {first_line(error)}"
    return "ok", ""


def _failures() -> tuple[type[BaseException], ...]:
    # what a kernel that does not compile raises; only who has imported triton can meet it
    triton = sys.modules.get("triton.errors")
    return (*FAILURES, triton.TritonError) if triton else FAILURES


# ---- measuring


def measure(
    problem: Problem,
    verdicts: dict[str, tuple[str, str]],
    modes: Sequence[str],
    device: str,
    seconds: float,
    limits: dict[str, tuple[float, str]],
    repeated: bool = False,
) -> Iterator[dict]:
    """A row for each mode and contender, in the order of the problem.

    Inputs are so many copies that no cache holds them. ``repeated``: they are the same for every
    call of a sample, as in a loop around the call.
    """
    # nobody needs inputs that cannot be had
    able = any(status == "ok" for status, _ in verdicts.values())
    rotation = Rotation(problem.inputs(), device, alone=repeated) if able else None
    for mode in (x for x in modes if x in problem.modes):
        # what our own write in the backward changes nothing in the forward
        field = [c for c in problem.contenders if mode != "fwd" or c.peer or not c.inplace]
        variants, found = {}, {}
        for contender in field:
            found[contender.name] = verdicts[contender.name]
            if found[contender.name][0] == "ok":
                variant = _variant(problem, contender, mode, rotation, device)
                variant = dataclasses.replace(variant, repeated=repeated)
                # a gate at one mode says nothing of the memory that another takes
                found[contender.name] = _tried(contender, lambda v=variant: v.call(v.prepare()))
                variants[contender.name] = variant
        running = {name: v for name, v in variants.items() if found[name][0] == "ok"}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            timings = interleave(running, device, seconds, warm=True)
        for contender in field:
            row = _row(problem, contender, mode, *found[contender.name])
            row["cached"] = able and rotation.cached
            if contender.name in timings:
                row |= _figures(timings[contender.name], *problem.traffic(mode), limits)
            yield row


def _variant(
    problem: Problem, contender: Contender, mode: str, rotation: Rotation, device: str
) -> Variant:
    overwritten = problem.leaves if contender.inplace else ()
    name = f"{problem.op}[{contender.name}]"

    def fresh() -> tuple[tuple, dict]:
        args, kwargs = rotation.next(overwritten)
        leaves = [
            x.detach().requires_grad_() if place in problem.leaves else x
            for place, x in enumerate(args)
        ]
        return tuple(leaves), kwargs

    def forward(item: tuple) -> Tensor | tuple:
        with profile.range(name):
            return contender.run(*item)

    def run_forward() -> tuple:
        item = fresh()
        output = contender.run(*item)
        return output, item, problem.grad_outputs(output)

    def backward(item: tuple) -> tuple[Tensor, ...]:
        output, (args, _), grads = item
        with profile.range(f"{name} backward"):
            return torch.autograd.grad(output, [args[i] for i in problem.leaves], grads)

    def both(item: tuple) -> tuple[Tensor, ...]:
        output = forward(item)
        return backward((output, item, problem.grad_outputs(output)))

    # what is laid out for a call, by its forward or from the copy, is still in the cache
    cold = mode == "bwd" or contender.inplace
    at_once = len(rotation) if contender.inplace else Variant.at_once
    if mode == "bwd":
        # each of them holds what its forward saved
        return Variant(backward, run_forward, cold, min(at_once, 32))
    can_capture = mode == "fwd" and device == "cuda" and not contender.inplace
    graph = min(len(rotation), MOST_IN_GRAPH) if can_capture else 0
    return Variant(forward if mode == "fwd" else both, fresh, cold, at_once, graph)


# ---- rows


def _row(problem: Problem, contender: Contender, mode: str, status: str, note: str) -> dict:
    moved = problem.traffic(mode)
    return {
        "kind": "op",
        "op": problem.op,
        "shape": problem.shape,
        "dims": problem.dims,
        "dtype": problem.dtype,
        "mode": mode,
        "variant": contender.name,
        "peer": contender.peer,
        "status": status,
        "note": note,
        "ms": None,
        "calls": 0,
        "gbps": None,
        "tflops": None,
        "limit": moved[2],
        "share": None,
        "cpu_us": None,
        "peak_mb": None,
    }


def _figures(timing: Timing, moved: int, flops: int, limit: str, limits: dict) -> dict:
    seconds = timing.ms[1] / 1e3
    value, unit = limits[limit]
    least = moved / (value * 1e9) if unit == "GB/s" else flops / (value * 1e12)
    figures = {
        "ms": [_short(x) for x in timing.ms],
        "calls": timing.calls,
        "gbps": _short(moved / seconds / 1e9),
        "tflops": _short(flops / seconds / 1e12),
        "share": _short(least / seconds),
        "cpu_us": _short(timing.cpu_us),
        "peak_mb": None if timing.peak_mb is None else _short(timing.peak_mb),
        "note": timing.note,
    }
    if timing.graph_ms is not None:
        figures["graph_ms"] = [_short(x) for x in timing.graph_ms]
    return figures


def _short(x: float) -> float:
    return float(f"{x:.5g}")


def limit_rows(limits: dict[str, tuple[float, str]]) -> list[dict]:
    return [
        {"kind": "limit", "name": name, "value": _short(value), "unit": unit}
        for name, (value, unit) in limits.items()
    ]


# ---- the table


def table(rows: list[dict]) -> str:
    """Of one problem: its modes one below the other, then who is missing or wrong, and why."""
    first = rows[0]
    if first["kind"] == "limit":
        known = ", ".join(f"{row['name']} {number(row['value'])} {row['unit']}" for row in rows)
        return f"limits: {known}"
    dims = ", ".join(f"{name} {size:,}" for name, size in first["dims"].items())
    lines = [f"\n{first['op']}: {first['shape']} ({dims}), {first['dtype']}"]
    if first["cached"]:
        lines.append("all inputs together fit into the cache: times are too good")
    for mode in dict.fromkeys(row["mode"] for row in rows):
        timed = [row for row in rows if row["mode"] == mode and row["ms"]]
        eager = next((row["ms"][1] for row in timed if row["variant"] == "eager"), None)
        limit = f"% of {timed[0]['limit']}" if timed else "%"
        header = [mode, "ms median (min-max)", "GB/s", limit, "x eager", "CPU us", "MB"]
        graphs = any("graph_ms" in row for row in timed)
        body = [_cells(row, eager, graphs) for row in timed]
        lines.append(cli.table(header + ["graph ms"] * graphs, body))
    # one line for all modes
    whys = dict.fromkeys(
        f"{row['status'] if not row['ms'] else 'note'}: {row['variant']}: {row['note']}"
        for row in rows
        if row["note"]
    )
    return "\n".join([*lines, *whys])


def _cells(row: dict, eager: float | None, graphs: bool) -> list[str]:
    least, median, most = row["ms"]
    cells = [
        row["variant"],
        f"{number(median)} ({number(least)}-{number(most)})",
        number(row["gbps"]),
        percent(row["share"]).removesuffix(" %"),
        "-" if eager is None else number(eager / median),
        number(row["cpu_us"]),
        number(row["peak_mb"]),
    ]
    return cells + [number(row["graph_ms"][1]) if "graph_ms" in row else "-"] * graphs
