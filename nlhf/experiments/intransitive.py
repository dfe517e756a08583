"""What RLHF, DPO and Nash learning make of preferences that are not transitive.

In the table exactly, at their optima, and as small transformers that are trained from samples.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import nlhf_kernels as nk
from nlhf.data import Preferences
from nlhf.experiments import games, training
from nlhf.experiments.games import END, SequenceGame
from nlhf.experiments.report import INTERVALS, Result, Settings, Table, interval, number
from nlhf.preference import PairwiseModel, PreferenceModel, RewardModel
from nlhf.preference_fit import fit
from nlhf.tabular import MatrixGame, exploitability, kl, nash_md_pg_limit, normalise, rlhf, solve

TAU, COEF = 0.03, 0.125
# the last is the control: a reward explains it
TABULAR, DEEP = ("dice", "population", "reward"), ("dice", "population")
STEPS, SEEDS, PAIRS = 150, 3, 2000
RUN = {"tau": TAU, "mixture_coef": COEF, "batch_size": 128, "learning_rate": 3e-3}
# each algorithm on the true preference, with the settings that it needs
NASH = {
    "nash_md_pg": {},
    "online_ipo": {},
    "nash_mp": {"eta": 1.0, "ema_decay": 0.9},
}
MEASURES = (
    "KL to reference",
    "exploitability at tau",
    "exploitability, original game",
    "P(policy > reference)",
)


@dataclass(frozen=True)
class Play:
    """A game with a reference: texts, and the same in a table."""

    game: SequenceGame
    ref: nn.Module
    table: MatrixGame


@training.one_thread()
def run(settings: Settings) -> Result:
    exact = {}
    for name in TABULAR:
        play = _play(name, settings.seed, settings)
        exact[name] = {who: _measures(play, policy) for who, policy in optima(play).items()}
    seeds = [settings.seed + i for i in range(settings.count(SEEDS, 2))]
    trained: dict[str, dict[str, list[Tensor]]] = {}
    duels = {}
    for name in DEEP:
        found: dict[str, list[Tensor]] = {}
        wins = []
        for seed in seeds:
            play = _play(name, seed, settings)
            policies = _policies(play, seed, settings)
            for who, policy in policies.items():
                found.setdefault(who, []).append(_measures(play, policy))
            wins.append(_duels(play, list(policies.values())))
        trained[name], duels[name] = found, torch.stack(wins)
    return Result(
        "intransitive",
        settings.seed,
        {
            "tau": TAU,
            "mixture_coef": COEF,
            "steps": settings.count(STEPS, 3),
            "seeds": len(seeds),
            "pairs for the learned models": settings.count(PAIRS, 40),
        },
        [
            Table(
                "In the table: optima, exactly (mean over prompts)",
                ("game", "policy", *MEASURES),
                [[g, who, *m.tolist()] for g, rows in exact.items() for who, m in rows.items()],
            ),
            Table(
                "Trained transformers (exact measures, mean over prompts, intervals over seeds)",
                ("game", "policy", *MEASURES),
                [
                    [g, who, *(interval(column) for column in torch.stack(m).T)]
                    for g, rows in trained.items()
                    for who, m in rows.items()
                ],
            ),
            *(_duel_table(name, list(trained[name]), wins) for name, wins in duels.items()),
        ],
        lambda figure: _plot(figure, exact, trained),
        _meaning(exact, trained),
        (INTERVALS, "All win rates are by the true preference, over all pairs of responses."),
    )


def _play(name: str, seed: int, settings: Settings) -> Play:
    game = games.make(name)
    ref = training.reference(game, seed, steps=settings.count(200, 20))
    return Play(game, ref, training.matrix_game(game, ref, TAU))


def _measures(play: Play, policy: Tensor) -> Tensor:
    """(4,) ``MEASURES``, each a mean over the prompts."""
    table = play.table
    values = (
        kl(policy, table.log_ref),
        exploitability(table, policy),
        exploitability(table, policy, 0),
        table.value(policy, table.log_ref, 0),
    )
    return torch.stack([value.mean() for value in values])


def _duels(play: Play, policies: list[Tensor]) -> Tensor:
    """(n, n): P(row > column), mean over the prompts."""
    rows = [[play.table.value(a, b, 0).mean() for b in policies] for a in policies]
    return torch.tensor(rows)


# ---- in the table


def optima(play: Play) -> dict[str, Tensor]:
    """(X, S) policies: what each method is after, and RLHF as far from the reference as Nash."""
    table = play.table
    equilibrium = solve(table).policy
    return {
        "reference": table.log_ref,
        "RLHF = DPO": rlhf(table),
        "RLHF at the equilibrium's KL": matched(rlhf(table), table.log_ref, equilibrium),
        f"Nash-MD-PG, b = {COEF}": nash_md_pg_limit(table, COEF),
        "equilibrium": equilibrium,
    }


def matched(log_policy: Tensor, log_ref: Tensor, log_other: Tensor) -> Tensor:
    """(X, S): the policy on the geometric line from ``log_ref`` to ``log_policy`` (and beyond) that
    is as far from the reference, in KL, as ``log_other``; by bisection, a prompt at a time.

    For RLHF that line is the line of all tau.
    """
    wanted = kl(log_other, log_ref)
    low, high = torch.zeros_like(wanted), torch.full_like(wanted, 64.0)
    for _ in range(60):
        middle = (low + high) / 2
        policy = normalise(log_ref + middle[..., None] * (log_policy - log_ref))
        over = kl(policy, log_ref) > wanted
        low, high = torch.where(over, low, middle), torch.where(over, middle, high)
    return policy


# ---- transformers


def _policies(play: Play, seed: int, settings: Settings) -> dict[str, Tensor]:
    """(X, S) log-probabilities of each trained policy."""
    game, ref = play.game, play.ref
    pairs = sample_pairs(play, settings.count(PAIRS, 40), seed)
    steps = settings.count(STEPS, 3)

    def trained(algorithm: str, preference: Callable, **extra) -> Tensor:
        chosen = RUN | {"seed": seed, "steps": steps, "algorithm": algorithm} | extra
        return training.policy_logprobs(training.train(game, ref, preference, **chosen).model, game)

    reward = learned(RewardModel, game, pairs, seed, "{prompt} </s> {response} </s>")
    pairwise = learned(PairwiseModel, game, pairs, seed, "{prompt} </s> {first} </s> {second} </s>")
    found = {
        "reference": play.table.log_ref,
        "rlhf, learned reward": trained("rlhf", reward),
        "dpo, the same pairs": training.policy_logprobs(dpo(play, pairs, steps, seed), game),
        "nash_md_pg, learned preference": trained("nash_md_pg", pairwise),
    }
    for name, extra in NASH.items():
        found[f"{name}, true preference"] = trained(name, game, **extra)
    return found


def sample_pairs(play: Play, count: int, seed: int) -> Preferences:
    """Pairs of responses of the reference to random prompts, the better one by one annotator."""
    generator = torch.Generator().manual_seed(seed)
    game = play.game
    x = torch.randint(len(game.prompts), (count,), generator=generator)
    draws = torch.multinomial(play.table.log_ref.exp()[x], 2, replacement=True, generator=generator)
    p = game.matrices[x, draws[:, 0], draws[:, 1]]
    swap = torch.rand(count, generator=generator, dtype=torch.float64) >= p
    draws = torch.where(swap[:, None], draws.flip(1), draws)
    chosen, rejected = ([game.responses[i] for i in column] for column in draws.T.tolist())
    return Preferences([game.prompts[i] for i in x.tolist()], chosen, rejected, [1.0] * count)


def learned(
    kind: type[PreferenceModel], game: SequenceGame, pairs: Preferences, seed: int, template: str
) -> PreferenceModel:
    """A model on a trunk like the policy's, fitted to the pairs."""
    trunk = training.transformer(game, seed, std=0.1)
    model = kind(trunk, game.tokenizer(), template=template.replace("</s>", END), batch_size=512)
    fit(model, pairs, epochs=5, batch_size=64, lr=3e-3, seed=seed)
    return model


