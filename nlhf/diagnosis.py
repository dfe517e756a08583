"""Failure signatures in the metrics of a run: collapse, no progress, oscillation."""

import itertools
import math
import statistics
from dataclasses import dataclass
from types import SimpleNamespace

from nlhf import algorithms
from nlhf.config import Config

# rows whose mean is the beginning of a run, and rows whose mean is its present
_START, _RECENT = 5, 5
# rows, and steps at the full learning rate in them, after which something should have moved
_WINDOW, _ENOUGH = 40, 20
# swings are sought in means over so many rows, in the last so many of these means
_SCALES, _BLOCKS = (1, 2, 4, 8), 32
# standard deviations: of a KL above 0, of another mean that has moved, of a swing beyond noise
_KL_MOVED, _MOVED, _SWING = 2.0, 3.0, 6.0
_ENTROPY_LEFT, _LENGTH_LEFT, _LENGTH_FULL = 0.1, 0.15, 0.98
# the least swing that matters: of a preference, and of the KL as a share of its mean
_LEAST_PREFERENCE, _LEAST_KL = 0.05, 0.4

_VERSUS = "preference_vs_ref"


@dataclass(frozen=True)
class Finding:
    """A failure signature: its name, the step at which it was seen, and one line of text."""

    name: str
    step: int
    text: str


def diagnose(metrics: list[dict], settings: Config | None = None) -> list[Finding]:
    """The failure signatures that the last rows of ``metrics`` show; a pure function.

    Only the first rows and a bounded number of the last ones are read, so that it may be called
    at every step. What is compared with what:

    * ``collapse``: the mean of 5 rows against the first 5. Entropy per token below a tenth; or the
      KL above 1 / (2 tau), where P - tau KL is below the reference's own 1/2 whatever P is (for
      algorithms that settle at an optimum of it), or above twice the reference's entropy; or a
      length below 0.15 of its start or at the limit.
    * ``no progress``: after 40 steps, 20 steps' worth of the highest learning rate and a fifth of
      the run, the last 40 rows do not tell the policy from the reference: the KL is within 2
      standard deviations of 0, the preference within 3 of where it began.
    * ``oscillation``: preference or KL, averaged over 1, 2, 4 or 8 rows, turned at least five
      times, each swing above 6 standard deviations and of a size that matters, and they do not die
      away.

    Sampling noise is the smaller of what the batch size gives and of what the second differences
    of the rows show (Gasser, Sroka and Jennen-Steinmetz 1986). A preference in [0, 1] has at most
    1 / (2 sqrt(B)); a mean of B log-ratios with mean k about sqrt(2 k / B), as for a small Gaussian
    shift.

    Args:
        metrics: rows of ``Learner.step`` in the order of the steps. A signature whose metric the
            rows lack, or hold as no finite number, is not looked for.
        settings: of the run; None: a batch of 32 is taken, and what needs tau, the number of steps
            or the limit of the length is left out.

    Returns:
        At most one finding of each name.
    """
    if not metrics:
        return []
    # what cannot be known is such that no comparison with it holds
    known = settings or SimpleNamespace(
        batch_size=Config.batch_size,
        eval_samples=Config.eval_samples,
        algorithm=Config.algorithm,
        steps=0,
        tau=math.nan,
        learning_rate=math.nan,
        mixture_coef=math.nan,
        max_new_tokens=math.nan,
    )
    signatures = {
        "collapse": _collapse,
        "no progress": _no_progress,
        "oscillation": _oscillation,
    }
    seen = {name: look(metrics, known) for name, look in signatures.items()}
    return [Finding(name, metrics[-1]["step"], text) for name, text in seen.items() if text]


def history(metrics: list[dict], settings: Config | None = None) -> list[Finding]:
    """What ``diagnose`` said when it was asked after every row: the first finding of each name."""
    found: dict[str, Finding] = {}
    for end in range(1, len(metrics) + 1):
        for finding in diagnose(metrics[:end], settings):
            found.setdefault(finding.name, finding)
    return list(found.values())


def _column(rows: list[dict], name: str) -> list[float]:
    return [row[name] for row in rows if math.isfinite(row.get(name, math.nan))]


def _knob(settings, name: str) -> str:
    value = getattr(settings, name)
    return name if math.isnan(value) else f"{name} (now {value:g})"


# ---- collapse


