"""Times every op at the shapes of real models, beside its peers, its correctness gate first.

    python -m bench --op mixture_sample --shape qwen2.5-1.5b
    python -m bench --op token_logprobs,pairwise_pg_loss --mode bwd --no-peers
    python -m bench --base main --op mixture_sample

Times are medians of samples that take turns, on inputs that no cache holds: five or more, but three
of a call that outlasts its share of the time, and two of one over a second. The limits of the
machine (read, copy, matrix products) are measured in the same run. A contender that fails its gate
gets no number. Exit status: 0; 1 if one of our backends is wrong; 2 for bad input.

Other parts have a --help of their own: python -m bench sampling | losses | step | scaling |
forecast | soak | aot | check | gpu | report
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib
import itertools
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import nlhf_kernels as nk
from bench import cli, compare, heads, layers, measure, ops, peers, profile
from bench.phases import settle
from bench.problem import Contender, Problem
from nlhf_kernels.testing import OPS, Case
from nlhf_kernels.testing.check import backends

PARTS = {
    "sampling": "bench.sampling",
    "losses": "bench.losses",
    "step": "bench.train_step",
    "scaling": "bench.scaling",
    "forecast": "bench.forecast",
    "soak": "bench.soak",
    "aot": "bench.aot",
    "check": "bench.check",
    "gpu": "bench.gpu",
    "report": "bench.report",
}
ALL = (*OPS, layers.OP)
# for a contender and a mode
SECONDS = {"cpu": 0.6, "cuda": 0.2}
QUICK_SECONDS = 0.5


def main(argv: Sequence[str]) -> int:
    if argv and argv[0] in PARTS:
        return importlib.import_module(PARTS[argv[0]]).main(argv[1:])
    try:
        arguments = parser().parse(argv)
        problems = select(arguments)
    except cli.BadInput as error:
        return cli.refuse(error)
    if arguments.base:
        return compare.main(arguments.base, without_base(argv))
    out = cli.Rows(arguments)
    for rows in measured(problems, arguments):
        for row in rows:
            out.add(row)
        if not arguments.json:
            print(ops.table(rows))
    wrong = [row for row in out.found if row.get("status") == "wrong" and not row["peer"]]
    return 1 if wrong else 0


def measured(problems: list[Problem], arguments: argparse.Namespace) -> Iterator[list[dict]]:
    """The limits of the machine, then the rows of each problem."""
    with _aside():
        limits = measure.limits(arguments.device)
    yield ops.limit_rows(limits)
    with _aside():
        # gates are no part of a profile, so they come first there
        early = problems if arguments.profile else []
        judged = {id(problem): ops.judge(problem) for problem in early}
    with profile.session(arguments.profile) if arguments.profile else contextlib.nullcontext():
        for problem in problems:
            with _aside():
                verdicts = judged.get(id(problem)) or ops.judge(problem)
                modes = arguments.mode or problem.modes[-1 if arguments.quick else 0 :]
                seconds = seconds_for(arguments)
                found = ops.measure(problem, verdicts, modes, arguments.device, seconds, limits)
                rows = list(found)
                settle()
            yield rows


def _aside() -> contextlib.AbstractContextManager:
    """Whatever a peer prints: rows and tables alone belong on standard output."""
    return contextlib.redirect_stdout(sys.stderr)


def parser() -> cli.Parser:
    p = cli.Parser("", __doc__)
    p.prog = "python -m bench"
    p.add_argument(
        "--op", type=cli.names_of(ALL), metavar="OP",
        help=f"separated by commas: {', '.join(ALL)} (default: all)",
    )  # fmt: skip
    p.add_argument(
        "--backend", type=cli.names_of(nk.BACKENDS), metavar="BACKEND",
        help="ours to measure (default: all that are meant for the device)",
    )  # fmt: skip
    p.add_argument(
        "--shape", nargs="+", action="extend", metavar="SHAPE",
        help="what names of shapes begin with: qwen2.5-1.5b, or 'qwen2.5-1.5b, B=64'",
    )  # fmt: skip
    p.add_argument(
        "--mode", type=cli.names_of(ops.MODES), metavar="MODE",
        help="fwd, bwd, fwd+bwd (default: all, with --quick the last that an op has)",
    )  # fmt: skip
    p.add_argument(
        "--quick", action="store_true",
        help="the first shape of each op, little time, nothing that has to be compiled",
    )  # fmt: skip
    p.add_argument("--no-peers", action="store_true", help="ours alone")
    p.add_argument("--base", metavar="REF", help="measure a git ref and this tree in turns")
    p.add_argument("--rounds", type=cli.positive, help="of --base: measurements of each side")
    p.add_argument(
        "--profile", type=Path, metavar="DIR",
        help="write a trace of a few calls of each contender there, and print commands for Nsight",
    )  # fmt: skip
    return p


def without_base(argv: Sequence[str]) -> list[str]:
    """The flags for both sides of a comparison."""
    kept = [x for x in argv if not x.startswith("--base=")]
    if "--base" in kept:
        at = kept.index("--base")
        del kept[at : at + 2]
    return kept


def select(arguments: argparse.Namespace) -> list[Problem]:
    """First those that say most about each op: a run that is cut short has them."""
    if arguments.profile and arguments.save:
        raise cli.BadInput("python -m bench: --profile makes times longer: leave out --save")
    if arguments.rounds and not arguments.base:
        raise cli.BadInput("python -m bench: --rounds goes with --base")
    names = arguments.op or ALL
    by_op = [_problems(op, arguments) for op in names]
    known = [shape for problems in by_op for shape, _ in problems]
    for wanted in arguments.shape or ():
        if not any(shape.startswith(wanted) for shape in known):
            models = ", ".join(dict.fromkeys(shape.split(",")[0] for shape in known))
            raise cli.BadInput(f"python -m bench: --shape knows {models}, got {wanted!r}")

    def is_wanted(shape: str) -> bool:
        # the whole name of one is not the beginning of another
        return not arguments.shape or any(
            shape == x if x in known else shape.startswith(x) for x in arguments.shape
        )

    by_op = [[p for shape, p in problems if is_wanted(shape)] for problems in by_op]
    if arguments.quick:
        by_op = [problems[:1] for problems in by_op]
    found = [p for same in itertools.zip_longest(*by_op) for p in same if p is not None]
    found = [make() for make in found]
    known = list(dict.fromkeys(mode for p in found for mode in p.modes))
    if not set(arguments.mode or known) & set(known):
        what = f"{', '.join(names)} has --mode {', '.join(known)} only"
        raise cli.BadInput(f"python -m bench: {what}")
    return found


def _problems(op: str, arguments: argparse.Namespace) -> list[tuple[str, Callable[[], Problem]]]:
    """(shape, how to make it)."""
    device = arguments.device
    chosen = arguments.backend or backends(device)
    others = [x for x in nk.BACKENDS if x not in chosen]

    def wanted(contender: Contender) -> bool:
        if contender.peer:
            return not arguments.no_peers and not (arguments.quick and "compile" in contender.name)
        return not any(re.search(rf"\b{x}\b", contender.name) for x in others)

    def of_case(case: Case) -> Problem:
        rivals = [x for x in peers.contenders(case, device) if wanted(x)]
        return ops.problem(case, device, chosen, rivals)

    def of_problem(problem: Problem) -> Problem:
        return dataclasses.replace(problem, contenders=tuple(filter(wanted, problem.contenders)))

    if op in OPS:
        cases = [heads.quick(x) if arguments.quick else x for x in OPS[op].bench[device]]
        return [(case.why, functools.partial(of_case, case)) for case in cases]
    found = layers.problems(device)
    return [(problem.shape, functools.partial(of_problem, problem)) for problem in found]


def seconds_for(arguments: argparse.Namespace) -> float:
    if arguments.profile:
        # no more calls than it takes: a trace holds every one of them
        return 0.0
    return QUICK_SECONDS if arguments.quick else SECONDS[arguments.device]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
