"""The few figures that the README shows, from the latest rows."""

from bench.tables import (
    BARE,
    MODES,
    by_setting,
    fastest,
    find,
    find_ours,
    find_trl,
    rank,
    seconds,
    size,
)
from bench.text import Row, devices, grid, number, ok, percent, plain, ratio

BEGIN, END = "<!-- bench: begin -->", "<!-- bench: end -->"


def headline(rows: list[Row]) -> str:
    """The text between the markers; of each kind of machine the one measured last."""
    lines = []
    for cpu in (True, False):
        measured = [r for r in rows if r["kind"] in ("op", "step")]
        found = devices(measured, cpu)
        if found:
            last = max(found, key=lambda d: max(r["run"] for r in measured if r["device"] == d))
            lines += _machine([r for r in measured if r["device"] == last], last)
    measured = [r for r in rows if r["kind"] != "aot"]
    gpu = "" if devices(measured, cpu=False) else " GPU figures are not measured."
    where = "[docs/benchmarks.md](docs/benchmarks.md)"
    if lines:
        lines += [
            "In brackets: how many times ours; in bold: the best that is correct. Every shape and",
            f"peer, limits, memory, scaling, and how all of it was measured: {where}.{gpu}",
        ]
    else:
        lines += [f"No figures yet: nothing has been measured. {where} says how it will be.{gpu}"]
    return "\n".join(lines)


def splice(readme: str, block: str) -> str:
    """The README with another block between the markers; ValueError if they are not there."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1:
        raise ValueError(f"needs one line {BEGIN} and one line {END} below it")
    head, rest = readme.split(BEGIN)
    if END not in rest:
        raise ValueError(f"{END} stands above {BEGIN}")
    return f"{head}{BEGIN}\n{block}\n{END}{rest.split(END)[1]}"


def _machine(rows: list[Row], device: str) -> list[str]:
    ops = [line for op in sorted({r["op"] for r in rows if r["kind"] == "op"})
           if (line := _op([r for r in rows if r.get("op") == op]))]  # fmt: skip
    steps = _steps([r for r in rows if r["kind"] == "step"])
    lines = [f"**{plain(device)}**", ""] if ops or steps else []
    if ops:
        lines += grid(["op", "ours", "eager", "fastest peer"], ops)
    if steps:
        lines += grid(["a Nash-MD step", "nlhf", "plain loop", "TRL"], steps)
    return lines


def _op(rows: list[Row]) -> list[str] | None:
    """One line: the largest shape on which most of ours, eager and a peer are there."""

    def field(row: Row) -> list[Row]:
        same = ("shape", "dtype", "mode")
        return [r for r in ok(rows) if all(r[k] == row[k] for k in same)]

    def known(row: Row) -> tuple:
        rivals = [r for r in field(row) if not r["variant"].startswith("yardstick")]
        sides = {"peer" if r["peer"] else r["variant"] == "eager" for r in rivals}
        return False in sides, len(sides), list(MODES).index(row["mode"]), size(row)

    best = max(ok(rows), key=known, default=None)
    if best is None:
        return None
    field = sorted(field(best), key=rank)
    ours = fastest(r for r in field if not r["peer"] and r["variant"] != "eager")
    if ours is None:
        return None
    # a yardstick solves less than the op: it is in the tables, and no rival
    peer = fastest(r for r in field if r["peer"] and not r["variant"].startswith("yardstick"))
    cells = [(r, r["ms"][1]) if r else None for r in (ours, find(field, "eager"), peer)]
    texts = _compared([c and c[1] for c in cells], "ms")
    texts[0] = f"{plain(ours['variant'])} {texts[0]}"
    if ours["share"] is not None:
        texts[0] += f", {percent(ours['share'])} of {ours['limit']}"
    if peer:
        texts[2] = f"{plain(peer['variant'])} {texts[2]}"
    what = f"`{ours['op']}`, {MODES[ours['mode']]}<br>{plain(ours['shape'])}, {ours['dtype']}"
    return [what, *texts]


def _compared(values: list[float | None], unit: str) -> list[str]:
    """The least in bold; behind the others, how many times the first they are."""
    least = min(v for v in values if v is not None)
    texts = []
    for i, value in enumerate(values):
        text = "-" if value is None else f"{number(value)} {unit}"
        text = f"**{text}**" if value == least else text
        times = "" if i == 0 or value is None else f" ({number(ratio(value, values[0]))} x)"
        texts.append(text + times)
    return texts


def _steps(rows: list[Row]) -> list[list[str]]:
    """Of the largest model that both we and a rival have run: every setting."""
    found = []
    for title, group in by_setting([r for r in rows if r["variant"] != BARE]).items():
        sides = [find_ours(group), find(ok(group), "plain loop"), find_trl(group)]
        if sides[0] and any(sides[1:]):
            found.append((title, sides))
    lines = []
    for title, sides in found:
        if sides[0]["setting"]["model"] != found[-1][1][0]["setting"]["model"]:
            continue
        for phase, what in (("rollout", "rollout"), ("step", "whole step")):
            texts = _compared([seconds(s, phase) for s in sides], "s")
            lines.append([f"{what}<br>{plain(title)}", *texts])
        peaks = [s and s["peak_mb"] for s in sides]
        if peaks[0] is not None:
            lines.append([f"peak memory<br>{plain(title)}", *_compared(peaks, "MB")])
    return lines