def _collapse(metrics: list[dict], settings) -> str:
    if len(metrics) < _START + _RECENT:
        return ""
    start, now = {}, {}
    for name in ("entropy", "kl", "length"):
        for rows, means in ((metrics[:_START], start), (metrics[-_RECENT:], now)):
            values = _column(rows, name)
            means[name] = statistics.fmean(values) if values else math.nan
    calm = f"raise {_knob(settings, 'tau')} or lower {_knob(settings, 'learning_rate')}"
    before, after = start["entropy"], now["entropy"]
    if before > 0 and after < _ENTROPY_LEFT * before:
        return (
            f"collapse: entropy fell from {before:.3g} to {after:.3g} nats a token, so the policy "
            f"says nearly always the same: {calm}"
        )
    kl, tau = now["kl"], settings.tau
    noise = _kl_noise(kl, settings.batch_size * _RECENT)
    if tau > 0 and _bounded(settings) and kl - _MOVED * noise > 0.5 / tau:
        return (
            f"collapse: KL ran away to {kl:.3g} nats a completion; above 1 / (2 tau) = "
            f"{0.5 / tau:.3g} no win rate is worth it: lower {_knob(settings, 'learning_rate')}, "
            "or if it is meant, lower tau"
        )
    if before > 0 and kl - _MOVED * noise > 2 * before * now["length"]:
        return (
            f"collapse: KL ran away to {kl / now['length']:.3g} nats a token, and the reference "
            f"began with an entropy of {before:.3g}: {calm}"
        )
    before, after = start["length"], now["length"]
    if before >= 2 and after < max(1.1, _LENGTH_LEFT * before) and after < before / 2:
        return f"collapse: completions shrank from {before:.3g} to {after:.3g} tokens: {calm}"
    limit = settings.max_new_tokens
    if after >= _LENGTH_FULL * limit and before < 0.75 * limit:
        return (
            f"collapse: completions grew from {before:.3g} to {after:.3g} tokens, the limit: "
            f"{calm}, or raise {_knob(settings, 'max_new_tokens')} if such lengths are wanted"
        )
    return ""


def _bounded(settings) -> bool:
    """Whether the algorithm settles at an optimum of P - tau KL to the reference, P in [0, 1]."""
    algorithm = algorithms.get(settings.algorithm)
    return algorithm.limit in ("equilibrium", "mixture", "best_response")


# ---- no progress


def _no_progress(metrics: list[dict], settings) -> str:
    waited = len(metrics) >= max(_WINDOW, settings.steps / 5)
    if not waited or _full_steps(metrics, settings) < _ENOUGH:
        return ""
    recent = metrics[-_WINDOW:]
    kl = _column(recent, "kl")
    if len(kl) < _WINDOW / 2:
        return ""
    mean = statistics.fmean(kl)
    pooled = settings.batch_size * len(kl)
    noise = max(_kl_noise(mean, pooled), _rough(kl) / math.sqrt(len(kl)))
    if mean > _KL_MOVED * noise or _preference_moved(metrics, recent, settings):
        return ""
    faster = f"raise {_knob(settings, 'learning_rate')}"
    tau = settings.tau
    # by Hoeffding's lemma no answer to any opponent is further from the reference than this
    reach = 1 / (8 * tau**2) if tau > 0 and _bounded(settings) else math.inf
    if reach < 2 * _KL_MOVED**2 / pooled:
        advice = f"lower {_knob(settings, 'tau')}: at this tau no optimum is further than that"
    elif tau != 0:
        advice = f"{faster}, then lower {_knob(settings, 'tau')}"
    else:
        advice = faster
    preference = _column(recent, "preference")
    shown = f" and preference {statistics.fmean(preference):.3f}" if preference else ""
    return (
        f"no progress: over the last {len(recent)} steps KL is {mean:.2g} nats{shown}, which "
        f"{pooled} completions do not tell from the start: {advice}, or raise "
        f"{_knob(settings, 'batch_size')}"
    )


def _full_steps(metrics: list[dict], settings) -> float:
    """Steps at the highest learning rate that add up to those of the last rows."""
    rates = _column(metrics[-10 * _WINDOW :], "learning_rate")
    # a comparison with NaN keeps the first
    highest = max([*rates, settings.learning_rate])
    return sum(rates) / highest if highest > 0 else len(metrics)


