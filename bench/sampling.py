"""``mixture_sample`` beside what it must beat: the Hugging Face path and two log-sum-exps.

    python -m bench sampling --save
    python -m bench sampling --only top-p --device cuda

Ours is the backend that the op chooses by itself. The Hugging Face path upcasts, mixes, tempers,
filters, takes a softmax, torch.multinomial and two log-softmax gathers; two torch.logsumexp over
the same inputs are what a sampler cannot help doing, and draw nothing. Every figure of one run is
behind its gate, and contenders take turns. Rows: N(0, 16) and a real model's logits, and apart from
them N(0, 1), of which top-p 0.9 keeps 60 % of the vocabulary.

  plain    four vocabularies, three batch sizes, no filter
  top-p    the same with top-p 0.9, on every kind of row
  repeated the first two, in a loop over the same inputs: what a cache holds of them, it gives,
           and threads are awake, as where a model has just written them
  filters  top-k, min-p and all three at one shape
  dtypes   the other dtype at one shape
  memory   what a call takes beyond its inputs, in a fresh process each (CPU)

Tables show each target and whether it is met. The standing run takes about 7 minutes on 2 cores.
Exit status: 0; 1 if ours is wrong; 2 for bad input.
"""

import argparse
import contextlib
import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence

import torch

import nlhf_kernels as nk
from bench import cli, logits, measure, ops, peers, sampling_memory, sampling_tables
from bench.logits import FLAT, PEAKED, REAL, REAL_MODEL, SampleCase
from bench.phases import settle
from bench.problem import Problem
from bench.rows import ROOT
from nlhf_kernels.testing.check import unavailable

MODELS = ("llama2-7b", "llama3-8b", "qwen2.5-1.5b", "gemma2-9b")
# on a GPU the last has the rows that make 16 million logits
BATCHES = {"cpu": (1, 16, 64), "cuda": (1, 64)}
LARGE = {"llama2-7b": 512, "llama3-8b": 128, "qwen2.5-1.5b": 128, "gemma2-9b": 64}
# where one shape is enough
ONE = {"cpu": ("qwen2.5-1.5b", 16), "cuda": ("qwen2.5-1.5b", 128)}
DTYPES = {
    "cpu": (torch.float32, torch.bfloat16),
    "cuda": (torch.bfloat16, torch.float32),
}
# on a GPU all
RIVALS = {"cpu": ("Hugging Face path", "yardstick: two logsumexp (no draw)")}
SECONDS = {"cpu": 0.6, "cuda": 0.2}
QUICK_SECONDS = 0.2
MEMORY = "memory"
REPEATED = "repeated"
NAMES = ("plain", "top-p", REPEATED, "filters", "dtypes", MEMORY)
MEMORY_MODEL, MEMORY_BATCHES, MEMORY_THREADS = "gemma2-9b", (1, 16), 2
TOP_P = "top-p 0.9"


# ---- what is measured


def cases(device: str, quick: bool) -> dict[str, list[SampleCase]]:
    """Part -> cases, those that say most first."""
    dtype, other = DTYPES[device]
    shapes = [(model, B) for model in MODELS for B in _batches(model, device)]
    one = ONE[device]
    reals = [(REAL_MODEL, B) for B in _batches(REAL_MODEL, device)]
    if quick and device == "cpu":
        shapes, reals, one = shapes[:2], reals[1:2], shapes[1]
    elif quick:
        # the machine may be one that reaches no package index
        shapes, reals = [one, (one[0], 1)], []
    return {
        "plain": [logits.case(*shape, dtype) for shape in shapes],
        "top-p": [
            *(logits.case(*shape, dtype, TOP_P) for shape in (*shapes, *reals)),
            *(logits.case(*shape, dtype, TOP_P, REAL) for shape in reals),
            *(logits.case(*shape, dtype, TOP_P, FLAT) for shape in shapes),
        ],
        REPEATED: [
            logits.case(*shape, dtype, filters)
            for filters in ("no filter", TOP_P)
            for shape in shapes
        ]
        + [logits.case(*shape, dtype, TOP_P, REAL) for shape in reals],
        "filters": [
            logits.case(*one, dtype, filters) for filters in ("top-k 50", "min-p 0.05", "all three")
        ],
        "dtypes": [logits.case(*one, other, filters) for filters in ("no filter", TOP_P)],
    }


def _batches(model: str, device: str) -> tuple[int, ...]:
    """A GPU is measured at the batch that fills it, too."""
    filling = (LARGE[model],) if device == "cuda" and model in LARGE else ()
    return tuple(dict.fromkeys((*BATCHES[device], *filling)))


