"""Which mixture with the reference should be the opponent? And can one tell before training?"""

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nlhf import tabular
from nlhf.experiments import games, learned, parallel, training
from nlhf.experiments.report import Interval, Result, Settings, Table, interval, number
from nlhf.preference_fit import evaluate

NAME = "mixture-sweep"
TASKS = ("population", "reward", "mixed")
WORDS, LENGTH = 4, 2
TAU, RATE = 0.02, 5e-3
# near 1/2 a preference changes by a quarter of a change of reward
TAU_RLHF = 4 * TAU
DECAY = 0.98
BETAS = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75)
PAPER = 0.125
RUNS: dict[str, dict] = {
    "RLHF": {"algorithm": "rlhf", "tau": TAU_RLHF},
    "SP": {"algorithm": "self_play"},
    **{f"MD {beta:g}": {"algorithm": "nash_md_pg", "mixture_coef": beta} for beta in BETAS},
    "BR": {"algorithm": "best_response"},
    "EMA": {"algorithm": "nash_ema_pg", "ema_decay": DECAY},
}
POLICIES = ("SFT", *RUNS, "EMA*")
# self-play and the best response to the reference are the ends of the family
FAMILY = {0.0: "SP", **{beta: f"MD {beta:g}" for beta in BETAS}, 1.0: "BR"}
WORST = "true exploitability"
FEATURES = ("held-out error", "cycles")


@dataclass(frozen=True)
class Job:
    task: str
    seed: int
    steps: int
    votes: int


@dataclass(frozen=True)
class Outcome:
    """Exact measures of one task with one seed, means over its prompts.

    ``wins`` (P, P): P*(column > row) of ``POLICIES``. ``measures``: columns of the second table, a
    row a policy. ``features``: what is known before training, as in ``FEATURES``.
    """

    wins: list[list[float]]
    measures: dict[str, list[float]]
    features: dict[str, float]

    def quality(self, beta: float) -> float:
        """True win rate against the worst of all opponents: what a Nash policy maximises."""
        return 0.5 - self.measures[WORST][POLICIES.index(FAMILY[beta])]

    def regret(self, beta: float) -> float:
        return max(map(self.quality, FAMILY)) - self.quality(beta)


def run(settings: Settings) -> Result:
    """Every policy on three tasks, and a rule for beta tried on the task that it has not seen."""
    seeds, steps = settings.count(4, 2), settings.count(100, 2)
    votes = settings.count(8000, 200)
    jobs = [Job(t, settings.seed + s, steps, votes) for t in TASKS for s in range(seeds)]
    flat = parallel.run(outcome, jobs, NAME)
    found = {t: flat[i * seeds : (i + 1) * seeds] for i, t in enumerate(TASKS)}
    tables = [table for task, outcomes in found.items() for table in _tables(task, outcomes)]
    rules = [rotation(found, held) for held in TASKS]
    return Result(
        name=NAME,
        seed=settings.seed,
        settings={
            "tasks": ", ".join(TASKS),
            "words": WORDS,
            "length": LENGTH,
            "seeds a task": seeds,
            "steps": steps,
            "learning rate": RATE,
            "votes": votes,
            "tau": TAU,
            "tau of RLHF": TAU_RLHF,
            "EMA decay": DECAY,
        },
        tables=[*tables, _rule_table(rules)],
        plot=lambda figure: _plot(figure, found),
        meaning=_meaning(found, rules),
    )


