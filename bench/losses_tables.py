"""The rows of ``bench losses`` as tables; in a terminal each target beside its figure."""

import dataclasses
from collections.abc import Iterable

from bench import cli
from bench.sampling_tables import Figure, Line, Table
from bench.tables import fastest, find
from bench.text import Row, is_cpu, number, ok, percent, plain, ratio, reasons

EAGER, COMPILED = "eager", "torch.compile"
IN_PLACE = ", in place"
# CPU: times eager in place, into fresh memory, and the share of its memory; in these tables and
# this dtype
TIMES, TIMES_FRESH, OF_MEMORY = 15.0, 7.0, 20.0
TIMES_LINEAR, OF_MEMORY_LINEAR, TIMES_STEP = 1.4, 10.0, 2.0
# GPU: shares of the copy bandwidth or of products, and times the fastest of the others
OF_COPY, OF_GEMM, OF_COPY_EMA, TIMES_OTHERS, MEMORY_GB = 85.0, 85.0, 90.0, 1.0, 8.0
AIMED_DTYPE = {True: "float32", False: "bfloat16"}
TITLES = {
    "logits": "Over logits, forward and backward",
    "linear": "From hidden states and a trained head, forward and backward",
    "kl": "Exact KL, forward and backward",
    "step": "Loss and backward of the head in the quickstart's step",
    "ema": "Average of the weights",
}
LOGITS_HEADER = [
    "op", "shape", "dtype", "in place, ms", "x eager", "fresh, ms", "x eager", "x torch.compile",
    "x the fastest peer", "of copy", "in place, MB", "fresh, MB", "eager, MB", "in place of eager",
    "fresh of eager",
]  # fmt: skip
LINEAR_HEADER = [
    "op", "shape", "dtype", "ours, ms", "x eager", "x product and op", "x torch.compile",
    "x the fastest peer", "of gemm", "ours, MB", "eager, MB", "of eager",
]  # fmt: skip
STEP_HEADER = ["path", "shape", "dtype", "ours, s", "eager, s", "x eager", "x eager over logits"]
EMA_HEADER = ["weights", "dtype", "ours, ms", "of copy", "x _foreach_lerp_", "x a loop"]
MEMORY_HEADER = [
    "head", "dtype", "ours, MB", "gradients, MB", "product and op, MB", "eager, MB", "of eager",
    "beyond gradients, GB",
]  # fmt: skip


def tables(rows: list[Row], targets: bool = False) -> list[Table]:
    """Of one device; a table that has no line is left out."""
    if not rows:
        return []
    makers = {
        "logits": (_over_logits, LOGITS_HEADER),
        "linear": (_linear, LINEAR_HEADER),
        "kl": (_over_logits, LOGITS_HEADER),
        "step": (_step, STEP_HEADER),
        "ema": (_ema, EMA_HEADER),
    }
    found = []
    for name, (make, header) in makers.items():
        groups = _groups(r for r in rows if r["kind"] == "losses" and r["table"] == name)
        body = [line for group in groups for line in make(group)]
        found.append(Table(TITLES[name], header, body))
    memory = Table(
        "Memory of the loss from hidden states, beyond the inputs", MEMORY_HEADER, _memory(rows)
    )
    found = [table for table in (*found, memory) if table.body]
    return found if targets else [_without_targets(table) for table in found]


def _without_targets(table: Table) -> Table:
    body = [
        [dataclasses.replace(x, target=None) if isinstance(x, Figure) else x for x in line]
        for line in table.body
    ]
    return dataclasses.replace(table, body=body)


def figures(rows: list[Row]) -> list[Figure]:
    """Those with a target."""
    lines = (line for table in tables(rows, targets=True) for line in table.body)
    return [x for line in lines for x in line if isinstance(x, Figure) and x.met is not None]


def verdict(rows: list[Row]) -> str:
    found = figures(rows)
    return f"Targets met: {sum(x.met for x in found)} of {len(found)}"


