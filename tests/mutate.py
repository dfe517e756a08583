"""Runs the tests on every mutant of the modules that the training rests on.

    make mutation
    make mutation ARGS="--only tabular/reward --sample 0.2 --seed 1"
    make mutation ARGS="--again survived"

The tests run once on the original, and for each it is noted which lines it runs and how long it
takes. Then a process is forked for each mutant, after the libraries were imported and before
``nlhf`` is, and runs the tests that run the changed line, the fastest first, to the first that
fails. A test has five seconds and ten times what it took at first. What was judged already is read
from the output file and not run again, unless its module has changed.
"""

import argparse
import contextlib
import gc
import hashlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import itertools
import json
import math
import os
import random
import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
# the files that test a module; others reach it only through these
TESTS = {
    "losses": [
        "survivors_losses",
        "losses",
        "policy",
        "packing",
        "importance",
        "estimator",
        "algorithms",
    ],
    "algorithms": ["survivors_algorithms", "algorithms", "importance", "served_training"],
    "rollout": ["survivors_rollout", "rollout", "decoding", "policy", "missing_eos"],
    "tabular/": [
        "survivors_comparison",
        "survivors_tabular",
        "survivors_solvers",
        "tabular",
        "tabular_fixtures",
        "tabular_solvers",
        "solve",
    ],
}
OPTIONS = ["-q", "-x", "-p", "no:cacheprovider"]
MEMORY = 16 * 2**30


class Finder(importlib.abc.MetaPathFinder):
    """Imports one module of the repository from another source."""

    def __init__(self, path: Path, source: str):
        self.path, self.source = path, source
        self.name = ".".join(path.relative_to(ROOT).with_suffix("").parts)

    def find_spec(self, fullname, path=None, target=None):
        if fullname != self.name:
            return None
        loader = importlib.machinery.SourceFileLoader(fullname, str(self.path))
        loader.get_code = lambda name: compile(self.source, str(self.path), "exec")
        return importlib.util.spec_from_file_location(fullname, self.path, loader=loader)


class Tracer:
    """A plugin that notes of each test its seconds and the lines that it runs in some files."""

    def __init__(self, paths: list[Path]):
        self.paths = {str(path): str(path.relative_to(ROOT)) for path in paths}
        self.tests: dict[str, dict] = {}
        self.lines: set[tuple[str, int]] = set()

    def _trace(self, frame, event, arg):
        file = frame.f_code.co_filename
        if file not in self.paths:
            return None
        self.lines.add((self.paths[file], frame.f_lineno))
        return self._trace

    def pytest_runtest_protocol(self, item, nextitem):
        self.lines, self.start = set(), time.monotonic()
        sys.settrace(self._trace)

    def pytest_runtest_logfinish(self, nodeid, location):
        sys.settrace(None)
        lines = {}
        for file, line in sorted(self.lines):
            lines.setdefault(file, []).append(line)
        self.tests[nodeid] = {"seconds": time.monotonic() - self.start, "lines": lines}


class Chooser:
    """A plugin that runs some tests, and those that the original has not, the fastest first."""

    def __init__(self, chosen: set[str], known: dict[str, float], say: Callable[[str], None]):
        self.chosen, self.known, self.say = chosen, known, say

    def pytest_collection_modifyitems(self, items):
        ours = [x for x in items if x.nodeid in self.chosen or x.nodeid not in self.known]
        items[:] = sorted(ours, key=lambda x: self.known.get(x.nodeid, 0.0))

    def pytest_runtest_protocol(self, item, nextitem):
        self.say(item.nodeid)
        seconds = 5 + 10 * self.known.get(item.nodeid, 1.0)
        # of the processor, so that others on the machine make no verdict
        signal.setitimer(signal.ITIMER_PROF, seconds)
        signal.setitimer(signal.ITIMER_REAL, 20 * seconds)


def forked(work: Callable[[Callable[[str], None]], int], wait: bool = True):
    """The process that does it and ends with its status, and the pipe with what it says."""
    reading, writing = os.pipe()
    process = os.fork()
    if process:
        os.close(writing)
        return process, reading
    os.setsid()
    os.close(reading)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    status = 3
    try:
        status = work(lambda text: os.write(writing, text.encode() + b"\n") and None)
    finally:
        os._exit(status)


