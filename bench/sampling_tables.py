"""The rows of ``bench sampling`` as tables, each target beside its figure."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from bench import cli
from bench.logits import FLAT
from bench.tables import find
from bench.text import Row, is_cpu, number, ok, percent, plain, ratio, reasons

HUGGING_FACE, LOGSUMEXP = "Hugging Face path", "yardstick: two logsumexp (no draw)"
# on a GPU
RIVALS = {
    "eager": 10.0,
    "Hugging Face path, torch.compile": 3.0,
    "FlashInfer (tokens only)": 2.0,
}
# times that of the Hugging Face path, by filters; another for one row
TARGETS = {"no filter": (100.0, 60.0), "top-p 0.9": (150.0, 150.0)}
TIMES_LOGSUMEXP = 6.0
MB_A_THREAD = 1.0
# share of the copy bandwidth, for at least so many logits, and microseconds of one row
OF_COPY, LARGE, GRAPH_US = {"no filter": 0.85, "top-p 0.9": 0.60}, 16_000_000, 10.0
MAIN_DTYPE = {True: "float32", False: "bfloat16"}


@dataclass(frozen=True)
class Figure:
    """A value beside what it should be at least, or at most."""

    value: float | None
    target: float | None = None
    most: bool = False
    unit: str = ""
    show: Callable = number

    @property
    def met(self) -> bool | None:
        if self.target is None or self.value is None:
            return None
        return self.value < self.target if self.most else self.value >= self.target

    def __str__(self) -> str:
        text = self.show(self.value) + (self.unit if self.value is not None else "")
        if self.met is None:
            return text
        return f"{text} ({'met' if self.met else 'NOT met'}: {self.target:g}{self.unit})"


Line = list[str | Figure]


@dataclass(frozen=True)
class Table:
    title: str
    header: list[str]
    body: list[Line]

    def cells(self) -> list[list[str]]:
        return [list(map(str, line)) for line in self.body]


def tables(rows: list[Row]) -> list[Table]:
    """Of one device; a table that has no line is left out."""
    timed = [r for r in rows if r["kind"] == "sampling"]
    cpu = bool(rows) and is_cpu(rows[0]["device"])
    make = _cpu_line if cpu else _gpu_line
    header = CPU_HEADER if cpu else GPU_HEADER
    usual = MAIN_DTYPE[cpu]

    def lines(chosen: Iterable[list[Row]]) -> list[Line]:
        return [line for group in chosen if (line := make(group))]

    groups = _groups(timed)
    main = [g for g in groups if g[0]["filters"] in TARGETS and g[0]["dtype"] == usual]
    others = [g for g in groups if g not in main]
    again = [g for g in main if g[0]["repeated"]]
    main = [g for g in main if g not in again]
    plain_rows = [g for g in main if g[0]["filters"] == "no filter"]
    flat = [g for g in main if g[0]["filters"] != "no filter" and g[0]["logits"] == FLAT]
    worst = _worst([g for g in main if g not in plain_rows and g not in flat])
    again = {x: [g for g in again if g[0]["filters"] == x] for x in TARGETS}
    found = [
        Table("No filter", header, lines(plain_rows)),
        Table("Top-p 0.9, of two kinds of rows the slower one", header, lines(worst)),
        Table(f"Top-p 0.9, flat rows: {FLAT}", header, lines(flat)),
        *(
            Table(f"The same inputs again and again, {x}", header, lines(_worst(some)))
            for x, some in again.items()
        ),
        Table("Other filters and dtypes", header, lines(others)),
        Table("Memory beyond the inputs", MEMORY_HEADER, _memory(rows)),
    ]
    return [table for table in found if table.body]


def figures(rows: list[Row]) -> list[Figure]:
    """Those with a target."""
    return [
        x
        for table in tables(rows)
        for line in table.body
        for x in line
        if isinstance(x, Figure) and x.met is not None
    ]


def verdict(rows: list[Row]) -> str:
    found = figures(rows)
    return f"Targets met: {sum(x.met for x in found)} of {len(found)}"


def text(rows: list[Row]) -> str:
    """For a terminal."""
    parts = [f"\n{t.title}\n{cli.table(t.header, t.cells())}" for t in tables(rows)]
    whys = absent(rows)
    return "\n".join([*parts, *([""] if whys else []), *whys, "", verdict(rows)])


def absent(rows: list[Row]) -> list[str]:
    """Who has no figure, and why."""
    missing = (r for r in rows if r["kind"] != "limit" and r["status"] != "ok")
    return [x for x in reasons(missing, _where) if x]


def _where(row: Row) -> str:
    return plain(f"{row['shape']}, {row['dtype']}, {row['filters']}, {row['logits']}")


# ---- cells


def _groups(rows: list[Row]) -> list[list[Row]]:
    """The contenders of each problem together, by vocabulary and rows."""
    found: dict[tuple, list[Row]] = {}
    for row in rows:
        key = (*_shape(row), row["filters"], row["logits"], row["dtype"], row["repeated"])
        found.setdefault(key, []).append(row)
    return [found[key] for key in sorted(found)]


def _shape(row: Row) -> tuple[int, int]:
    return row["dims"]["V"], row["dims"]["B"]


def _ours(group: list[Row]) -> Row | None:
    """What the op chooses by itself comes first; on a GPU eager is a rival."""
    return next((r for r in ok(group) if not r["peer"]), None)


def _worst(groups: list[list[Row]]) -> list[list[Row]]:
    """Of each shape the rows on which ours gains least over the Hugging Face path."""
    by_shape: dict[tuple, list[list[Row]]] = {}
    for group in groups:
        if _ours(group):
            by_shape.setdefault(_shape(group[0]), []).append(group)
    return [min(some, key=lambda g: _times(g, HUGGING_FACE) or 0) for some in by_shape.values()]


def _ms(row: Row | None) -> float | None:
    return row["ms"][1] if row and row["ms"] else None


def _times(group: list[Row], rival: str) -> float | None:
    return ratio(_ms(find(ok(group), rival)), _ms(_ours(group)))


# ---- lines

CPU_HEADER = [
    "V", "rows", "logits", "ours, ms", "Hugging Face, ms", "x ours",
    "two logsumexp, ms", "x ours", "of read",
]  # fmt: skip
GPU_HEADER = [
    "V", "rows", "logits", "ours, us", "in a graph, us", "of copy",
    "x eager", "x torch.compile", "x FlashInfer", "x logsumexp",
]  # fmt: skip
MEMORY_HEADER = ["V", "rows", "logits", "filter", "threads", "MB a thread"]


def _names(row: Row) -> Line:
    """What is not said by the title of a table stands behind the logits."""
    usual = row["filters"] in TARGETS and row["dtype"] == MAIN_DTYPE[is_cpu(row["device"])]
    kind = row["logits"] if usual else f"{row['logits']}, {row['filters']}, {row['dtype']}"
    return [number(row["dims"]["V"]), number(row["dims"]["B"]), kind]


def _aimed(row: Row) -> bool:
    return (
        row["filters"] in TARGETS
        and row["dtype"] == MAIN_DTYPE[is_cpu(row["device"])]
        and (row["logits"] != FLAT or row["filters"] == "no filter")
    )


def _cpu_line(group: list[Row]) -> Line | None:
    ours = _ours(group)
    if ours is None:
        return None
    aimed = _aimed(ours)
    target = TARGETS[ours["filters"]][ours["dims"]["B"] == 1] if aimed else None
    return [
        *_names(ours),
        number(_ms(ours)),
        number(_ms(find(ok(group), HUGGING_FACE))),
        Figure(_times(group, HUGGING_FACE), target),
        number(_ms(find(ok(group), LOGSUMEXP))),
        Figure(_times(group, LOGSUMEXP), TIMES_LOGSUMEXP if aimed else None),
        percent(ours["share"]),
    ]


def _gpu_line(group: list[Row]) -> Line | None:
    ours = _ours(group)
    if ours is None:
        return None
    aimed, (V, B) = _aimed(ours), _shape(ours)
    graph = 1e3 * ours["graph_ms"][1] if ours.get("graph_ms") else None
    share = OF_COPY[ours["filters"]] if aimed and B * V >= LARGE else None
    return [
        *_names(ours),
        number(1e3 * _ms(ours)),
        Figure(graph, GRAPH_US if aimed and B == 1 else None, most=True),
        Figure(_of(ours["of_copy"], 100), _of(share, 100), unit=" %"),
        *(Figure(_times(group, name), x if aimed else None) for name, x in RIVALS.items()),
        Figure(_times(group, LOGSUMEXP)),
    ]


def _of(share: float | None, scale: float) -> float | None:
    return None if share is None else scale * share


def _memory(rows: list[Row]) -> list[Line]:
    found = [r for r in rows if r["kind"] == "sampling memory" and r["status"] == "ok"]
    found.sort(key=lambda r: (*_shape(r), r["filters"], r["logits"]))
    return [
        [
            number(r["dims"]["V"]), number(r["dims"]["B"]), r["logits"], r["filters"],
            number(r["threads"]), Figure(r["mb"] / r["threads"], MB_A_THREAD, most=True),
        ]
        for r in found
    ]  # fmt: skip
