"""``--base REF``: the same bench on another git ref and on this tree, in turns.

The ref is checked out into a throw-away worktree and built there. This tree's ``bench`` and
``nlhf_kernels/testing`` are laid over it, so that both sides run the same cases. Children take
turns, base, new, base, new: what drifts on the machine then falls on both.
"""

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from bench import cli
from bench.rows import ROOT

OVERLAY = ("bench", "nlhf_kernels/testing")
BUILD = ["setup.py", "-q", "build_ext", "--inplace"]
# what makes two rows measurements of the same thing
KEY = ("op", "shape", "dtype", "mode", "variant")
WHERE = "import bench, nlhf_kernels; print(bench.__file__, nlhf_kernels.__file__, sep='\\n')"


def main(ref: str, argv: list[str]) -> int:
    """Compare this tree with ``ref``; ``argv`` are the flags of ``python -m bench``."""
    try:
        options, flags = _options(argv)
        with worktree(ref) as base:
            rows = measure({"base": base, "new": ROOT}, flags, options.rounds)
    except cli.BadInput as error:
        cli.say(f"python -m bench --base {ref}: {error}")
        return 2
    except KeyboardInterrupt:
        cli.say("interrupted; the worktree is removed")
        return 130
    lines = map(json.dumps, rows) if options.json else table(rows, ref)
    print(*lines, sep="\n")
    return 0


