"""Is every kernel right on this device? ``check`` over all test cases, a JSON line each.

    python -m bench.gpu_check --device cuda [--op OP] [--small]

The cases are dealt out to processes, since most of the time goes into compiling kernels. A case
that leaves the device unusable is named, and the process starts again behind it.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time

import torch

from bench.rows import stamp
from nlhf_kernels.testing import OPS, Case, check
from nlhf_kernels.testing.check import backends, unavailable

# what a wrong or broken kernel raises; triton's errors derive from Exception alone
ERRORS: tuple[type[BaseException], ...] = (
    ArithmeticError, AssertionError, AttributeError, LookupError, NameError, OSError, RuntimeError,
    TypeError, ValueError,
)  # fmt: skip
NOTE = 300


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser("python -m bench.gpu_check", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--op", choices=OPS, action="append", help="only this op; may be repeated")
    parser.add_argument("--small", action="store_true", help="one case of every kind, for memcheck")
    parser.add_argument("--shard", help="K/N: every N-th case from K on, in this very process")
    parser.add_argument("--start", type=int, default=0, help="leave out what comes before")
    options = parser.parse_args(argv)
    if options.shard is None:
        return _deal_out(argv, options.device)
    first, step = map(int, options.shard.split("/"))
    mine = list(work(options.device, options.op or list(OPS), options.small))[first::step]
    for i, (case, backend) in enumerate(mine[options.start :], options.start):
        print(f"{case} on {backend}", file=sys.stderr, flush=True)
        print(json.dumps(judge(case, backend, options.device)), flush=True)
        if options.device == "cuda" and not _usable():
            start = ["--start", str(i + 1)]
            os.execv(sys.executable, [sys.executable, "-m", "bench.gpu_check", *argv, *start])
    return 0


def work(device: str, ops: list[str], small: bool) -> list[tuple[Case, str]]:
    """Cases and backends; the ops take turns, so that a cut leaves some of each."""
    lists = [_kinds(OPS[op].tests) if small else OPS[op].tests for op in ops]
    longest = max(map(len, lists))
    cases = [x[i] for i in range(longest) for x in lists if i < len(x)]
    compiled = [x for x in backends(device) if x != "eager"]
    return [(case, backend) for backend in compiled for case in cases]


def _kinds(cases: tuple[Case, ...]) -> list[Case]:
    """The first case of every combination of options that leads a kernel another way."""
    branches = {"layout", "packed", "inplace_backward", "rows", "softcap", "ref", "kl", "special"}
    return list({frozenset(c.options.keys() & branches): c for c in reversed(cases)}.values())


def judge(case: Case, backend: str, device: str) -> dict:
    """One row: ok, wrong with its first line, or refused with the reason."""
    start = time.perf_counter()
    status, note = "ok", unavailable(case, backend, device)
    if note:
        status = "refused"
    else:
        try:
            check(case, backend, device=device)
        except _errors() as error:
            note = next(iter(str(error).strip().splitlines()), "no word why")[:NOTE]
            status = "wrong"
            if not isinstance(error, AssertionError):
                note = f"{type(error).__name__}: {note}"
    return {
        **stamp(device),
        "kind": "check",
        "op": case.op,
        "case": case.why,
        "backend": backend,
        "status": status,
        "note": note,
        "seconds": round(time.perf_counter() - start, 3),
    }


def _errors() -> tuple[type[BaseException], ...]:
    if importlib.util.find_spec("triton") is None:
        return ERRORS
    from triton.errors import TritonError

    return (*ERRORS, TritonError)


def _usable() -> bool:
    """Not so after an access out of bounds: every later call then fails too."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def _deal_out(argv: list[str], device: str) -> int:
    count = 1 if device == "cpu" else min(8, max(1, len(os.sched_getaffinity(0)) // 2))
    command = [sys.executable, "-m", "bench.gpu_check", *argv]
    # they write to our standard output, whole lines at a time
    children = [subprocess.Popen([*command, "--shard", f"{k}/{count}"]) for k in range(count)]
    return max(abs(child.wait()) for child in children)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
