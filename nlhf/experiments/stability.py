"""Nash-MD-PG, online IPO, Nash-MP and Nash Prox under growing learning rates.

In the table their exact updates, whose rate is the share w of the log-policy that a step replaces
by its target, log pi <- (1 - w) log pi + w (log ref + P(y > opponent) / tau), w = learning rate *
tau; and small transformers under AdamW.
"""

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nlhf import algorithms
from nlhf.experiments import games, training
from nlhf.experiments.report import INTERVALS, Result, Settings, Table, interval
from nlhf.tabular import SOLVERS, MatrixGame, exploitability, kl

TAU, COEF = 0.05, 0.125
GAMES = ("dice", "population", "mixed")
# w, which is below 1 for all four
SHARES = (0.003, 0.01, 0.03, 0.1, 0.2, 0.4, 0.6, 0.8, 0.95)
QUERIES = 600
# KL(limit, policy) under which an exact solver has arrived
ARRIVED = 1e-6
DEEP_GAME, RATES, STEPS, SEEDS = "mixed", (1e-3, 4e-3, 1.6e-2, 6.4e-2, 0.256), 60, 3
PROX, INNER = 1.0, 10
# tabular solver, the queries of an iteration, and the settings of the deep algorithm
METHODS = {
    "nash_md_pg": ("nash_md_pg", 1, {"mixture_coef": COEF}),
    "online_ipo": ("omd", 1, {}),
    "nash_mp": ("nash_mp", 2, {"eta": PROX, "ema_decay": 0.9}),
    "nash_prox": ("nash_prox", INNER, {"eta": PROX, "inner_steps": INNER}),
}


@dataclass(frozen=True)
class Outcome:
    """Where a run ended: KL(declared limit, policy) and exploitability at tau, and at its worst.

    Of prompts in the table, (X,), of one seed for a transformer, (1,). ``diverged``: a gradient
    that is not finite, or more exploitable than the reference that it started from.
    """

    kl: Tensor
    exploitability: Tensor
    diverged: Tensor


@training.one_thread()
def run(settings: Settings) -> Result:
    exact = {}
    for name in GAMES:
        game = games.make(name)
        ref = training.reference(game, settings.seed, steps=settings.count(200, 20))
        table = training.matrix_game(game, ref, TAU)
        for method, share in itertools.product(METHODS, SHARES):
            outcome = _tabular(table, method, share, settings.count(QUERIES, 20))
            exact.setdefault((method, share), []).append(outcome)
    exact = {key: _joined(outcomes) for key, outcomes in exact.items()}
    deep = {}
    game = games.make(DEEP_GAME)
    for seed in range(settings.seed, settings.seed + settings.count(SEEDS, 2)):
        ref = training.reference(game, seed, steps=settings.count(200, 20))
        table = training.matrix_game(game, ref, TAU)
        for method, rate in itertools.product(METHODS, RATES):
            chosen = {"learning_rate": rate, "seed": seed, "steps": settings.count(STEPS, 3)}
            outcome = _deep(game, ref, table, method, chosen)
            deep.setdefault((method, rate), []).append(outcome)
    deep = {key: _joined(outcomes) for key, outcomes in deep.items()}
    return Result(
        "stability",
        settings.seed,
        {
            "tau": TAU,
            "mixture_coef": COEF,
            "eta of the proximal methods": PROX,
            "queries of the exact solvers": settings.count(QUERIES, 20),
            "steps of a transformer": settings.count(STEPS, 3),
            "seeds": settings.count(SEEDS, 2),
        },
        [
            _largest_table(exact, deep),
            _exact_table(exact),
            _deep_table(deep),
        ],
        lambda figure: _plot(figure, exact, deep),
        _meaning(exact, deep),
        (
            INTERVALS,
            f"Diverged: a gradient that is not finite, or more exploitable at tau than the "
            f"reference. Arrived: KL(limit, policy) below {ARRIVED:g}.",
        ),
    )


def _joined(outcomes: list[Outcome]) -> Outcome:
    columns = zip(*((o.kl, o.exploitability, o.diverged) for o in outcomes), strict=True)
    return Outcome(*map(torch.cat, columns))


# ---- runs


def solver_settings(method: str, tau: float, share: float) -> dict:
    """What makes an exact update replace ``share`` of the log-policy.

    nash_mp with step eta replaces eta / (1 + eta). Nash Prox does so in its inner game, whose tau
    is tau (1 + 1 / step).
    """
    if method == "nash_mp":
        return {"step": share / (1 - share)}
    if method == "nash_prox":
        inner = share / (tau * (1 + 1 / PROX))
        return {"step": PROX, "inner_steps": INNER, "inner_step": inner}
    return {"step": share / tau} | ({"mixture_coef": COEF} if method == "nash_md_pg" else {})


def _tabular(table: MatrixGame, method: str, share: float, queries: int) -> Outcome:
    solver, cost, _ = METHODS[method]
    chosen = solver_settings(method, table.tau, share)
    limit = SOLVERS[solver].target(table, **chosen)
    policies = SOLVERS[solver].run(table, **chosen)
    policy = next(itertools.islice(policies, math.ceil(queries / cost), None))
    return _outcome(table, limit, policy)