def said(reading: int) -> list[str]:
    with os.fdopen(reading, encoding="utf-8") as pipe:
        return pipe.read().splitlines()


def trace(file: str, paths: list[Path]) -> dict:
    """The tests of a file on the original: seconds and lines of each, and what they import."""

    def work(say) -> int:
        import pytest

        tracer = Tracer(paths)
        status = pytest.main([*OPTIONS, file], plugins=[tracer])
        say(json.dumps({"tests": tracer.tests, "modules": sorted(sys.modules)}))
        return int(status)

    process, reading = forked(work)
    lines = said(reading)
    if os.waitpid(process, 0)[1]:
        raise SystemExit(f"mutate: {file} fails without any change")
    return json.loads(lines[-1])


def preload(modules: list[str]) -> None:
    """Imports what the tests import, but for what is mutated and what imports that."""
    for name in modules:
        if name.partition(".")[0] not in ("nlhf", "tests", "conftest", "__main__", "bench"):
            # a part that another has put there cannot be imported by its name
            with contextlib.suppress(ImportError, AttributeError, ValueError, RuntimeError):
                importlib.import_module(name)
    # a collection in a child would touch, and so copy, all that it shares with its parent
    gc.freeze()


def fastest(tests: set[str], known: dict[str, float], seconds: float) -> set[str]:
    """Those that together take no longer."""
    ordered = sorted(tests, key=known.__getitem__)
    ends = itertools.accumulate(known[name] for name in ordered)
    return {name for name, end in zip(ordered, ends, strict=True) if end <= seconds}


def judge(path: Path, source: str, chosen: set[str], known: dict[str, float]):
    """Starts the chosen tests on a mutant."""

    def work(say) -> int:
        import pytest

        if not chosen:
            return 0
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        sys.meta_path.insert(0, Finder(path, source))
        run = sorted({name.partition("::")[0] for name in chosen})
        return int(pytest.main([*OPTIONS, *run], plugins=[Chooser(chosen, known, say)]))

    return forked(work)


def verdict(status: int) -> str:
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGALRM, signal.SIGPROF):
        return "timed out"
    # all passed, or none was left to run
    return "survived" if os.waitstatus_to_exitcode(status) in (0, 5) else "killed"


def sources(module: str) -> list[Path]:
    """Those of a key of ``TESTS``."""
    there = (ROOT / "nlhf").glob(f"{module}*.py")
    return [path for path in sorted(there) if path.stem != "__init__"]


def traced(module: str, folder: Path, anew: bool) -> tuple[dict[str, dict], set[str]]:
    """The tests of a module and what they import, read from the folder if they are there."""
    tests, modules = {}, set()
    for name in TESTS[module]:
        kept = folder / f"{name}.json"
        if anew or not kept.exists():
            everything = [path for module in TESTS for path in sources(module)]
            found = trace(f"tests/test_{name}.py", everything)
            kept.write_text(json.dumps(found), encoding="utf-8")
        found = json.loads(kept.read_text(encoding="utf-8"))
        tests |= found["tests"]
        modules |= set(found["modules"])
    return tests, modules


class Job(NamedTuple):
    """The tests of a mutant, or of the original, and how long each took."""

    path: Path
    key: str
    mutant: Any
    chosen: set[str]
    known: dict[str, float]


def every_mutant(arguments) -> dict[str, dict[Path, dict[str, Any]]]:
    """By module, file and key: those of the sample."""
    from tests.mutants import mutants

    found = {}
    for module, path in [(key, path) for key in TESTS for path in sources(key)]:
        name = str(path.relative_to(ROOT))
        if arguments.only and not any(part in name for part in arguments.only):
            continue
        keyed = {}
        for mutant in mutants(path.read_text(encoding="utf-8")):
            key = hashlib.sha256(f"{name}\n{mutant.source}".encode()).hexdigest()[:16]
            # a larger sample has the smaller one in it
            if random.Random(f"{arguments.seed} {key}").random() < arguments.sample:
                keyed[key] = mutant
        found.setdefault(module, {})[path] = keyed
    return found


