"""The images of docs/benchmarks.md: first their data, known by a digest, then the drawing."""

import hashlib
import json
import math
from pathlib import Path

from bench.tables import MODES, by_setting, competes, problem, rank, seconds, size, step_order
from bench.text import Row, devices, number, ok

NAMES = ("ops", "sampling", "step", "scaling", "memory")
PHASES = ("rollout", "scoring", "update")
# Okabe and Ito: told apart without seeing red or green; shapes tell them apart without any colour
_COLOURS = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A5C00", "#882255",
)  # fmt: skip
_MARKERS = "oDs^vPX<>*hd"
_PHASE_COLOURS = ("#0072B2", "#E69F00", "#BBBBBB")
_DPI = 110
_KEY = "nlhf-data"


def data(rows: list[Row]) -> dict[str, dict]:
    """Per image that has something to show: everything in it, as JSON."""
    found = {
        "ops": _ops([r for r in rows if r["kind"] == "op"]),
        "sampling": _sampling([r for r in rows if r["kind"] == "sampling"]),
        "step": _steps([r for r in rows if r["kind"] == "step"]),
        "scaling": _curves([r for r in rows if r["kind"] == "scaling" and r["y"] != "MB"]),
        "memory": _curves([r for r in rows if r["kind"] == "scaling" and r["y"] == "MB"]),
    }
    return {n: {"image": n, "panels": panels} for n, panels in found.items() if panels}


def digest(image: dict) -> str:
    return hashlib.sha256(json.dumps(image, sort_keys=True).encode()).hexdigest()


def digest_of(path: Path) -> str | None:
    """Of the data that an image was drawn from; "" if it does not say, None without an image."""
    from PIL import Image, UnidentifiedImageError

    if not path.exists():
        return None
    try:
        with Image.open(path) as image:
            return image.info.get(_KEY, "")
    except UnidentifiedImageError:
        return ""


def draw(image: dict, path: Path) -> None:
    import matplotlib

    drawn = {"ops": _draw_ops, "sampling": _draw_ops, "step": _draw_steps}
    figure = drawn.get(image["image"], _draw_curves)
    with matplotlib.rc_context(
        {"font.size": 9, "axes.titlesize": 10, "axes.titlelocation": "left"}
    ):
        figure(image["panels"]).savefig(
            path, dpi=_DPI, metadata={_KEY: digest(image), "Software": None}
        )


def _all_devices(rows: list[Row]) -> list[str]:
    return devices(rows, cpu=True) + devices(rows, cpu=False)


# ---- what is in them


def _ops(rows: list[Row]) -> list[dict]:
    """A panel for each op and device, in its most complete mode; a line for each shape."""
    panels = []
    for device in _all_devices(rows):
        for op in sorted({r["op"] for r in rows}):
            these = [r for r in ok(rows) if r["op"] == op and r["device"] == device]
            modes = [m for m in MODES if any(r["mode"] == m for r in these)]
            if not modes:
                continue
            these = [r for r in these if r["mode"] == modes[-1]]
            panels.append(_panel(these, f"{op}, {MODES[modes[-1]]}", device))
    return panels


def _panel(rows: list[Row], title: str, device: str) -> dict:
    """Every shape a line, every variant a point on it."""
    rows = sorted(rows, key=size)
    shapes = list(dict.fromkeys(map(problem, rows)))
    return {
        "title": title,
        "device": device,
        "shapes": [", ".join(s) for s in shapes],
        "points": [
            [shapes.index(problem(r)), r["variant"], r["ms"][1]] for r in sorted(rows, key=rank)
        ],
    }


def _sampling(rows: list[Row]) -> list[dict]:
    """A panel for each filter and kind of rows that was measured at several shapes."""
    panels = []
    for device in _all_devices(rows):
        for filters, kind in dict.fromkeys((r["filters"], r["logits"]) for r in rows):
            these = [r for r in ok(rows) if r["device"] == device and not r["repeated"]]
            these = [r for r in these if (r["filters"], r["logits"]) == (filters, kind)]
            panel = _panel(these, f"mixture_sample, {filters}, {kind}", device)
            if len(panel["shapes"]) > 2:
                panels.append(panel)
    return panels


def _steps(rows: list[Row]) -> list[dict]:
    """A panel for each setting with something to compare; a bar for each variant."""
    panels = []
    for device in _all_devices(rows):
        for title, group in by_setting([r for r in ok(rows) if r["device"] == device]).items():
            bars = [
                # the median step is not quite the sum of its phases' medians; limits have no step
                [
                    r["variant"],
                    [seconds(r, p) or 0.0 for p in PHASES],
                    seconds(r, "step") or seconds(r, "rollout"),
                ]
                for r in sorted(group, key=step_order)
            ]
            if sum(map(competes, group)) > 1:
                panels.append({"title": title, "device": device, "bars": bars})
    return panels


def _curves(rows: list[Row]) -> list[dict]:
    panels = []
    for device in _all_devices(rows):
        these = [r for r in rows if r["device"] == device]
        for title in sorted({r["title"] for r in these}):
            curves = [r for r in these if r["title"] == title]
            panels.append({
                "title": title, "device": device, "x": curves[0]["x"], "y": curves[0]["y"],
                "curves": [[r["variant"], r["xs"], r["ys"], r["exponent"]] for r in curves],
            })  # fmt: skip
    return panels