def _preference_moved(metrics: list[dict], recent: list[dict], settings) -> bool:
    start, now = _column(metrics[:_START], "preference"), _column(recent, "preference")
    if start and now:
        noise = _preference_noise(now, settings) * math.sqrt(1 / len(start) + 1 / len(now))
        if abs(statistics.fmean(now) - statistics.fmean(start)) > _MOVED * noise:
            return True
    # the same prompts and draws each time: without a change it would be the same number
    first, last = (
        next((row[_VERSUS] for row in rows if _VERSUS in row), math.nan)
        for rows in (metrics, reversed(metrics))
    )
    return abs(last - first) > _MOVED * 0.5 / math.sqrt(settings.eval_samples)


# ---- oscillation


def _oscillation(metrics: list[dict], settings) -> str:
    rows = metrics[-_SCALES[-1] * _BLOCKS :]
    for name in ("preference", "kl"):
        values = _column(rows, name)
        for scale in _SCALES:
            part = values[-scale * _BLOCKS :]
            count = len(part) // scale
            if len(part) < _BLOCKS or count < _BLOCKS // 2:
                break
            part = part[len(part) - count * scale :]
            mean = statistics.fmean(part)
            if name == "kl":
                least = _LEAST_KL * abs(mean)
                # the log-ratios of language models spread up to 1.4 times as wide
                size = statistics.fmean(map(abs, part))
                noise = min(_rough(part), 1.5 * _kl_noise(size, settings.batch_size))
            else:
                least = _LEAST_PREFERENCE
                noise = _preference_noise(part, settings)
            noise /= math.sqrt(scale)
            starts = range(0, len(part), scale)
            blocks = [statistics.fmean(part[start : start + scale]) for start in starts]
            turns = _turns(blocks, max(least, _SWING * noise))
            if _persist(turns, count):
                return _swinging(name, turns, scale, noise, settings)
    return ""


def _turns(values: list[float], threshold: float) -> list[tuple[int, float]]:
    """Turning points (index, value) between swings of more than ``threshold``, the last one open.

    A turn counts once the series has come back from it by the threshold: whatever is smaller is
    part of the swing that it interrupts.
    """
    low = high = (0, values[0])
    turns: list[tuple[int, float]] = []
    direction = 0
    for point in enumerate(values):
        if point[1] > high[1]:
            high = point
        if point[1] < low[1]:
            low = point
        if direction >= 0 and high[1] - point[1] > threshold:
            turns.append(high)
            direction, low = -1, point
        elif direction <= 0 and point[1] - low[1] > threshold:
            turns.append(low)
            direction, high = 1, point
    if direction:
        turns.append(high if direction > 0 else low)
    return turns


def _persist(turns: list[tuple[int, float]], count: int) -> bool:
    """Two periods after the first leg, the last of them not half of the first, and recent."""
    swings = [abs(b[1] - a[1]) for a, b in itertools.pairwise(turns)][1:]
    if len(swings) < 4:
        return False
    early, late = sum(swings[:2]), sum(swings[-2:])
    return late >= early / 2 and turns[-2][0] >= count / 2


def _swinging(name: str, turns: list, scale: int, noise: float, settings) -> str:
    period = 2 * scale * (turns[-1][0] - turns[1][0]) / (len(turns) - 2)
    levels = sorted(value for _, value in turns[-4:])
    label = "KL" if name == "kl" else name
    # the other limits know no mixture
    mixed = algorithms.get(settings.algorithm).limit == "mixture"
    mixture = f" or {_knob(settings, 'mixture_coef')}" if mixed else ""
    size = (levels[-1] - levels[0]) / max(noise, 1e-9)
    return (
        f"oscillation: {label} swings between {levels[0]:.3g} and {levels[-1]:.3g} about every "
        f"{period:.0f} steps, {size:.0f} standard deviations of its noise: lower "
        f"{_knob(settings, 'learning_rate')}, or raise {_knob(settings, 'tau')}{mixture}"
    )


# ---- noise


def _kl_noise(kl: float, samples: int) -> float:
    return math.sqrt(2 * max(kl, 0.0) / samples)


def _preference_noise(values: list[float], settings) -> float:
    """Of one row; rewards, which may be any number, have no bound by the batch size."""
    bound = 0.5 / math.sqrt(settings.batch_size) if 0 <= min(values) <= max(values) <= 1 else None
    return min(_rough(values), bound or math.inf)


def _rough(values: list[float]) -> float:
    """Standard deviation of the noise around any smooth curve, from second differences."""
    # a third is added: thirty rows know it no better
    bends = [a - 2 * b + c for a, b, c in zip(values, values[1:], values[2:], strict=False)]
    return 4 / 3 * math.sqrt(statistics.fmean(x * x for x in bends) / 6) if bends else 0.0
