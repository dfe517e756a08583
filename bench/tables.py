"""Rows as tables of Markdown: the ops, the training step, the curves, the predictions."""

import math
from collections.abc import Callable, Iterable
from dataclasses import MISSING, fields

from bench.setting import MODELS, Setting
from bench.text import (
    Row,
    grid,
    is_cpu,
    name,
    number,
    ok,
    percent,
    plain,
    ratio,
    reasons,
    runs,
    with_unit,
)

MODES = {"fwd": "forward", "bwd": "backward", "fwd+bwd": "forward and backward"}
# what limits a rollout, and another algorithm: none competes for the fastest step
BARE, READING, RLHF = "bare forwards", "reading weights and caches", "rlhf"
# measured exponents scatter around 1, so only above this do they count as more
LINEAR = 1.1
# as many shapes as a page of GitHub holds side by side
_WIDE = 4


# ---- the ops


def problem(row: Row) -> tuple[str, str]:
    return row["shape"], row["dtype"]


def size(row: Row) -> tuple:
    """Sorts the shapes of an op: by vocabulary, then by rows."""
    dims = row["dims"]
    return dims.get("V", 0), math.prod(dims.values()), row["shape"], row["dtype"]


def rank(row: Row) -> tuple:
    """Sorts variants: ours, eager, peers."""
    return row["peer"], row["variant"] == "eager", row["variant"]


def fastest(rows: Iterable[Row]) -> Row | None:
    return min(ok(rows), key=lambda r: r["ms"][1], default=None)


def find(rows: Iterable[Row], variant: str) -> Row | None:
    return next((r for r in rows if r["variant"] == variant), None)


def op_section(rows: list[Row]) -> list[str]:
    """All tables of one op on one device."""
    lines = []
    for mode, words in MODES.items():
        these = [r for r in rows if r["mode"] == mode]
        lines += shapes_by_variants(these, words, time_cell)
    modes = [m for m in MODES if any(r["mode"] == m for r in ok(rows))]
    if modes:
        whole = [r for r in ok(rows) if r["mode"] == modes[-1]]
        head = f"memory beyond the inputs, {MODES[modes[-1]]}"
        lines += shapes_by_variants(whole, head, memory_cell)
    lines += reasons(
        (r for r in rows if r["status"] == "wrong"),
        lambda r: f"{plain(r['shape'])}, {r['dtype']}, {r['mode']}",
    )
    lines += runs(rows)
    running = {r["variant"] for r in rows if r["status"] != "missing"}
    absent = sorted({name(r) for r in rows if r["variant"] not in running})
    if absent:
        lines += [f"[Missing](#what-is-missing-and-why): {', '.join(absent)}.", ""]
    return lines


def shapes_by_variants(rows: list[Row], corner: str, cell: Callable) -> list[str]:
    """Variants downwards, shapes across, a few at a time; who runs nowhere has no line."""
    running = {r["variant"] for r in rows if r["status"] != "missing"}
    variants = {r["variant"]: r for r in sorted(rows, key=rank) if r["variant"] in running}
    columns = list(dict.fromkeys(problem(r) for r in sorted(rows, key=size)))
    lines = []
    for start in range(0, len(columns) if variants else 0, _WIDE):
        shown = columns[start : start + _WIDE]
        field = {c: [r for r in rows if problem(r) == c] for c in shown}
        body = [
            [name(row), *(cell(find(field[c], variant), field[c]) for c in shown)]
            for variant, row in variants.items()
        ]
        body = [line for line in body if any(line[1:])]
        lines += grid([corner, *(f"{plain(s)}<br>{d}" for s, d in shown)], body)
    return lines


def time_cell(row: Row | None, rivals: list[Row]) -> str:
    if row is None or row["status"] != "ok":
        return row["status"] if row else ""
    median = row["ms"][1]
    text = f"{number(median)} ms"
    if median == fastest(rivals)["ms"][1]:
        text = f"**{text}**"
    if row.get("graph_ms"):
        text += f" (graph {number(row['graph_ms'][1])})"
    speed = [] if row["gbps"] is None else [f"{number(row['gbps'])} GB/s"]
    if row["share"] is not None:
        speed.append(f"{percent(row['share'])} of {row['limit']}")
    text += f"<br>{', '.join(speed)}" if speed else ""
    eager = find(ok(rivals), "eager")
    if eager and eager is not row:
        text += f"<br>{number(ratio(eager['ms'][1], median))} x eager"
    return text


def memory_cell(row: Row | None, rivals: list[Row]) -> str:
    if row is None:
        return ""
    text = with_unit(row["peak_mb"], "MB")
    # on a GPU the caller's own time decides whether small launches are late
    if not is_cpu(row["device"]) and row.get("cpu_us") is not None:
        text += f"<br>{number(row['cpu_us'])} us of CPU a call"
    return text


# ---- the training step


USUAL = {f.name: f.default for f in fields(Setting) if f.default is not MISSING}


def setting_name(setting: dict) -> str:
    """Model, sizes, dtype, and what is not as usual."""
    sizes = [f"{k}={setting[k]}" for k in ("B", "P", "T")]
    shown = ("dtype", "device")
    other = [f"{k}={v}" for k, v in setting.items() if k in USUAL.keys() - shown and v != USUAL[k]]
    return ", ".join([setting["model"], *sizes, setting["dtype"], *other])


