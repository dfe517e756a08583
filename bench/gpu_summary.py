"""At most 60 lines that say how a run of ``bench gpu`` went."""

import itertools
from pathlib import Path

from bench import losses_tables, sampling_tables

LINES = 60
WIDTH = 160
# lines that a list of failures may take, before it says how many more there are
FAILURES = 8
# what is left of these where there is no room for all
FEW = {"steps": 12, "scaling": 4}
OURS = ("nlhf", "rlhf")


def summary(rows: list[dict], reports: list[dict], out: Path) -> list[str]:
    """The lines. What is long gives way, the ops last: they are why one runs this."""
    fixed = [*_head(rows), *_parts(rows, reports), f"rows, logs and this summary: {out}"]
    room = LINES - len(fixed)
    ops = [*_sampling(rows), *_losses(rows), *_ops(rows)]
    steps, scaling = _steps(rows), _scaling(rows)
    if len(ops) + len(steps) + len(scaling) > room:
        scaling = _shortened(scaling, FEW["scaling"])
        steps = _shortened(steps, max(FEW["steps"], room - len(ops) - len(scaling)))
        ops = _shortened(ops, room - len(steps) - len(scaling))
    lines = [*fixed[:-1], *ops, *steps, *scaling, fixed[-1]]
    return [line if len(line) <= WIDTH else f"{line[: WIDTH - 3]}..." for line in lines]


def is_peer(row: dict) -> bool:
    """Steps do not say so: theirs are ours by name."""
    if row["kind"] == "step":
        return not row["variant"].startswith(OURS)
    return row.get("peer", False)


def _head(rows: list[dict]) -> list[str]:
    stamped = next((row for row in rows if "versions" in row), None)
    if stamped is None:
        return ["gpu: no row came back"]
    versions = ", ".join(f"{name} {x}" for name, x in stamped["versions"].items())
    changed = " and changes" if stamped["dirty"] else ""
    lines = [f"gpu: {stamped['device']}; commit {stamped['commit'] or 'unknown'}{changed}"]
    lines.append(f"with {versions}")
    limits = {row["name"]: row for row in rows if row["kind"] == "limit"}
    if limits:
        text = ", ".join(f"{x['name']} {x['value']:.3g} {x['unit']}" for x in limits.values())
        lines.append(f"limits: {text}")
    return lines


def _parts(rows: list[dict], reports: list[dict]) -> list[str]:
    lines = []
    for report in reports:
        counts = _counts([row for row in rows if row.get("part") == report["part"]])
        note = "; ".join(filter(None, [counts, report.get("note", "")]))
        lines.append(
            f"{report['part']:10} {report['status']:8} {report['seconds']:5.0f} s  {note}".rstrip()
        )
    failures = [
        f"  wrong: {_place(row)}: {row.get('note', '')}"
        for row in rows
        if row.get("status") == "wrong" and not is_peer(row)
    ]
    return lines + _shortened(failures, FAILURES)


def _counts(rows: list[dict]) -> str:
    """ "75 ok, 2 wrong, 8 refused" """
    order = ("ok", "wrong", "refused", "skipped")
    found = [(status, sum(row["status"] == status for row in rows)) for status in order]
    return ", ".join(f"{count} {status}" for status, count in found if count)


def _place(row: dict) -> str:
    if row["kind"] == "check":
        return f"{row['op']}: {row['case']} on {row['backend']} ({row['part']})"
    if row["kind"] == "test":
        return row["test"]
    if row["kind"] in ("op", "sampling", "losses"):
        return f"{row['op']} {row['mode']}, {row['shape']}, {row['variant']}"
    return f"{row['kind']} {row.get('variant', '')}"