@training.one_thread()
def dpo(play: Play, pairs: Preferences, steps: int, seed: int, batch_size: int = 256) -> nn.Module:
    """DPO (Rafailov et al. 2023) on the pairs, anchored at the reference, by exact gradients."""
    game = play.game
    model = copy.deepcopy(play.ref).requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RUN["learning_rate"], weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    prompts, responses = ({t: i for i, t in enumerate(x)} for x in (game.prompts, game.responses))
    x = torch.tensor([prompts[text] for text in pairs.prompt])
    y = torch.tensor([responses[text] for text in pairs.chosen])
    z = torch.tensor([responses[text] for text in pairs.rejected])
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randint(len(x), (batch_size,), generator=generator)
        at, first, second = x[rows], y[rows], z[rows]
        logprobs = training.join(training.conditionals(model, game, game.prompts))
        loss = nk.pair_loss(
            logprobs[at, first],
            logprobs[at, second],
            play.table.log_ref[at, first],
            play.table.log_ref[at, second],
            torch.ones(batch_size),
            method="dno_prct",
            eta=TAU,
        ).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


# ---- what is shown


def _duel_table(name: str, names: list[str], wins: Tensor) -> Table:
    rows = [
        [who, *(None if i == j else interval(wins[:, i, j]) for j in range(len(names)))]
        for i, who in enumerate(names)
    ]
    short = [who.split(",")[0] + (" (learned)" if "learned p" in who else "") for who in names]
    return Table(f"P(row > column), {name}, trained transformers", (name, *short), rows)