# ---- how they look


def _looks(variants: list[str]) -> dict[str, dict]:
    """A colour and a shape for each, the same in all panels of an image."""
    return {
        v: {"color": _COLOURS[i % len(_COLOURS)], "marker": _MARKERS[i % len(_MARKERS)]}
        for i, v in enumerate(v for v in variants if v != "eager")
    } | {"eager": {"color": "black", "marker": "|"}}


def _stacked(lines: list[int]):
    """Panels one below the other, each as high as it has lines."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 0.5 + sum(0.65 + 0.28 * n for n in lines)), layout="constrained")
    axes = figure.subplots(len(lines), 1, squeeze=False, height_ratios=[n + 0.5 for n in lines])
    return figure, list(axes.flat)


def _tidy(axis, grid: str) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis=grid, alpha=0.3, linewidth=0.6)
    axis.set_axisbelow(True)


def _plain_ticks(axis, values: list[float]) -> None:
    """10 and 1,000 rather than powers of ten, and more of them where the axis is short."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    decades = math.log10(max(values) / min(values))
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2 else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.12g}"))
    axis.set_minor_formatter(NullFormatter())


def _draw_ops(panels: list[dict]):
    variants = list(dict.fromkeys(p[1] for panel in panels for p in panel["points"]))
    looks = _looks(variants)
    figure, axes = _stacked([len(panel["shapes"]) for panel in panels])
    # one scale for all ops of a device
    spans: dict[str, list[float]] = {}
    for panel in panels:
        spans.setdefault(panel["device"], []).extend(p[2] for p in panel["points"])
    handles = {}
    for axis, panel in zip(axes, panels, strict=True):
        # ours come first, so they are drawn last; eager's bar stands out behind a dot
        for at, variant, ms in reversed(panel["points"]):
            look = {"markersize": 12 if variant == "eager" else 7, "markeredgewidth": 1.5}
            (handles[variant],) = axis.plot(ms, at, linestyle="", **look, **looks[variant])
        axis.set_yticks(range(len(panel["shapes"])), panel["shapes"])
        axis.set_ylim(len(panel["shapes"]) - 0.4, -0.6)
        span = spans[panel["device"]]
        axis.set_xscale("log")
        axis.set_xlim(min(span) / 1.3, max(span) * 1.3)
        _plain_ticks(axis.xaxis, span)
        axis.set_title(f"{panel['title']}; {panel['device']}")
        _tidy(axis, "both")
    axes[-1].set_xlabel("ms, median (log scale); left is faster")
    # a fourth column of such long names would not fit
    figure.legend(
        [handles[v] for v in variants], variants, loc="outside upper left", ncols=3,
        frameon=False, fontsize="small",
    )  # fmt: skip
    return figure


def _draw_steps(panels: list[dict]):
    figure, axes = _stacked([len(panel["bars"]) for panel in panels])
    for axis, panel in zip(axes, panels, strict=True):
        names = [name for name, _, _ in panel["bars"]]
        left = [0.0] * len(names)
        for k, (phase, colour) in enumerate(
            zip(PHASES, ("#0072B2", "#E69F00", "#BBBBBB"), strict=True)
        ):
            widths = [spent[k] for _, spent, _ in panel["bars"]]
            axis.barh(range(len(names)), widths, left=left, color=colour, height=0.65, label=phase)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        for at, (end, (*_, whole)) in enumerate(zip(left, panel["bars"], strict=True)):
            axis.annotate(
                f"{number(whole)} s", (end, at), xytext=(4, 0), textcoords="offset points",
                va="center",
            )  # fmt: skip
        axis.set_yticks(range(len(names)), names)
        axis.invert_yaxis()
        axis.set_xlim(0, 1.1 * max(left))
        axis.set_title(f"{panel['title']}; {panel['device']}")
        _tidy(axis, "x")
    axes[-1].set_xlabel("seconds")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=3, frameon=False)
    return figure


def _draw_curves(panels: list[dict]):
    from matplotlib.figure import Figure

    looks = _looks(sorted({c[0] for panel in panels for c in panel["curves"]}))
    columns = min(2, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.6 * columns, 3.2 * lines), layout="constrained")
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axis, panel in zip(axes, panels, strict=False):
        for variant, xs, ys, exponent in panel["curves"]:
            power = "" if exponent is None else f": {panel['x']}^{number(exponent)}"
            axis.plot(xs, ys, markersize=5, linewidth=1.3, label=variant + power, **looks[variant])
        axis.set_xscale("log")
        axis.set_yscale("log")
        _plain_ticks(axis.xaxis, [x for curve in panel["curves"] for x in curve[1]])
        _plain_ticks(axis.yaxis, [y for curve in panel["curves"] for y in curve[2]])
        axis.set_xlabel(panel["x"])
        axis.set_ylabel(panel["y"])
        axis.set_title(f"{panel['title']}\n{panel['device']}")
        axis.legend(frameon=False, fontsize=8)
        _tidy(axis, "both")
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    return figure
