"""Writes docs/benchmarks.md, its images and the figures in README.md from the committed rows."""

import argparse
import json
import math
import sys
from pathlib import Path

from bench import plots, rows
from bench.headline import headline, splice
from bench.page import page
from bench.tables import MODES
from bench.text import Row

_FIGURES = ("ms", "gbps", "share", "limit", "peak_mb")
# what this report reads of a row; a row without a figure need not have those of the second list
_FIELDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "op": (("op", "shape", "dims", "dtype", "mode", "variant", "peer", "status", "note"), _FIGURES),
    "sampling": (("op", "shape", "dims", "dtype", "filters", "logits", "repeated", "variant",
                  "peer", "status", "note"), (*_FIGURES, "of_copy")),
    "sampling memory": (("op", "shape", "dims", "dtype", "filters", "logits", "variant", "peer",
                         "status", "note"), ("mb",)),
    "losses": (("op", "shape", "dims", "dtype", "table", "variant", "peer", "status", "note"),
               _FIGURES),
    "losses memory": (("op", "shape", "dims", "dtype", "variant", "peer", "status", "note"),
                      ("mb", "gradients_mb")),
    "limit": (("name", "value", "unit"), ()),
    "step": (("setting", "variant", "status", "note"), ("seconds", "peak_mb", "state_mb")),
    "scaling": (("title", "x", "xs", "y", "ys", "variant", "exponent"), ()),
    "aot": (("kernel", "variant", "dtype", "arch", "registers", "spills", "shared_bytes",
             "load_bits", "per_element", "bound", "limit_gbps", "limit_share"), ()),
}  # fmt: skip
# what the runs on a GPU and the comparisons say beside their figures
_SILENT = ("part", "check", "test", "compare")
_STAMP = ("run", "commit", "dirty", "device", "threads", "versions")
# rows that agree in these say the same thing, and the latest counts
_KEYS = {
    "op": ("device", "op", "shape", "dtype", "mode", "variant"),
    "sampling": ("device", "shape", "dtype", "filters", "logits", "repeated", "variant"),
    "sampling memory": ("device", "shape", "dtype", "filters", "logits", "variant"),
    "losses": ("device", "table", "op", "shape", "dtype", "variant"),
    "losses memory": ("device", "op", "shape", "dtype", "variant"),
    "limit": ("device", "name"),
    "step": ("device", "setting", "variant"),
    "scaling": ("device", "title", "variant"),
    "aot": ("kernel", "variant", "dtype", "arch"),
}


def main(argv: list[str]) -> int:
    parser = _Parser(prog="python -m bench report", description=__doc__)
    parser.add_argument(
        "--check",
        action="store_true",
        help="write nothing; name the files that differ from the rows and exit with 1",
    )
    parser.add_argument(
        "--results", type=Path, metavar="DIR",
        help="where the rows are: every *.jsonl in it (default: bench/results)",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=Path, default=rows.ROOT, metavar="DIR",
        help="where README.md and docs/ are (default: this repository)",
    )  # fmt: skip
    try:
        args = parser.parse_args(argv)
        if args.results and not args.results.is_dir():
            raise ValueError(f"{args.results} is not a folder")
        found = latest(load(args.results or rows.RESULTS))
        report = Report(found, args.output)
    except (OSError, ValueError) as error:
        print(f"python -m bench report: {error}", file=sys.stderr)
        return 2
    if args.check:
        differ = report.differences()
        for path in differ:
            print(f"{path} differs from the rows: python -m bench report writes it")
        return 1 if differ else 0
    report.write()
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise ValueError(f"{message} (--help lists the flags)")


class Report:
    """What the rows say each file must be."""

    def __init__(self, found: list[Row], output: Path):
        self._output = output
        readme = output / "README.md"
        self._plots = plots.data(found)
        try:
            spliced = splice(readme.read_text(encoding="utf-8"), headline(found))
        except ValueError as error:
            raise ValueError(f"{readme}: {error}") from None
        self._texts = {"docs/benchmarks.md": page(found, list(self._plots)), "README.md": spliced}

    def _images(self) -> dict[str, dict | None]:
        """None: that image must not be there."""
        return {f"docs/benchmarks/{n}.png": self._plots.get(n) for n in plots.NAMES}

    def differences(self) -> list[str]:
        def text(path: Path) -> str | None:
            return path.read_text(encoding="utf-8") if path.exists() else None

        differ = [n for n, want in self._texts.items() if text(self._output / n) != want]
        for name, data in self._images().items():
            want = None if data is None else plots.digest(data)
            if plots.digest_of(self._output / name) != want:
                differ.append(name)
        return sorted(differ)

    def write(self) -> None:
        for name, text in self._texts.items():
            path = self._output / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        for name, data in self._images().items():
            path = self._output / name
            if data is None:
                path.unlink(missing_ok=True)
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                plots.draw(data, path)


