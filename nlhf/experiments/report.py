"""What an experiment found: tables, a plot, what it means, and how to repeat it."""

import json
import math
import platform
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import nlhf_kernels as nk

RESULTS = "results.json"
# Student's t at 0.975 for 1, 2, ... degrees of freedom
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160)
_T += (2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056)
_T += (2.052, 2.048, 2.045, 2.042)
INTERVALS = "± is the half-width of a 95 % interval of the mean (Student's t)."


@dataclass(frozen=True)
class Settings:
    """What ``nlhf reproduce`` hands to an experiment.

    ``scale`` multiplies the numbers of steps, seeds and grid points; 1 is the default size.
    """

    seed: int = 0
    scale: float = 1.0
    output: Path = Path("runs/reproduce")

    def __post_init__(self):
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise ValueError(f"reproduce: scale must be above 0 and finite, got {self.scale!r}")
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"reproduce: seed must be a 64-bit integer, got {self.seed!r}")

    def count(self, full: int, least: int = 1) -> int:
        """``full`` at scale 1, and never under ``least``."""
        return max(least, round(full * self.scale))


@dataclass(frozen=True)
class Interval:
    """A mean and the half-width of its 95 % interval; NaN for a single value."""

    mean: float
    half: float

    def __str__(self) -> str:
        return _pm(self.mean, self.half)


@dataclass(frozen=True)
class Table:
    """``rows`` hold strings, numbers and ``Interval``; None is an empty cell."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


@dataclass(frozen=True)
class Result:
    """``plot`` draws on the empty matplotlib figure that it is given, and may resize it.

    ``settings`` is what the numbers depend on, shown as it is; ``meaning`` is prose.
    """

    name: str
    seed: int
    settings: dict
    tables: Sequence[Table]
    plot: Callable[[Any], None]
    meaning: str
    notes: Sequence[str] = field(default=(INTERVALS,))


def interval(values: Tensor | Sequence[float]) -> Interval:
    """Mean of (n,) independent values and its interval: t of n - 1 degrees of freedom * s / sqrt n.

    Normal beyond 30 degrees of freedom.
    """
    values = torch.as_tensor(values, dtype=torch.float64)
    n = len(values)
    if n < 2:
        return Interval(values.mean().item(), math.nan)
    t = _T[n - 2] if n - 2 < len(_T) else 1.96
    return Interval(values.mean().item(), t * values.std().item() / math.sqrt(n))


def number(value: float) -> str:
    """Three significant digits."""
    if not math.isfinite(value):
        return str(value)
    if 0 < abs(value) < 1e-12:
        # what rounding leaves of 0
        return "< 1e-12"
    small = value != 0 and abs(value) < 1e-3
    return f"{value:.1e}" if small or abs(value) >= 1e5 else f"{value:.3g}"


def _pm(mean: float, half: float) -> str:
    """Two digits of the half-width, and as many places of the mean."""
    if half < 1e-12 or not math.isfinite(half + mean):
        return number(mean)
    places = max(0, 1 - math.floor(math.log10(half)))
    form = f".{places}f" if places <= 5 else ".1e"
    return f"{mean:{form}} ± {half:{form}}"


def markdown(table: Table) -> str:
    """One table, its title above it."""
    rows = [table.columns, ["---"] * len(table.columns), *table.rows]
    lines = ["| " + " | ".join(map(_cell, row)) + " |" for row in rows]
    return "\n".join([f"**{table.title}**", "", *lines]) + "\n"


def _cell(value) -> str:
    if value is None:
        return ""
    text = number(value) if isinstance(value, float) else str(value)
    return text.replace("|", "\\|")


def claim(output: Path, name: str, settings: Settings) -> None:
    """ValueError if the folder holds anything but the report that is about to be made again."""
    if not output.exists():
        return
    if not output.is_dir():
        raise ValueError(f"reproduce: {output} is a file; name a folder with --output")
    found = {path.name for path in output.iterdir()}
    if not found:
        return
    ours = {"report.md", RESULTS, f"{name}.png"}
    try:
        before = json.loads((output / RESULTS).read_text(encoding="utf-8"))
        same = (before["name"], before["seed"], before["scale"])
    except (OSError, ValueError, KeyError, TypeError):
        same = None
    if found - ours or same != (name, settings.seed, settings.scale):
        raise ValueError(
            f"reproduce: {output} holds something else than this experiment's report at seed "
            f"{settings.seed} and scale {settings.scale:g}; name another folder with --output"
        )


def versions() -> dict[str, str]:
    """Of what the numbers may depend on."""
    import transformers

    return {
        "nlhf": nk.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def command(name: str, settings: Settings) -> str:
    """The line that makes the same report again."""
    parts = ["nlhf", "reproduce", name, "--seed", str(settings.seed)]
    return shlex.join([*parts, "--scale", f"{settings.scale:g}", "--output", str(settings.output)])


def text(result: Result, settings: Settings, seconds: float) -> str:
    """The report as Markdown, the plot as a link beside it."""
    shown = ", ".join(f"{key} {value}" for key, value in result.settings.items())
    used = ", ".join(f"{name} {version}" for name, version in versions().items())
    return "\n".join(
        [
            f"# {result.name}",
            "",
            f"Seed {result.seed}, scale {settings.scale:g}: {shown}.",
            "",
            *(markdown(table) for table in result.tables),
            *result.notes,
            "",
            f"![{result.name}]({result.name}.png)",
            "",
            result.meaning.strip(),
            "",
            f"Took {seconds:.0f} s with {torch.get_num_threads()} threads; {used}. Once more:",
            "",
            f"    {command(result.name, settings)}",
            "",
        ]
    )


def write(result: Result, settings: Settings, seconds: float) -> str:
    """report.md, results.json and the plot into ``settings.output``; returns the report's text."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    output = settings.output
    output.mkdir(parents=True, exist_ok=True)
    figure = pyplot.figure(figsize=(10, 5), layout="constrained")
    result.plot(figure)
    figure.savefig(output / f"{result.name}.png", dpi=120)
    pyplot.close(figure)
    report = text(result, settings, seconds)
    (output / "report.md").write_text(report, encoding="utf-8")
    data = {
        "name": result.name,
        "seed": result.seed,
        "scale": settings.scale,
        "settings": result.settings,
        "command": command(result.name, settings),
        "seconds": round(seconds, 1),
        "versions": versions(),
        "tables": [
            {
                "title": t.title,
                "columns": list(t.columns),
                "rows": [list(map(_plain, r)) for r in t.rows],
            }
            for t in result.tables
        ],
        "meaning": result.meaning.strip(),
    }
    (output / RESULTS).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    return report


def _plain(value):
    """For JSON, which has no NaN: a number, a string, null, or {mean, half}."""
    if isinstance(value, Interval):
        return {"mean": _plain(value.mean), "half": _plain(value.half)}
    return None if isinstance(value, float) and not math.isfinite(value) else value