def _ops(rows: list[dict]) -> list[str]:
    """Per op, shape and mode the fastest of ours beside the fastest of all others."""
    timed = [row for row in rows if row["kind"] == "op" and row.get("ms")]
    if not timed:
        return []

    def key(row: dict) -> tuple:
        return row["op"], row["shape"], row["dtype"], row["mode"]

    def best(found: list[dict]) -> dict | None:
        return min(found, key=lambda row: row["ms"][1], default=None)

    lines = ["ops: the best of ours, ms, GB/s, share of its limit | the best of the others, ms"]
    # in the order in which they came
    places = {k: i for i, k in reversed(list(enumerate(map(key, timed))))}
    timed.sort(key=lambda row: places[key(row)])
    for (op, shape, dtype, mode), group in itertools.groupby(timed, key):
        found = list(group)
        ours = best([x for x in found if not x["peer"] and x["variant"] != "eager"])
        other = best([x for x in found if x["peer"] or x["variant"] == "eager"])
        mine = _mine(ours) if ours else "none of ours"
        theirs = f"{other['variant']} {other['ms'][1]:.4g} ms" if other else "none"
        if ours and other:
            theirs = f"{other['ms'][1] / ours['ms'][1]:.2f} x ours: {theirs}"
        lines.append(f"  {op} {mode}, {shape}, {dtype}: {mine} | {theirs}")
    return lines


def _sampling(rows: list[dict]) -> list[str]:
    """One line: its targets, and the best shares of the copy bandwidth."""
    found = [r for r in rows if r["kind"] == "sampling" and r.get("ms")]
    if not found:
        return []
    parts = [sampling_tables.verdict(found).lower()]
    for filters in sampling_tables.TARGETS:
        ours = [r for r in found if r["filters"] == filters and not r["peer"]]
        for best in sorted(ours, key=lambda r: r["of_copy"])[-1:]:
            parts.append(f"{filters} {100 * best['of_copy']:.0f}% of copy ({best['shape']})")
    graphs = [r for r in found if r["dims"]["B"] == 1 and not r["peer"] and r.get("graph_ms")]
    for best in sorted(graphs, key=lambda r: r["graph_ms"][1])[:1]:
        parts.append(f"one row in a graph {1e3 * best['graph_ms'][1]:.3g} us ({best['shape']})")
    return [f"sampling: {'; '.join(parts)}"]


def _losses(rows: list[dict]) -> list[str]:
    found = [r for r in rows if r["kind"] in ("losses", "losses memory")]
    return [losses_tables.summary(found)] if found else []


def _mine(row: dict) -> str:
    text = f"{row['variant']} {row['ms'][1]:.4g} ms"
    if row.get("graph_ms"):
        text += f" (in a graph {row['graph_ms'][1]:.4g})"
    if row.get("gbps"):
        text += f", {row['gbps']:.0f} GB/s"
    if row.get("share"):
        text += f", {100 * row['share']:.0f}% of {row['limit']}"
    return text


def _steps(rows: list[dict]) -> list[str]:
    lines = []
    for row in rows:
        if row["kind"] != "step":
            continue
        s = row["setting"]
        lora = f", LoRA {s['lora_r']}" if s.get("lora_r") else ""
        where = f"{s['model']}{lora} B={s['B']} {s['P']}+{s['T']} {s['dtype']}"
        if not row["seconds"]:
            lines.append(f"step {where}: {row['variant']}: {row['status']}: {row['note']}")
            continue
        phases = ", ".join(f"{k} {v[1]:.3g}" for k, v in row["seconds"].items())
        memory = f"; peak {row['peak_mb'] / 1024:.3g} GB" if row.get("peak_mb") else ""
        lines.append(f"step {where}: {row['variant']}: seconds: {phases}{memory}")
    return lines


def _scaling(rows: list[dict]) -> list[str]:
    return [
        f"scaling {row['title']}, {row['variant']}: {row['y']} grows as {row['x']}^"
        f"{row['exponent']:.2f}"
        for row in rows
        if row["kind"] == "scaling"
    ]


def _shortened(lines: list[str], most: int) -> list[str]:
    if len(lines) <= most:
        return lines
    kept = most - 1
    return [*lines[:kept], f"  ... and {len(lines) - kept} more in rows.jsonl"]
