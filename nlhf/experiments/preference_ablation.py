"""Which learned preference survives the shift of the policy that is trained on it?"""

import itertools
from dataclasses import dataclass

from nlhf import tabular
from nlhf.experiments import games, learned, parallel, training
from nlhf.experiments.report import Result, Settings, Table, interval

NAME = "preference-ablation"
TASKS = ("population", "mixed")
WORDS, LENGTH = 4, 2
SIZES = ("tiny", "small")
RATE = 5e-3
TAUS = (0.0, 0.02, 0.1)
LABELS = {"pairwise": "pairwise", "reward": "Bradley-Terry"}


@dataclass(frozen=True)
class Job:
    task: str
    kind: str
    size: str
    seed: int
    steps: int
    votes: int


def run(settings: Settings) -> Result:
    """Two kinds of model in two sizes, and the policies that Nash-MD-PG makes of each at each tau.

    The errors are exact means over pairs of responses, of the reference and of what it became.
    """
    seeds, steps = settings.count(3, 2), settings.count(100, 2)
    votes = settings.count(8000, 200)
    groups = list(itertools.product(TASKS, LABELS, SIZES))
    jobs = [Job(*group, settings.seed + s, steps, votes) for group in groups for s in range(seeds)]
    flat = parallel.run(outcome, jobs, NAME)
    found = {group: flat[i * seeds : (i + 1) * seeds] for i, group in enumerate(groups)}
    return Result(
        name=NAME,
        seed=settings.seed,
        settings={
            "tasks": ", ".join(TASKS),
            "words": WORDS,
            "length": LENGTH,
            "trunks": ", ".join(f"{s} {training.SIZES[s]}" for s in SIZES),
            "seeds": seeds,
            "steps": steps,
            "learning rate": RATE,
            "votes": votes,
            "algorithm": "nash_md_pg",
        },
        tables=[_table(task, found) for task in TASKS],
        plot=lambda figure: _plot(figure, found),
        meaning=_meaning(found),
    )


def outcome(job: Job) -> dict[float, dict[str, float]]:
    """By tau, the columns of the table: means over the prompts."""
    game = games.make(job.task, words=WORDS, length=LENGTH)
    ref = training.reference(game, job.seed, steps=100)
    start = training.policy_logprobs(ref, game)
    data = learned.votes(game, ref, job.votes, job.seed)
    fitted = learned.model(game, job.kind, data, size=job.size, seed=job.seed)
    opinion = learned.table(game, fitted)
    believed = learned.matrices(opinion)
    measures = {}
    for tau in TAUS:
        chosen = {"tau": tau, "steps": job.steps, "seed": job.seed, "learning_rate": RATE}
        trained = training.train(game, ref, opinion, **chosen)
        policy = training.policy_logprobs(trained.model, game)
        truth = tabular.MatrixGame(game.matrices, start.exp(), tau)
        values = {
            "error on SFT": learned.error(believed, game.matrices, start, start),
            "error on the policy": learned.error(believed, game.matrices, policy, policy),
            "error, policy against SFT": learned.error(believed, game.matrices, policy, start),
            "win rate against SFT, learned": learned.win_rate(believed, policy, start),
            "win rate against SFT, true": learned.win_rate(game.matrices, policy, start),
            "true exploitability": tabular.exploitability(truth, policy, 0),
            "KL to SFT": tabular.kl(policy, start),
        }
        measures[tau] = {name: value.mean().item() for name, value in values.items()}
    return measures


def _table(task: str, found: dict) -> Table:
    columns = list(next(iter(found.values()))[0][TAUS[0]])
    rows = [
        [LABELS[kind], size, tau, *(interval([o[tau][c] for o in outcomes]) for c in columns)]
        for (where, kind, size), outcomes in found.items()
        if where == task
        for tau in TAUS
    ]
    title = f"{task}: error is the mean of |P - P*|, exact, before and after the shift"
    return Table(title, ["preference", "trunk", "tau", *columns], rows)


def _plot(figure, found: dict) -> None:
    figure.set_size_inches(12, 5)
    axes = figure.subplots(1, len(TASKS), sharey=True, squeeze=False)[0]
    for axis, task in zip(axes, TASKS, strict=True):
        for (where, kind, size), outcomes in found.items():
            if where != task:
                continue
            means = [
                {c: interval([o[tau][c] for o in outcomes]) for c in outcomes[0][tau]}
                for tau in TAUS
            ]
            colour = "C0" if kind == "pairwise" else "C1"
            style = "-" if size == SIZES[-1] else "--"
            for name, marker in (("learned", "^"), ("true", "o")):
                rates = [m[f"win rate against SFT, {name}"] for m in means]
                axis.errorbar(
                    range(len(TAUS)),
                    [r.mean for r in rates],
                    yerr=[r.half for r in rates],
                    fmt=marker + style,
                    color=colour,
                    alpha=1.0 if name == "true" else 0.4,
                    capsize=2,
                    label=f"{LABELS[kind]}, {size}: {name}",
                )
        axis.set_xticks(range(len(TAUS)), [f"{tau:g}" for tau in TAUS])
        axis.set(xlabel="tau", title=task)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("win rate against SFT")
    axes[-1].legend(fontsize=7)


def _meaning(found: dict) -> str:
    lines = []
    for task in TASKS:
        for kind, label in LABELS.items():
            outcomes = [o for group, os in found.items() if group[:2] == (task, kind) for o in os]
            one = {
                tau: {c: interval([o[tau][c] for o in outcomes]) for c in outcomes[0][tau]}
                for tau in TAUS
            }
            best = max(TAUS, key=lambda tau: one[tau]["win rate against SFT, true"].mean)
            lines.append(
                f"On {task} the error of the {label} model goes from "
                f"{one[0.0]['error on SFT']} on the reference to "
                f"{one[0.0]['error, policy against SFT']} on the policy at tau = 0, which believes "
                f"to win {one[0.0]['win rate against SFT, learned']} and wins "
                f"{one[0.0]['win rate against SFT, true']}; the true win rate is highest at "
                f"tau = {best:g} ({one[best]['win rate against SFT, true']}, both trunks together)."
            )
    return " ".join(lines)