def _options(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Ours, and what goes to the children as it is."""
    parser = cli.Parser("--base REF", __doc__)
    parser.add_argument("--base", help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=cli.positive, default=2, help="measurements of each side")
    options, flags = parser.parse_known_args(argv)
    if options.rounds < 2:
        raise cli.BadInput("--rounds must be at least 2: their spread tells a change from noise")
    if options.save:
        raise cli.BadInput("--save and --base exclude each other: a comparison is no result")
    return options, [*flags, "--device", options.device]


@contextlib.contextmanager
def worktree(ref: str) -> Iterator[Path]:
    """``ref`` checked out, overlaid and built somewhere else; gone afterwards, whatever happens."""
    commit = _git("rev-parse", "--verify", "--quiet", f"{ref}^{{commit}}", why=f"no commit {ref!r}")
    try:
        with tempfile.TemporaryDirectory(prefix="nlhf-base-") as folder:
            # the real path, as imports will name it
            tree = Path(folder).resolve() / "base"
            _git("worktree", "add", "--detach", str(tree), commit, why="git worktree add failed")
            for name in OVERLAY:
                shutil.rmtree(tree / name, ignore_errors=True)
                shutil.copytree(ROOT / name, tree / name, ignore=_not_code)
            yield tree
    finally:
        # the folder is gone by now, and git forgets worktrees without one
        _git("worktree", "prune", why="git worktree prune failed")


def measure(trees: dict[str, Path], flags: list[str], rounds: int) -> list[dict]:
    """One row per case and contender: the median of the medians of each side."""
    for side, tree in trees.items():
        cli.say(f"{side}: building {tree}")
        # this tree too: its sources may be newer than its extension
        _python(tree, BUILD, f"{side} does not build")
        found = _python(tree, ["-c", WHERE], f"{side} does not import").stdout.split()
        if not all(Path(file).is_relative_to(tree) for file in found):
            raise cli.BadInput(f"{side} imports {' and '.join(found)}, not what is in {tree}")
    cli.say(f"both sides run the cases of this tree ({' and '.join(OVERLAY)}), without peers")
    found = {}
    for turn in range(rounds):
        for side, tree in trees.items():
            cli.say(f"round {turn + 1} of {rounds}: {side}")
            for row in _bench(tree, flags, f"{side} failed"):
                entry = found.setdefault(tuple(row[x] for x in KEY), {x: [] for x in trees})
                entry[side].append(row)
    return [_row(key, entry) for key, entry in found.items()]


def _bench(tree: Path, flags: list[str], why: str) -> list[dict]:
    # status 1 says that something was wrong: its row does too
    done = _python(tree, ["-m", "bench", *flags, "--no-peers", "--json"], why, good=(0, 1))
    rows = [row for row in map(json.loads, done.stdout.splitlines()) if row["kind"] == "op"]
    if not rows:
        raise cli.BadInput(_with_reason(f"{why}: it measured nothing", done))
    return rows


def _row(key: tuple, sides: dict[str, list[dict]]) -> dict:
    row = {"kind": "compare", **dict(zip(KEY, key, strict=True))}
    medians = {}
    for side, rows in sides.items():
        medians[side] = [x["ms"][1] for x in rows if x["ms"]]
        row[f"{side}_ms"] = statistics.median(medians[side]) if medians[side] else None
        row[f"{side}_commit"] = rows[0]["commit"] if rows else ""
        row[f"{side}_note"] = next((x["note"] for x in rows if not x["ms"]), "")
        if not rows:
            row[f"{side}_note"] = "not there"
    row["ratio"] = row["verdict"] = None
    if all(medians.values()):
        row["ratio"] = row["new_ms"] / row["base_ms"]
        row["verdict"] = verdict(row["ratio"], medians)
    row["device"] = next(x["device"] for rows in sides.values() for x in rows)
    return row


def verdict(ratio: float, medians: dict[str, list[float]]) -> str:
    """ "same" where the ratio is no further from 1 than the rounds of one side are apart."""
    spread = max(max(x) / min(x) for x in medians.values())
    if 1 / spread <= ratio <= spread:
        return "same"
    return "slower" if ratio > 1 else "faster"


def table(rows: list[dict], ref: str) -> list[str]:
    """One line per row, in columns."""
    head = ("op", "shape", "dtype", "mode", "variant", "base ms", "new ms", "new/base", "")
    cells = [head]
    for row in rows:
        times = [_number(row[f"{x}_ms"]) for x in ("base", "new")]
        ratio = "-" if row["ratio"] is None else f"{row['ratio']:.3f}"
        notes = [f"{x}: {row[f'{x}_note']}" for x in ("base", "new") if row[f"{x}_note"]]
        last = row["verdict"] or "; ".join(notes)
        cells.append((*(row[x] for x in KEY), *times, ratio, last))
    widths = [max(len(line[i]) for line in cells) for i in range(len(head))]
    title = f"base = {ref}, new = this tree, new/base below 1 is faster"
    if rows:
        title += f"; {rows[0]['device']}"
    lines = ["  ".join(x.ljust(w) for x, w in zip(line, widths, strict=True)) for line in cells]
    return [title, *(line.rstrip() for line in lines)]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _python(
    tree: Path, arguments: list[str], why: str, good: tuple[int, ...] = (0,)
) -> subprocess.CompletedProcess:
    """This interpreter in a tree, importing from there."""
    others = [x for x in os.environ.get("PYTHONPATH", "").split(os.pathsep) if x]
    others = [x for x in others if Path(x).resolve() != ROOT]
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(tree), *others]),
        "NLHF_REQUIRE_NATIVE": "1",
    }
    return _run([sys.executable, *arguments], why, good, cwd=tree, env=env)


def _git(*arguments: str, why: str) -> str:
    return _run(["git", *arguments], why, cwd=ROOT).stdout.strip()


def _run(
    command: list[str], why: str, good: tuple[int, ...] = (0,), **where
) -> subprocess.CompletedProcess:
    try:
        done = subprocess.run(command, capture_output=True, text=True, **where)
    except OSError as error:
        raise cli.BadInput(f"{why}: {error}") from error
    if done.returncode not in good:
        raise cli.BadInput(_with_reason(why, done))
    return done


def _with_reason(why: str, done: subprocess.CompletedProcess) -> str:
    """``why`` and the last line that the process had to say, where errors end."""
    said = done.stderr.strip() or done.stdout.strip()
    return f"{why}: {said.splitlines()[-1].strip()}" if said else why


def _not_code(folder: str, names: list[str]) -> set[str]:
    return {"__pycache__", "results"} & set(names)