def text(rows: list[Row]) -> str:
    """For a terminal."""
    parts = [f"\n{t.title}\n{cli.table(t.header, t.cells())}" for t in tables(rows, targets=True)]
    whys = absent(r for r in rows if r["kind"] != "limit")
    return "\n".join([*parts, *([""] if whys else []), *whys, "", verdict(rows)])


def absent(rows: Iterable[Row]) -> list[str]:
    """Who has no figure, and why."""
    missing = (r for r in rows if r["status"] != "ok")
    return [x for x in reasons(missing, _where) if x]


def _where(row: Row) -> str:
    return plain(f"{row['op']}, {row['shape']}, {row['dtype']}")


# ---- cells


def _groups(rows: Iterable[Row]) -> list[list[Row]]:
    """The contenders of each problem together."""
    found: dict[tuple, list[Row]] = {}
    for row in rows:
        key = (row["op"], row["dims"].get("V", 0), row["dtype"], row["shape"])
        found.setdefault(key, []).append(row)
    return [found[key] for key in sorted(found)]


def _ours(group: list[Row], ending: str = "") -> Row | None:
    """By itself, or in place."""
    names = (r for r in ok(group) if not r["peer"] and r["variant"] != EAGER)
    some = (r for r in names if not r["variant"].startswith("matmul"))
    return next((r for r in some if r["variant"].endswith(IN_PLACE) == (ending == IN_PLACE)), None)


def _ms(row: Row | None) -> float | None:
    return row["ms"][1] if row and row["ms"] else None


def _times(rival: Row | None, ours: Row | None) -> float | None:
    return ratio(_ms(rival), _ms(ours))


def _peer(group: list[Row]) -> Row | None:
    """The fastest, but for what torch.compile makes of eager."""
    return fastest(r for r in group if r["peer"] and r["variant"] != COMPILED)


def _against(peer: Row | None, ours: Row | None, target: float | None) -> str | Figure:
    if peer is None or ours is None:
        return "-"
    figure = Figure(_times(peer, ours), target)
    # its name belongs to it
    return dataclasses.replace(figure, show=lambda x: f"{number(x)} ({plain(peer['variant'])})")


def _share(row: Row | None, of: str, target: float | None) -> Figure:
    known = row is not None and row["share"] is not None and row["limit"].startswith(of)
    return Figure(100 * row["share"] if known else None, target, unit=" %")


def _memory_of(row: Row | None, of: Row | None, target: float | None, field: str) -> Figure:
    value = ratio(row and row[field], of and of[field])
    return Figure(None if value is None else 100 * value, target, most=True, unit=" %")


def _names(row: Row) -> Line:
    return [f"`{row['op']}`", plain(row["shape"]), row["dtype"]]


def _over_logits(group: list[Row]) -> list[Line]:
    fresh, placed = _ours(group), _ours(group, IN_PLACE)
    eager, compiled = find(ok(group), EAGER), find(ok(group), COMPILED)
    if fresh is None and placed is None:
        return []
    row = fresh or placed
    cpu = is_cpu(row["device"])
    aimed = row["table"] == "logits" and row["dtype"] == AIMED_DTYPE[cpu]
    on_cpu, on_gpu = aimed and cpu, aimed and not cpu
    best = placed or fresh
    return [[
        *_names(row),
        number(_ms(placed)),
        Figure(_times(eager, placed), TIMES if on_cpu else None),
        number(_ms(fresh)),
        Figure(_times(eager, fresh), TIMES_FRESH if on_cpu else None),
        number(_times(compiled, best)),
        _against(_peer(group), best, None),
        _share(best, "copy", OF_COPY if on_gpu else None),
        *(number(x and x["peak_mb"]) for x in (placed, fresh, eager)),
        *(_memory_of(x, eager, OF_MEMORY if on_cpu else None, "peak_mb") for x in (placed, fresh)),
    ]]  # fmt: skip


