"""Figures, names and reasons as Markdown: what all tables are made of."""

import math
import re
from collections.abc import Callable, Iterable

Row = dict


def number(x: float | None) -> str:
    """Three significant digits, a count as it is: the one place where a figure becomes text."""
    if x is None:
        return "-"
    if isinstance(x, int):
        return f"{x:,}"
    rounded = float(f"{x:.2e}")
    decimals = 2 - math.floor(math.log10(abs(rounded))) if rounded else 0
    return f"{rounded:,.{max(0, decimals)}f}"


def with_unit(x: float | None, unit: str) -> str:
    return "-" if x is None else f"{number(x)} {unit}"


def percent(share: float | None) -> str:
    return "-" if share is None else f"{number(100.0 * share)} %"


def ratio(of: float | None, to: float | None) -> float | None:
    return None if of is None or not to else of / to


def plain(text: str) -> str:
    """Text of others inside a table: one line, no markup of its own."""
    return re.sub(r"([|<*_`\[\]\\])", r"\\\1", " ".join(str(text).split()))


def grid(header: list[str], body: Iterable[list[str]]) -> list[str]:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *body]
    return [f"| {' | '.join(cells)} |" for cells in lines] + [""]


def is_cpu(device: str) -> bool:
    """Names of CPUs end in their number of cores; see ``bench.rows.device_name``."""
    return re.search(r", \d+ cores$", device) is not None


def devices(rows: list[Row], cpu: bool) -> list[str]:
    return sorted({r["device"] for r in rows if is_cpu(r["device"]) == cpu})


def by_device(rows: list[Row], render: Callable[[list[Row]], list[str]]) -> list[str]:
    """What ``render`` makes of each device's rows; a line where there are none."""
    lines = []
    for cpu, kind in ((True, "CPU"), (False, "GPU")):
        found = devices(rows, cpu)
        for device in found:
            lines += [f"**{device}**", "", *render([r for r in rows if r["device"] == device])]
        if not found:
            lines += [f"{kind}: not measured.", ""]
    return lines


def ok(rows: Iterable[Row]) -> list[Row]:
    return [r for r in rows if r["status"] == "ok"]


def name(row: Row) -> str:
    return plain(row["variant"]) + (" (peer)" if row.get("peer") else "")


def reasons(rows: Iterable[Row], where: Callable[[Row], str]) -> list[str]:
    """A line for each variant and reason among rows without a number, with the places."""
    places: dict[str, list[str]] = {}
    for row in rows:
        line = f"- {name(row)}, {row['status']}: {plain(row['note'] or 'no reason given')}"
        places.setdefault(line, []).append(where(row))
    lines = [
        line + (f" ({'; '.join(dict.fromkeys(at))})" if any(at) else "")
        for line, at in sorted(places.items())
    ]
    return [*lines, ""] if lines else []


def runs(rows: Iterable[Row]) -> list[str]:
    """A line if not all of these were measured in one run."""
    names: dict[str, list[str]] = {}
    for row in sorted(ok(rows), key=lambda r: r["run"]):
        run = f"{row['run'][:16].replace('T', ' ')}, commit {row['commit'] or 'unknown'}"
        names.setdefault(run, []).append(name(row))
    if len(names) < 2:
        return []
    said = "; ".join(f"{', '.join(dict.fromkeys(who))} ({run})" for run, who in names.items())
    return [f"Not all from one run: {said}.", ""]