def by_setting(rows: list[Row]) -> dict[str, list[Row]]:
    """Small models first, then by sizes."""

    def order(row: Row) -> tuple:
        model, *sizes = (row["setting"][k] for k in ("model", "B", "P", "T"))
        place = list(MODELS).index(model) if model in MODELS else len(MODELS)
        return place, model, *sizes, setting_name(row["setting"])

    groups: dict[str, list[Row]] = {}
    for row in sorted(rows, key=order):
        groups.setdefault(setting_name(row["setting"]), []).append(row)
    return groups


def seconds(row: Row | None, phase: str) -> float | None:
    """The median of a phase, None where there is none."""
    if row is None or row["status"] != "ok":
        return None
    return (row["seconds"].get(phase) or [None, None])[1]


def find_trl(rows: list[Row]) -> Row | None:
    """TRL in the mode that is right."""
    return next((r for r in ok(rows) if r["variant"].startswith("trl ")), None)


def competes(row: Row) -> bool:
    return row["variant"] not in (BARE, READING, RLHF) and bool(seconds(row, "step"))


def find_ours(rows: list[Row]) -> Row | None:
    """The fastest of our own, of which a GPU has one with graphs."""
    found = [r for r in rows if competes(r) and r["variant"].startswith("nlhf")]
    return min(found, key=lambda r: seconds(r, "step"), default=None)


def step_order(row: Row) -> tuple:
    known = ["nlhf", "plain loop", "trl", BARE, READING]
    place = next((i for i, k in enumerate(known) if row["variant"].startswith(k)), len(known))
    return place, row["variant"]


def beyond_state(row: Row) -> float | None:
    if row["peak_mb"] is None or row["state_mb"] is None:
        return None
    return row["peak_mb"] - row["state_mb"]


def step_table(rows: list[Row]) -> list[str]:
    """One setting on one device."""
    best = min((seconds(r, "step") for r in rows if competes(r)), default=None)
    trl, limits = find_trl(rows), [find(rows, v) for v in (BARE, READING)]
    limits = [r for r in limits if r is not None and r["status"] == "ok"]
    body = []
    for row in sorted(rows, key=step_order):
        if row["status"] == "wrong":
            body.append([name(row), "wrong", *[""] * (7 + len(limits))])
        if row["status"] != "ok":
            continue
        phases = [number(seconds(row, p)) for p in ("rollout", "scoring", "update", "step")]
        if competes(row) and seconds(row, "step") == best:
            phases[-1] = f"**{phases[-1]}**"
        faster = [ratio(seconds(trl, p), seconds(row, p)) for p in ("rollout", "step")]
        over = [ratio(seconds(row, "rollout"), seconds(limit, "rollout")) for limit in limits]
        memory = [row["peak_mb"], beyond_state(row)]
        body.append([name(row), *phases, *map(number, [*faster, *over, *memory])])
    header = ["s", "rollout", "scoring", "update", "step", "rollout,<br>x TRL", "step,<br>x TRL"]
    header += [f"rollout over<br>{limit['variant']}" for limit in limits]
    header += ["peak MB", "MB beyond<br>the state"]
    notes = [f"- {name(r)}: {plain(r['note'])}" for r in ok(rows) if r["note"]]
    return [*grid(header, body), *notes, *([""] if notes else [])]


def rlhf_table(rows: list[Row]) -> list[str]:
    body = []
    for title, group in by_setting(rows).items():
        ours, other = find_ours(group), find(ok(group), RLHF)
        if ours is None or other is None:
            continue
        steps = [seconds(r, "step") for r in (ours, other)]
        peaks = [r["peak_mb"] for r in (ours, other)]
        cells = [*steps, ratio(*steps), *peaks, ratio(*peaks)]
        body.append([plain(title), *map(number, cells)])
    header = ["", "NLHF, s", "RLHF, s", "ratio", "NLHF, peak MB", "RLHF, peak MB", "ratio"]
    lines = grid(header, body) if body else ["Not measured.", ""]
    wrong = (r for r in rows if r["status"] == "wrong" and r["variant"] == RLHF)
    return lines + reasons(wrong, lambda r: plain(setting_name(r["setting"])))


# ---- curves and predictions


def scaling_table(rows: list[Row]) -> list[str]:
    body = []
    for row in sorted(rows, key=lambda r: (r["title"], r["variant"])):
        exponent = row["exponent"]
        worse = exponent is not None and exponent > LINEAR
        value = f"**{number(exponent)}**" if worse else number(exponent)
        ends = f"{number(row['xs'][0])} to {number(row['xs'][-1])}"
        growth = f"{number(row['ys'][0])} to {number(row['ys'][-1])} {row['y']}"
        mark = "worse than linear" if worse else ""
        body.append([plain(row["title"]), plain(row["variant"]), ends, growth, value, mark])
    return grid(["curve", "variant", "from", "measured", "exponent", ""], body)


def aot_table(rows: list[Row]) -> list[str]:
    header = ["kernel", "variant", "dtype", "registers", "spills", "shared memory, B"]
    header += ["load bits", "MUFU<br>an element", "FMA<br>an element", "bound by"]
    header += ["predicted limit,<br>GB/s", "% of<br>the memory"]
    body = []
    for row in sorted(rows, key=lambda r: (r["kernel"], r["variant"], r["dtype"])):
        each = row["per_element"]
        body.append([
            f"`{row['kernel']}`", plain(row["variant"]), row["dtype"],
            *map(number, (row["registers"], row["spills"], row["shared_bytes"], row["load_bits"])),
            *map(number, (each["mufu"], each["fma"])), plain(row["bound"]),
            number(row["limit_gbps"]), percent(row["limit_share"]),
        ])  # fmt: skip
    return grid(header, body)