def _linear(group: list[Row]) -> list[Line]:
    ours = _ours(group)
    if ours is None:
        return []
    eager, compiled = find(ok(group), EAGER), find(ok(group), COMPILED)
    product = fastest(r for r in group if r["variant"].startswith("matmul"))
    cpu = is_cpu(ours["device"])
    return [[
        *_names(ours),
        number(_ms(ours)),
        Figure(_times(eager, ours), TIMES_LINEAR if cpu else None),
        number(_times(product, ours)),
        number(_times(compiled, ours)),
        _against(_peer(group), ours, None if cpu else TIMES_OTHERS),
        _share(ours, "gemm", None if cpu else OF_GEMM),
        *(number(x and x["peak_mb"]) for x in (ours, eager)),
        _memory_of(ours, eager, None, "peak_mb"),
    ]]  # fmt: skip


def _step(group: list[Row]) -> list[Line]:
    """A line for each path from hidden states to the loss."""
    named = {tuple(r["variant"].split(", ")): r for r in ok(group)}
    first = named.get(("logits", EAGER))
    lines = []
    for path in dict.fromkeys(path for path, _ in named):
        ours = next((r for (p, who), r in named.items() if p == path and who != EAGER), None)
        eager = named.get((path, EAGER))
        if ours is None:
            continue
        aimed = TIMES_STEP if is_cpu(ours["device"]) else None
        lines.append([
            path, plain(ours["shape"]), ours["dtype"], number(_ms(ours) / 1e3),
            number(_ms(eager) / 1e3) if eager else "-", Figure(_times(eager, ours)),
            Figure(_times(first, ours), aimed),
        ])  # fmt: skip
    return lines


def _ema(group: list[Row]) -> list[Line]:
    ours = _ours(group)
    if ours is None:
        return []
    rivals = [r for r in ok(group) if r["peer"]]
    target = None if is_cpu(ours["device"]) else OF_COPY_EMA
    return [[
        plain(ours["shape"]), ours["dtype"], number(_ms(ours)), _share(ours, "copy", target),
        *(number(_times(r, ours)) for r in rivals),
    ]]  # fmt: skip


def _memory(rows: list[Row]) -> list[Line]:
    lines = []
    for group in _groups(r for r in rows if r["kind"] == "losses memory"):
        ours, eager = _ours(group), find(ok(group), EAGER)
        if ours is None:
            continue
        product = next((r for r in ok(group) if r["variant"].startswith("matmul")), None)
        cpu = is_cpu(ours["device"])
        beyond = (ours["mb"] - ours["gradients_mb"]) * 2**20 / 1e9
        # not of few tokens, whose gradients rule
        aimed = cpu and ours["dims"]["N"] >= 4096
        lines.append([
            plain(ours["shape"]), ours["dtype"], number(ours["mb"]), number(ours["gradients_mb"]),
            number(product and product["mb"]), number(eager and eager["mb"]),
            _memory_of(ours, eager, OF_MEMORY_LINEAR if aimed else None, "mb"),
            Figure(beyond, None if cpu else MEMORY_GB, most=True),
        ])  # fmt: skip
    return lines


def summary(rows: list[Row]) -> str:
    """One line: targets, and the best shares of the limits."""
    parts = [verdict(rows).lower(), *(_best(rows, x) for x in ("logits", "linear", "ema"))]
    return f"losses: {'; '.join(filter(None, parts))}"


def _best(rows: list[Row], table: str) -> str:
    some = [r for r in rows if r["kind"] == "losses" and r["table"] == table]
    ours = [r for r in ok(some) if not r["peer"] and r["variant"] != EAGER and r["share"]]
    if not ours:
        return ""
    best = max(ours, key=lambda r: r["share"])
    return f"{best['op']} {percent(best['share'])} of {best['limit'].split()[0]}"