def load(folder: Path) -> list[Row]:
    """All rows of a folder, in the order of its files; ValueError names the file and the line."""
    found = []
    for path in sorted(folder.glob("*.jsonl")):
        try:
            read = rows.read(path)
        except json.JSONDecodeError as error:
            # the document of the error is the line itself
            at = path.read_text(encoding="utf-8").splitlines().index(error.doc) + 1
            raise ValueError(f"{path}:{at}: not JSON: {error.msg}") from None
        except UnicodeDecodeError:
            raise ValueError(f"{path}: not UTF-8") from None
        for at, row in enumerate(read, 1):
            if why := fault(row):
                raise ValueError(f"{path}:{at}: {why}")
        found += [row for row in read if row["kind"] not in _SILENT]
    return found


def fault(row: object) -> str:
    """What is wrong with a row; "" if nothing."""
    if not isinstance(row, dict):
        return "not a JSON object"
    kind = row.get("kind")
    if kind in _SILENT:
        return ""
    if kind not in _FIELDS:
        return f"unknown kind {kind!r}; known: {', '.join(_FIELDS)}"
    always, figures = _FIELDS[kind]
    status = row.get("status", "ok")
    if status not in ("ok", "missing", "wrong"):
        return f"status {status!r}; known: ok, missing, wrong"
    needed = (*_STAMP, *always, *(figures if status == "ok" else ()))
    absent = [name for name in needed if name not in row]
    if absent:
        return f"no field {', '.join(absent)}"
    inner = {"op": _op_fault, "sampling": _op_fault, "losses": _op_fault, "step": _step_fault,
             "scaling": _curve_fault, "aot": _aot_fault}  # fmt: skip
    return inner[kind](row, status) if kind in inner else ""


def _op_fault(row: Row, status: str) -> str:
    if row.get("mode", "fwd") not in MODES:
        return f"mode {row['mode']!r}; known: {', '.join(MODES)}"
    if not isinstance(row["dims"], dict):
        return f"dims must be an object, got {row['dims']!r}"
    return _time_fault(row["ms"]) if status == "ok" else ""


def _step_fault(row: Row, status: str) -> str:
    absent = [k for k in ("model", "B", "P", "T", "dtype") if k not in row["setting"]]
    if absent:
        return f"setting has no {', '.join(absent)}"
    if status != "ok":
        return ""
    if not isinstance(row["seconds"], dict):
        return f"seconds must be an object, got {row['seconds']!r}"
    # a phase that a variant does not have is null
    return next(filter(None, (_time_fault(x) for x in row["seconds"].values() if x)), "")


def _curve_fault(row: Row, status: str) -> str:
    equal = row["xs"] and len(row["xs"]) == len(row["ys"])
    return "" if equal else "xs and ys must be as long as each other, and not empty"


def _aot_fault(row: Row, status: str) -> str:
    absent = [k for k in ("mufu", "fma") if k not in row["per_element"]]
    return f"per_element has no {', '.join(absent)}" if absent else ""


def _time_fault(span: object) -> str:
    if isinstance(span, list) and len(span) == 3:
        numbers = (isinstance(x, int | float) and 0 <= x < math.inf for x in span)
        if all(numbers):
            return ""
    return f"a time must be [min, median, max], got {span!r}"


def latest(found: list[Row]) -> list[Row]:
    """Of rows that say the same thing the one of the latest run, sorted by what they say."""
    kept: dict[str, Row] = {}
    for row in found:
        key = json.dumps([row["kind"], *(row[k] for k in _KEYS[row["kind"]])], sort_keys=True)
        if key not in kept or row["run"] >= kept[key]["run"]:
            kept[key] = row
    return [kept[key] for key in sorted(kept)]