def _outcome(table: MatrixGame, limit: Tensor, policy: Tensor) -> Outcome:
    found = exploitability(table, policy)
    return Outcome(kl(limit, policy), found, found > exploitability(table, table.log_ref))


def _deep(game, ref, table: MatrixGame, method: str, chosen: dict) -> Outcome:
    limit = algorithms.LIMITS[algorithms.get(method).limit][1](table, COEF)
    chosen = {"algorithm": method, "tau": TAU} | METHODS[method][2] | chosen
    try:
        model = training.train(game, ref, game, **chosen).model
        policy = training.policy_logprobs(model, game)
    except ValueError as error:
        if "not finite" not in str(error):
            raise
        lost = torch.tensor([math.inf], dtype=torch.float64)
        return Outcome(lost, lost, torch.tensor([True]))
    end = _outcome(table, limit, policy)
    found, start = end.exploitability.mean(), exploitability(table, table.log_ref).mean()
    return Outcome(end.kl.mean()[None], found[None], (found > start)[None])


# ---- what is shown


def _arrived(outcome: Outcome) -> float:
    return (outcome.kl < ARRIVED).double().mean().item()


def _diverged(outcome: Outcome) -> float:
    return outcome.diverged.double().mean().item()


def largest(shares: dict[float, float]) -> float | None:
    """The largest rate up to which the share of failures (0 to 1) of every rate is 0."""
    stable = list(itertools.takewhile(lambda rate: shares[rate] == 0, sorted(shares)))
    return stable[-1] if stable else None


def _limits(exact: dict, deep: dict) -> dict[str, tuple]:
    """Of a method: the largest w that never diverges, that always arrives, and the AdamW rate."""
    found = {}
    for method in METHODS:
        lost = {w: _diverged(exact[method, w]) for w in SHARES}
        trained = {rate: _diverged(deep[method, rate]) for rate in RATES}
        arrived = [w for w in SHARES if _arrived(exact[method, w]) == 1]
        found[method] = (largest(lost), max(arrived, default=None), largest(trained))
    return found


def _largest_table(exact: dict, deep: dict) -> Table:
    columns = (
        "method",
        "exact: no divergence",
        "exact: arrives everywhere",
        "AdamW: no divergence",
    )
    rows = [[method, *row] for method, row in _limits(exact, deep).items()]
    title = "The largest stable rate on the grid (w in the table, learning rate for AdamW)"
    return Table(title, columns, rows)


def _exact_table(exact: dict) -> Table:
    rows = [
        [
            method,
            w,
            f"{_arrived(o):.0%}",
            f"{_diverged(o):.0%}",
            o.kl.median().item(),
            o.kl.max().item(),
            o.exploitability.mean().item(),
        ]
        for (method, w), o in exact.items()
    ]
    columns = ("method", "w", "arrived", "diverged", "KL, median", "KL, worst", "exploitability")
    count = len(next(iter(exact.values())).kl)
    return Table(f"Exact updates, {count} prompts of {len(GAMES)} games", columns, rows)


def _deep_table(deep: dict) -> Table:
    rows = [
        [method, rate, f"{_diverged(o):.0%}", interval(o.kl), interval(o.exploitability)]
        for (method, rate), o in deep.items()
    ]
    columns = ("method", "learning rate", "diverged", "KL(limit, policy)", "exploitability at tau")
    return Table(f"Transformers under AdamW, {DEEP_GAME} game", columns, rows)


def _plot(figure, exact: dict, deep: dict) -> None:
    figure.set_size_inches(13, 4.6)
    left, middle, right = figure.subplots(1, 3)
    for i, method in enumerate(METHODS):
        style = {"marker": "o", "color": f"C{i}", "label": method}
        worst = [exact[method, w].kl.max().item() for w in SHARES]
        left.plot(SHARES, [max(x, 1e-16) for x in worst], **style)
        cells = [interval(deep[method, rate].exploitability) for rate in RATES]
        middle.plot(RATES, [c.mean for c in cells], **style)
        cells = [interval(deep[method, rate].kl) for rate in RATES]
        right.plot(RATES, [c.mean for c in cells], **style)
    left.set(xlabel="w, exact updates", ylabel="KL(limit, policy), worst prompt", yscale="log")
    left.set_title("in the table, after the same queries")
    middle.set(xlabel="learning rate, AdamW", ylabel="exploitability at tau", yscale="log")
    middle.set_title("transformers")
    right.set(xlabel="learning rate, AdamW", ylabel="KL(limit, policy)", yscale="log")
    right.set_title("transformers")
    for axis in (left, middle, right):
        axis.set_xscale("log")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)


def _meaning(exact: dict, deep: dict) -> str:
    limits = _limits(exact, deep)

    def told(column: int) -> str:
        cells = ((m, row[column]) for m, row in limits.items())
        return ", ".join(f"{m} {'none' if x is None else f'{x:g}'}" for m, x in cells)

    return (
        f"Exact updates reach their limits at every prompt for w up to: {told(1)}; above it they "
        f"circle around it, since a step against the current policy turns the policy as far as it "
        f"pulls it in. They end more exploitable than the reference nowhere up to: {told(0)}. "
        f"Transformers under AdamW are no worse than their reference for learning rates up to: "
        f"{told(2)}."
    )