def outcome(job: Job) -> Outcome:
    """Train every policy of ``POLICIES`` on what was learned from votes; judge it by the truth."""
    game = games.make(job.task, words=WORDS, length=LENGTH)
    ref = training.reference(game, job.seed, steps=100)
    data = learned.votes(game, ref, job.votes, job.seed)
    fitted = {
        kind: learned.model(game, kind, data, size="small", seed=job.seed) for kind in learned.KINDS
    }
    opinion = learned.table(game, fitted["pairwise"])
    reward = learned.table(game, fitted["reward"])
    policies = {"SFT": training.policy_logprobs(ref, game)}
    for name, changes in RUNS.items():
        chosen = {"tau": TAU, "steps": job.steps, "seed": job.seed, "learning_rate": RATE} | changes
        source = reward if name == "RLHF" else opinion
        trained = training.train(game, ref, source, **chosen)
        policies[name] = training.policy_logprobs(trained.model, game)
        if name == "EMA":
            averaged = trained.learner.copies["ema"]
            policies["EMA*"] = training.policy_logprobs(averaged, game)
    fresh = learned.votes(game, ref, max(job.votes // 4, 100), job.seed + 2**32)
    error = evaluate(fitted["pairwise"], fresh)["accuracy_0"]
    features = {
        "held-out error": 1 - error,
        "cycles": learned.cyclic(opinion.matrices, policies["SFT"]).mean().item(),
    }
    return measure(game, opinion.matrices, [policies[name] for name in POLICIES], features)


def measure(
    game: games.SequenceGame, opinion: Tensor, policies: Sequence[Tensor], features: dict
) -> Outcome:
    """What the tables show of the policies, (X, S) log-probabilities, the first the reference."""
    ref = policies[0]
    truth = tabular.MatrixGame(game.matrices, ref.exp(), TAU)
    wins = [
        [learned.win_rate(game.matrices, column, row).mean().item() for column in policies]
        for row in policies
    ]
    measures = {
        "true win rate against SFT": wins[0],
        "learned win rate against SFT": [
            learned.win_rate(opinion, policy, ref).mean().item() for policy in policies
        ],
        "KL to SFT": [tabular.kl(policy, ref).mean().item() for policy in policies],
        WORST: [tabular.exploitability(truth, policy, 0).mean().item() for policy in policies],
    }
    return Outcome(wins, measures, features)


# ---- the rule


@dataclass(frozen=True)
class Rule:
    """beta is ``low`` where a feature is at most ``threshold``, else ``high``."""

    feature: str
    threshold: float
    low: float
    high: float

    def __call__(self, features: dict[str, float]) -> float:
        return self.low if features[self.feature] <= self.threshold else self.high

    def __str__(self) -> str:
        if self.low == self.high:
            return f"always {self.low:g}"
        shown = number(self.threshold)
        return f"{self.low:g} if {self.feature} <= {shown}, else {self.high:g}"


def fit_rule(outcomes: Sequence[Outcome]) -> Rule:
    """The rule of least mean regret; the first of equals, and constants come first."""
    rules = [Rule(FEATURES[0], math.inf, beta, beta) for beta in FAMILY]
    for feature in FEATURES:
        values = sorted({o.features[feature] for o in outcomes})
        middles = [(a + b) / 2 for a, b in itertools.pairwise(values)]
        for threshold, low, high in itertools.product(middles, FAMILY, FAMILY):
            if low != high:
                rules.append(Rule(feature, threshold, low, high))
    return min(rules, key=lambda rule: statistics.fmean(_regrets(outcomes, rule)))


def _regrets(outcomes: Sequence[Outcome], rule) -> list[float]:
    return [o.regret(rule(o.features)) for o in outcomes]


@dataclass(frozen=True)
class Rotation:
    """A rule that was fitted without the task ``held``, and regrets there, of it and of others."""

    held: str
    rule: Rule
    fitted: float
    regrets: dict[str, Interval]
    better: Interval
    """the regret of the paper's beta less that of the rule"""


def rotation(found: dict[str, list[Outcome]], held: str) -> Rotation:
    known = [o for task, outcomes in found.items() if task != held for o in outcomes]
    rule = fit_rule(known)
    constant = min(
        FAMILY, key=lambda beta: statistics.fmean(_regrets(known, lambda features: beta))
    )
    tried = {
        "rule": rule,
        "beta of the paper": lambda features: PAPER,
        "best constant of the two": lambda features: constant,
        "self-play": lambda features: 0.0,
    }
    regrets = {name: _regrets(found[held], choose) for name, choose in tried.items()}
    gains = [b - a for a, b in zip(regrets["rule"], regrets["beta of the paper"], strict=True)]
    return Rotation(
        held,
        rule,
        statistics.fmean(_regrets(known, rule)),
        {name: interval(values) for name, values in regrets.items()},
        interval(gains),
    )


# ---- the report


def _tables(task: str, outcomes: list[Outcome]) -> list[Table]:
    wins = torch.tensor([o.wins for o in outcomes])
    count = len(POLICIES)
    pairs = [
        [POLICIES[i], *(interval(wins[:, i, j]) if i != j else 0.5 for j in range(count))]
        for i in range(count)
    ]
    columns = list(outcomes[0].measures)
    rows = [
        [name, *(interval([o.measures[c][i] for o in outcomes]) for c in columns)]
        for i, name in enumerate(POLICIES)
    ]
    return [
        Table(f"{task}: true preference P*(column > row)", ["", *POLICIES], pairs),
        Table(f"{task}: each policy", ["policy", *columns], rows),
    ]


def _rule_table(rules: list[Rotation]) -> Table:
    columns = ["tested on", "rule fitted on the other two", "its regret there"]
    columns += [f"regret, {name}" for name in rules[0].regrets]
    columns += ["paper's regret less the rule's"]
    rows = [[r.held, str(r.rule), r.fitted, *r.regrets.values(), r.better] for r in rules]
    title = "The rule for beta; regret: worst-case true win rate lost to the best beta"
    return Table(title, columns, rows)


def _plot(figure, found: dict[str, list[Outcome]]) -> None:
    figure.set_size_inches(16, 5.4)
    axes = figure.subplots(1, len(found))
    ticks = range(len(POLICIES))
    for axis, (task, outcomes) in zip(axes, found.items(), strict=True):
        mean = torch.tensor([o.wins for o in outcomes]).mean(0)
        image = axis.imshow(mean.numpy(), cmap="RdBu_r", vmin=0.3, vmax=0.7)
        axis.set_xticks(ticks, POLICIES, rotation=90)
        axis.set_yticks(ticks, POLICIES)
        axis.set_title(f"{task}: P*(column > row), %")
        for i, j in itertools.product(ticks, ticks):
            dark = abs(mean[i, j] - 0.5) > 0.12
            text = f"{100 * mean[i, j]:.1f}"
            colour = "white" if dark else "black"
            axis.text(j, i, text, ha="center", va="center", fontsize=6, color=colour)
    figure.colorbar(image, ax=axes, shrink=0.7, extend="both")


def _meaning(found: dict[str, list[Outcome]], rules: list[Rotation]) -> str:
    lines = []
    for task, outcomes in found.items():
        quality = {beta: interval([o.quality(beta) for o in outcomes]) for beta in FAMILY}
        best = max(quality, key=lambda beta: quality[beta].mean)
        lines.append(
            f"On {task} the best opponent has beta = {best:g}: its policy wins {quality[best]} "
            f"against the worst of all opponents, that of beta = {PAPER:g} {quality[PAPER]}, "
            f"self-play {quality[0.0]}, the best response to the reference {quality[1.0]}."
        )
    better = [r.held for r in rules if r.better.mean - r.better.half > 0]
    worse = [r.held for r in rules if r.better.mean + r.better.half < 0]
    open_ = [r.held for r in rules if r.held not in better + worse]
    verdict = [
        f"{text} on {', '.join(tasks)}"
        for text, tasks in (
            ("is better", better),
            ("is worse", worse),
            ("cannot be told from it", open_),
        )
        if tasks
    ]
    lines.append(
        f"Against the fixed beta = {PAPER:g} of the paper, the rule that was fitted on the other "
        f"two tasks {'; it '.join(verdict)}."
    )
    return " ".join(lines)