def jobs(arguments, plan: dict, done: dict[str, dict]) -> Iterator[Job]:
    """What is not judged yet, each file's original first."""
    for module, files in plan.items():
        tests, modules = traced(module, arguments.out.parent, arguments.trace)
        known = {name: test["seconds"] for name, test in tests.items()}
        preload(modules)
        for path, keyed in files.items():
            name = str(path.relative_to(ROOT))
            ran = {test: set(found["lines"].get(name, [])) for test, found in tests.items()}
            users = {test.partition("::")[0] for test, lines in ran.items() if lines}
            every = {test for test in tests if test.partition("::")[0] in users}
            skipped = {None, *arguments.again}
            left = {k: m for k, m in keyed.items() if done.get(k, {}).get("verdict") in skipped}
            for key, mutant in ({"": None} | left if left else {}).items():
                lines = mutant.lines if mutant and mutant.lines else ()
                # no test runs what is run by the import itself, as a decorator is
                chosen = {t for t, own in ran.items() if not own.isdisjoint(lines)} or every
                yield Job(path, key, mutant, fastest(chosen, known, arguments.seconds), known)


def judged(out: Path) -> dict[str, dict]:
    """The last row of each mutant."""
    rows = out.read_text(encoding="utf-8").splitlines() if out.exists() else []
    return {row["key"]: row for row in map(json.loads, rows)}


def table(plan: dict, done: dict[str, dict]) -> Iterator[str]:
    """How many mutants there are and what became of them, by file."""
    verdicts = ("killed", "timed out", "survived")
    yield f"| module | mutants | judged | {' | '.join(verdicts)} |"
    yield "|---" * 6 + "|"
    for path, keyed in ((p, keyed) for files in plan.values() for p, keyed in files.items()):
        counts = Counter(done[key]["verdict"] for key in keyed if key in done)
        cells = [path.relative_to(ROOT), len(keyed), counts.total(), *(counts[v] for v in verdicts)]
        yield f"| {' | '.join(map(str, cells))} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", help="modules whose path has one of these in it")
    parser.add_argument("--sample", type=float, default=1.0, help="share of the mutants")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--seconds", type=float, default=math.inf, help="of tests for a mutant")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--again", nargs="*", default=[], help="verdicts not to skip")
    parser.add_argument("--trace", action="store_true", help="note anew which lines a test runs")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "mutation" / "mutants.jsonl")
    arguments = parser.parse_args()
    os.chdir(ROOT)
    out = arguments.out
    out.parent.mkdir(parents=True, exist_ok=True)
    plan, running = every_mutant(arguments), {}

    def collect() -> None:
        process, status = os.wait()
        job, reading, start = running.pop(process)
        name, last = str(job.path.relative_to(ROOT)), (said(reading) or [""])[-1]
        if job.mutant is None:
            if verdict(status) != "survived":
                raise SystemExit(f"mutate: {last} fails on {name} without any change")
            return
        row = {"key": job.key, "module": name, "verdict": verdict(status), "test": last}
        row["seconds"] = round(time.monotonic() - start, 2)
        line, _, before, after, _ = job.mutant
        row |= {"line": line, "before": before, "after": after}
        with open(out, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if row["verdict"] == "survived":
            sys.stdout.write(f"{name}:{line}: {before} => {after}\n")

    for job in jobs(arguments, plan, judged(out)):
        while len(running) >= arguments.jobs:
            collect()
        source = job.mutant.source if job.mutant else job.path.read_text(encoding="utf-8")
        process, reading = judge(job.path, source, job.chosen, job.known)
        running[process] = (job, reading, time.monotonic())
    while running:
        collect()
    sys.stdout.write("\n".join(table(plan, judged(out))) + "\n")
    return 0


if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ.pop("NLHF_BACKEND", None)
    # plugins want to be imported by pytest, and are before it
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    sys.exit(main())
