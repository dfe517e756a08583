"""Has anything become slower? Figures without noise, or with little, against committed bounds.

  counts  instructions of every C++ op at the levels "avx2" and "plain", by callgrind
  aot     registers and shared memory of every Triton kernel, and its faults as `bench aot` names
          them (spills, narrow loads); of its last run, if no source has changed since
  ratios  CPU time of the C++ ops at small shapes over that of eager, on one thread

The bounds are in bench/bounds.json, with the toolchain that they were made with. A figure above its
bound fails, one without a bound and a bound without its figure too, and so do counts that have
fallen far below: then --save makes the bounds true again, and the change is committed with them.
Ratios differ from processor to processor: --save widens their bounds and narrows none. With another
compiler, C library or Triton, figures are held to 1.3 times the bounds, and a line says so. Exit
status: 0; 1 if anything fails; 2 for bad input.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench import cli
from bench.rows import ROOT

BOUNDS = ROOT / "bench" / "bounds.json"
FOREIGN = 1.3
FIGURES = ("registers", "shared_bytes")


@dataclass(frozen=True)
class Part:
    # returns what compiled them, and the figures
    measure: Callable[[], tuple[str, dict[str, float]]]
    # a figure may be so many times its bound, and not less than so many times
    above: float
    below: float = 0.0
    # what is saved for a figure
    bound: Callable[[float], float] = lambda figure: figure
    # whether a wider bound stays, which another processor needed
    widens: bool = False


def _counts() -> tuple[str, dict[str, float]]:
    from bench import counts

    return counts.measured()


def _aot() -> tuple[str, dict[str, float]]:
    import triton

    from bench import aot

    rows = aot.kept()
    if not rows:
        if triton.knobs.runtime.interpret:
            why = "unset TRITON_INTERPRET: it and the compiler cannot share a process"
            raise cli.BadInput(f"python -m bench check: {why}")
        rows = list(aot.compile_all(aot.jobs()))
        aot.keep(rows)
    found = {}
    for row in rows:
        found |= {f"{aot.name(row)}, {figure}": row[figure] for figure in FIGURES}
        found[f"{aot.name(row)}, faults"] = len(row["faults"])
    return f"triton {triton.__version__}", found


def _ratios() -> tuple[str, dict[str, float]]:
    from bench import ratios

    return "", ratios.measured()


def _ratio_bound(figure: float) -> float:
    # a kernel that is eager in disguise is at 1
    return round(min(1.5 * figure, 0.9), 4)


PARTS = {
    "counts": Part(_counts, above=1.02, below=0.95),
    "aot": Part(_aot, above=1.0),
    "ratios": Part(_ratios, above=1.0, bound=_ratio_bound, widens=True),
}


def judge(part: Part, found: dict[str, float], bounds: dict[str, float]) -> list[str]:
    """What is wrong, a line each; figures and bounds by the same names."""
    wrong = []
    for name in sorted(found.keys() | bounds.keys()):
        if name not in bounds:
            wrong.append(f"{name}: {found[name]:,.5g} has no bound: --save makes one")
        elif name not in found:
            wrong.append(f"{name}: has a bound, and was not measured: --save takes it out")
        # a NaN is no figure below anything
        elif not found[name] <= part.above * bounds[name]:
            wrong.append(f"{name}: {found[name]:,.7g} exceeds its bound {bounds[name]:,.7g}")
        elif found[name] < part.below * bounds[name]:
            now = f"{found[name]:,.7g} is far below its bound {bounds[name]:,.7g}"
            wrong.append(f"{name}: {now}: --save lowers it")
    return wrong


def compared(name: str, saved: dict, log: Callable[[str], None]) -> tuple[list[str], list[str]]:
    """(the line of the table, what is wrong)."""
    part = PARTS[name]
    toolchain, found = part.measure()
    of = saved.get(name, {"toolchain": toolchain, "bounds": {}})
    if of["toolchain"] != toolchain:
        log(f"{name}: the bounds are of {of['toolchain']}, this is {toolchain}: "
            f"held to {FOREIGN} times them")  # fmt: skip
        part = dataclasses.replace(part, above=FOREIGN * part.above, below=0.0)
    wrong = judge(part, found, of["bounds"])
    shares = {x: found[x] / of["bounds"][x] for x in found if of["bounds"].get(x)}
    most = max(shares, key=shares.get, default="")
    nearest = f"{shares[most]:.3f} of its bound: {most}" if most else "-"
    return [name, str(len(found)), str(len(wrong)), nearest], [f"{name}: {x}" for x in wrong]


def save(names: Sequence[str], saved: dict) -> dict:
    for name in names:
        part = PARTS[name]
        toolchain, found = part.measure()
        before = saved.get(name, {}).get("bounds", {}) if part.widens else {}
        bounds = {x: max(part.bound(found[x]), before.get(x, 0.0)) for x in sorted(found)}
        saved[name] = {"toolchain": toolchain, "bounds": bounds}
    return saved


def main(argv: Sequence[str]) -> int:
    parser = cli.Parser("check", __doc__)
    parser.add_argument(
        "--only", type=cli.names_of(tuple(PARTS)), metavar="PART", default=list(PARTS),
        help=f"separated by commas: {', '.join(PARTS)} (default: all)",
    )  # fmt: skip
    try:
        arguments = parser.parse(argv)
        return _run(arguments)
    except cli.BadInput as error:
        return cli.refuse(error)


def _run(arguments: argparse.Namespace) -> int:
    saved = json.loads(BOUNDS.read_text(encoding="utf-8")) if BOUNDS.exists() else {}
    if arguments.save:
        text = json.dumps(save(arguments.only, saved), indent=1, sort_keys=True)
        BOUNDS.write_text(text + "\n", encoding="utf-8")
        print(f"saved: {', '.join(arguments.only)}")
        return 0
    lines, wrong = [], []
    for name in arguments.only:
        line, more = compared(name, saved, cli.say)
        lines.append(line)
        wrong += more
    print(cli.table(["part", "figures", "wrong", "nearest"], lines))
    said = [f"FAILED: {len(wrong)}", *wrong] if wrong else ["every figure is in its bound"]
    print("\n".join(said))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