def _plot(figure, exact: dict, trained: dict) -> None:
    figure.set_size_inches(12, 4.8)
    for axis, (name, rows) in zip(figure.subplots(1, len(trained)), trained.items(), strict=True):
        cells = [interval(torch.stack(m)[:, 2]) for m in rows.values()]
        labels = [who.replace(", ", "\n") for who in rows]
        colors = [
            "C7" if who == "reference" else "C3" if who.startswith(("rlhf", "dpo")) else "C0"
            for who in rows
        ]
        axis.bar(
            range(len(rows)), [c.mean for c in cells], yerr=[c.half for c in cells], color=colors
        )
        for style, who in (
            ("--", "RLHF = DPO"),
            (":", "RLHF at the equilibrium's KL"),
            ("-", "equilibrium"),
        ):
            color = "C0" if who == "equilibrium" else "C3"
            level = exact[name][who][2].item()
            axis.axhline(level, color=color, linestyle=style, linewidth=1, label=f"{who}, exactly")
        axis.set_xticks(range(len(rows)), labels, fontsize=7, rotation=30, ha="right")
        axis.set_title(f"{name}: exploitability in the original game")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3, axis="y")
        axis.legend(fontsize=8)


def _meaning(exact: dict, trained: dict) -> str:
    lines = ["Exploitability in the original game, max P(y > policy) - 1/2:", ""]
    for name, rows in exact.items():
        cells = {who: number(m[2].item()) for who, m in rows.items()}
        lines.append(f"- {name}, optima: " + ", ".join(f"{w} {x}" for w, x in cells.items()) + ".")
    for name, rows in trained.items():
        cells = {who: interval(torch.stack(m)[:, 2]) for who, m in rows.items()}
        lines.append(f"- {name}, trained: " + "; ".join(f"{w} {x}" for w, x in cells.items()) + ".")
    lines += [
        "",
        "A reward has to rank what goes around in a circle, so RLHF and DPO put their mass where "
        "one answer beats them; the equilibrium spreads it. How much that matters is a matter of "
        "the game: compare a game's rows at one KL, since at one tau RLHF goes farther from the "
        "reference than Nash does, whose gain against an equal opponent is 0. For the same reason "
        "a duel at one tau does not decide between them: RLHF may win it, and still be the more "
        "exploitable. In the control, where a reward explains every preference, RLHF loses "
        "nothing by it. What Nash learning gains in practice hangs on the preference that it is "
        "given: compare nash_md_pg with a learned and with the true one.",
    ]
    return "\n".join(lines)