def problem(case: SampleCase, device: str, quick: bool = False) -> Problem:
    automatic = nk.resolve(case.op, device, "", case.features)
    # on a GPU eager is a rival of its own
    chosen = [automatic] if device == "cpu" else list(dict.fromkeys((automatic, "eager")))
    rivals = [x for x in peers.contenders(case, device) if _wanted(x.name, device, quick)]
    found = ops.problem(case, device, chosen, rivals)
    if why := logits.unavailable(case.logits):
        absent = [dataclasses.replace(x, missing=why) for x in found.contenders]
        found = dataclasses.replace(found, contenders=tuple(absent))
    return found


def _wanted(name: str, device: str, quick: bool) -> bool:
    # compiling takes longer than measuring all the others
    return name in RIVALS.get(device, (name,)) and not (quick and "compile" in name)


def filters_of(case: SampleCase) -> str:
    asked = case.options.get("filters", {})
    return next(name for name, x in logits.FILTERS.items() if x == asked)


# ---- rows


def timed(
    problem: Problem, names: dict, device: str, seconds: float, limits: dict
) -> Iterator[dict]:
    """A row for each contender: what the op's own rows say, and ``names`` of its rows."""
    copy = limits["copy"][0]
    verdicts = ops.judge(problem)
    again = names["repeated"]
    for row in ops.measure(problem, verdicts, ("fwd",), device, seconds, limits, again):
        share = None if row["gbps"] is None else float(f"{row['gbps'] / copy:.5g}")
        yield row | {"kind": "sampling", "of_copy": share} | names


def memory_cases(quick: bool) -> list[SampleCase]:
    shapes = [(MEMORY_MODEL, B) for B in MEMORY_BATCHES]
    if quick:
        shapes = [(MODELS[0], MEMORY_BATCHES[-1])]
    kinds = (("no filter", PEAKED), (TOP_P, PEAKED), (TOP_P, FLAT))
    return [logits.case(*shape, torch.float32, *kind) for shape in shapes for kind in kinds]


def memory(case: SampleCase) -> dict:
    """Of one call in a process that has made none before."""
    model, B = case.why.split(", B=")
    backend = nk.resolve(case.op, "cpu", "", case.features)
    spec = {
        "model": model, "B": int(B), "filters": filters_of(case), "logits": case.logits,
        "backend": backend, "threads": MEMORY_THREADS,
    }  # fmt: skip
    row = {
        "kind": "sampling memory", "op": case.op, "shape": case.why,
        "dims": dict(zip("BV", case.shape, strict=True)), "dtype": "float32",
        "filters": spec["filters"], "logits": case.logits, "variant": backend, "peer": False,
        "status": "ok", "note": "", "threads": MEMORY_THREADS,
    }  # fmt: skip
    if why := unavailable(case, backend, "cpu"):
        return row | {"status": "missing", "note": why, "mb": None, "floor_mb": None}
    command = [sys.executable, "-m", sampling_memory.__name__, json.dumps(spec)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        return row | {"status": "wrong", "note": last[:160], "mb": None, "floor_mb": None}
    found = json.loads(done.stdout.splitlines()[-1])
    if found["mb"] is None:
        row |= {"status": "missing", "note": "the platform does not say"}
    return row | found


def measured(arguments: argparse.Namespace) -> Iterator[dict]:
    """Limits first; what matters most comes before what could be cut."""
    device, quick = arguments.device, arguments.quick
    names = arguments.only or NAMES
    with _aside():
        limits = measure.limits(device)
    yield from ops.limit_rows(limits)
    seconds = QUICK_SECONDS if quick else SECONDS[device]
    for name, some in cases(device, quick).items():
        for case in some if name in names else ():
            kinds = {
                "filters": filters_of(case), "logits": case.logits, "repeated": name == REPEATED,
            }  # fmt: skip
            with _aside():
                rows = list(timed(problem(case, device, quick), kinds, device, seconds, limits))
                settle()
            yield from rows
    if MEMORY in names and device == "cpu":
        for case in memory_cases(quick):
            yield memory(case)


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
            time = f"{row['ms'][1]:.4g} ms" if row.get("ms") else row["note"]
            again = ", repeated" if row.get("repeated") else ""
            where = f"{row['shape']}, {row['dtype']}, {row['filters']}, {row['logits']}{again}"
            cli.say(f"{where}: {row['variant']}: {time or 'measured'}")
    if not arguments.json:
        print(sampling_tables.text(out.found))
    return int(any(row.get("status") == "wrong" and not row["peer"] for row in out.found))


def parser() -> cli.Parser:
    p = cli.Parser("sampling", __doc__)
    p.add_argument(
        "--only", type=cli.names_of(NAMES), metavar="NAME[,NAME]", help="these parts alone"
    )
    p.add_argument(
        "--quick",
        action="store_true",
        help="few shapes, little time, nothing compiled",
    )
    return p


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
