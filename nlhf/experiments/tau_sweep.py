"""What does tau buy in quality and cost in KL, and does a run notice by itself that it fails?"""

import functools
from collections import Counter
from dataclasses import dataclass

from nlhf import diagnosis, tabular
from nlhf.config import Config
from nlhf.experiments import games, learned, parallel, training
from nlhf.experiments.report import Result, Settings, Table, interval

NAME = "tau-sweep"
TASK, WORDS, LENGTH = "population", 4, 2
RATE = 3e-3
TAUS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.3, 1.0, 10.0)
RATES = (1e-7, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
FAILING = (
    ("self-play without regularisation", {"tau": 0.0, "mixture_coef": 0.0, "learning_rate": 1e-2}),
    ("self-play, hardly regularised", {"tau": 0.02, "mixture_coef": 0.0, "learning_rate": 1e-2}),
)


@dataclass(frozen=True)
class Job:
    changes: tuple[tuple[str, float], ...]
    seed: int
    steps: int


@dataclass(frozen=True)
class Outcome:
    """Means over the prompts, exact; ``findings``: the names and steps of what the run noticed."""

    measures: dict[str, float]
    findings: dict[str, int]


def run(settings: Settings) -> Result:
    """Nash-MD-PG with the true preference, over tau, and over learning rates."""
    seeds, steps = settings.count(3, 2), settings.count(200, 4)
    rows = {f"tau {tau:g}": {"tau": tau} for tau in TAUS}
    rows |= {f"learning rate {rate:g}": {"learning_rate": rate} for rate in RATES}
    rows |= dict(FAILING)
    jobs = [
        Job(tuple(changes.items()), settings.seed + s, steps)
        for changes in rows.values()
        for s in range(seeds)
    ]
    flat = parallel.run(outcome, jobs, NAME)
    found = {name: flat[i * seeds : (i + 1) * seeds] for i, name in enumerate(rows)}
    by_tau = {name: found[name] for name in rows if name.startswith("tau")}
    return Result(
        name=NAME,
        seed=settings.seed,
        settings={
            "game": TASK,
            "words": WORDS,
            "length": LENGTH,
            "algorithm": "nash_md_pg",
            "mixture_coef": Config.mixture_coef,
            "seeds a row": seeds,
            "steps": steps,
        },
        tables=[
            _table(f"Over tau, learning rate {RATE:g}", by_tau),
            _table(
                f"Over learning rates at tau {Config.tau:g}, and self-play",
                {name: found[name] for name in rows if name not in by_tau},
            ),
        ],
        plot=lambda figure: _plot(figure, by_tau),
        meaning=_meaning(found),
    )


@functools.cache
def _start(seed: int):
    game = games.make(TASK, words=WORDS, length=LENGTH)
    return game, training.reference(game, seed, steps=100)


def outcome(job: Job) -> Outcome:
    """Train once, measure against the truth, and ask for the findings of the run."""
    game, ref = _start(job.seed)
    chosen = {"learning_rate": RATE, "steps": job.steps, "seed": job.seed} | dict(job.changes)
    trained = training.train(game, ref, game, **chosen)
    before, after = (training.policy_logprobs(m, game) for m in (ref, trained.model))
    truth = tabular.MatrixGame(game.matrices, before.exp(), trained.learner.parts.config.tau)
    entropy = -(after.exp() * after).sum(-1)
    measures = {
        "true win rate against SFT": learned.win_rate(game.matrices, after, before),
        "KL to SFT": tabular.kl(after, before),
        "exploitability": tabular.exploitability(truth, after, 0),
        "entropy, nats": entropy,
    }
    noticed = diagnosis.history(trained.metrics, trained.learner.parts.config)
    return Outcome(
        {name: value.mean().item() for name, value in measures.items()},
        {finding.name: finding.step for finding in noticed},
    )


def _table(title: str, found: dict[str, list[Outcome]]) -> Table:
    columns = list(next(iter(found.values()))[0].measures)
    rows = [
        [name, *(interval([o.measures[c] for o in outcomes]) for c in columns), _noticed(outcomes)]
        for name, outcomes in found.items()
    ]
    return Table(title, ["run", *columns, "noticed by the run (first step)"], rows)


def _noticed(outcomes: list[Outcome]) -> str:
    counts = Counter(name for o in outcomes for name in o.findings)
    parts = []
    for name, count in counts.most_common():
        first = min(o.findings[name] for o in outcomes if name in o.findings)
        parts.append(f"{name} in {count} of {len(outcomes)} ({first})")
    return "; ".join(parts) or "nothing"


def _plot(figure, by_tau: dict[str, list[Outcome]]) -> None:
    left, right = figure.subplots(1, 2)
    x, y = "KL to SFT", "true win rate against SFT"
    for tau, outcomes in zip(TAUS, by_tau.values(), strict=True):
        across, up = ([o.measures[name] for o in outcomes] for name in (x, y))
        (dots,) = left.plot(across, up, ".", alpha=0.6)
        kl, wins = interval(across), interval(up)
        left.errorbar(
            kl.mean, wins.mean, yerr=wins.half, fmt="o", capsize=2, color=dots.get_color()
        )
        place = (kl.mean, wins.mean)
        left.annotate(f"{tau:g}", place, (-6, 6), textcoords="offset points", ha="right")
    left.set(xlabel="KL to the reference, nats", ylabel=y, title="quality against KL, by tau")
    left.set_xscale("log")
    worst = [interval([o.measures["exploitability"] for o in os]) for os in by_tau.values()]
    ticks = range(len(TAUS))
    right.errorbar(
        ticks, [w.mean for w in worst], yerr=[w.half for w in worst], fmt="o-", capsize=2
    )
    right.set_xticks(ticks, [f"{tau:g}" for tau in TAUS])
    right.set(xlabel="tau", ylabel="exploitability", title="what a best response wins beyond 1/2")
    for axis in (left, right):
        axis.grid(alpha=0.3)


def _meaning(found: dict[str, list[Outcome]]) -> str:
    by_tau = {tau: found[f"tau {tau:g}"] for tau in TAUS}
    means = {
        tau: {c: interval([o.measures[c] for o in os]) for c in os[0].measures}
        for tau, os in by_tau.items()
    }
    wins = max(TAUS, key=lambda tau: means[tau]["true win rate against SFT"].mean)
    safest = min(TAUS, key=lambda tau: means[tau]["exploitability"].mean)
    lines = [
        f"The reference is beaten most often at tau = {wins:g} "
        f"({means[wins]['true win rate against SFT']}, KL {means[wins]['KL to SFT']}), and the "
        f"least exploitable policy is that of tau = {safest:g} "
        f"({means[safest]['exploitability']} beyond 1/2 for a best response)."
    ]
    for name in ("collapse", "no progress", "oscillation"):
        where = [
            row for row, os in found.items() if sum(name in o.findings for o in os) * 2 > len(os)
        ]
        shown = ", ".join(where) if where else "no row"
        lines.append(f"Most runs notice {name} at: {shown}.")
    return " ".join(lines)
