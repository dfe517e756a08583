"""Models against each other: win rates, cycles among them, and the equilibrium over the models.

Legend: K models, N prompts that all of them answered.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from nlhf import preference, tabular
from nlhf.progress import track

TAU = 0.01
FEW = 30


@dataclass(frozen=True)
class Wins:
    """P(row > column) of K models on N prompts."""

    names: list[str]
    per_prompt: Tensor
    """(K, K, N) float64: [i, j] + [j, i] is exactly 1, and [i, i] is 1/2"""
    position_bias: tuple[float, float] | None = None
    """how much above 1/2 the response that stands first wins, with the half-width of its 95 %
    interval; None: the preference is antisymmetric by construction"""

    @property
    def matrix(self) -> Tensor:
        """(K, K) float64, the means over the prompts; matrix + matrix^T is exactly 1."""
        return _antisymmetric(self.per_prompt.mean(-1))

    @property
    def half(self) -> Tensor:
        """(K, K) half-widths of the 95 % intervals: normal approximation over the prompts."""
        upper = _estimate(self.per_prompt)[1].triu(1)
        return upper + upper.T

    @property
    def mean(self) -> list[tuple[float, float]]:
        """Of each model, the win rate against the others, with the half-width of its interval."""
        others = (self.per_prompt.sum(1) - 0.5) / (len(self.names) - 1)
        means, halves = _estimate(others)
        return list(zip(means.tolist(), halves.tolist(), strict=True))


def _estimate(values: Tensor) -> tuple[Tensor, Tensor]:
    """Means over the last dimension, and half-widths of their 95 % intervals; NaN for one."""
    N = values.shape[-1]
    means = values.mean(-1)
    half = 1.96 * values.std(-1) / math.sqrt(N) if N > 1 else torch.full_like(means, math.nan)
    return means, half


def _antisymmetric(matrix: Tensor) -> Tensor:
    """What lies above the diagonal of (..., K, K), mirrored: x + (1 - x) is 1 in floating point."""
    upper = torch.ones_like(matrix).triu(1).bool()
    return torch.where(upper, matrix, torch.where(upper.mT, 1 - matrix.mT, 0.5))


def is_antisymmetric(judge: preference.Preference) -> bool:
    """Whether P(a > b) + P(b > a) = 1 by construction: our own models, and no other callable."""
    while isinstance(judge, preference.Checked | preference.JoinPrompt):
        judge = judge.preference
    return isinstance(judge, preference.PreferenceModel)


def win_matrix(
    judge: preference.Preference,
    prompts: Sequence[str],
    completions: dict[str, Sequence[str]],
    *,
    batch_size: int = 64,
    progress: bool = False,
) -> Wins:
    """Every pair of models on every prompt.

    A pair is asked in both orders, a and b, and gets (P(a, b) + 1 - P(b, a)) / 2, unless the
    preference is antisymmetric by construction. So the result always is, to the last bit.

    Args:
        judge: a preference, which may return a list, an array or a tensor.
        prompts: N texts.
        completions: N texts of each of the K models, by name.
        batch_size: pairs that the preference is given at once.

    Raises:
        ValueError: fewer than two models, no prompts, other lengths, or answers that are not
            probabilities.
    """
    names, N = list(completions), len(prompts)
    if len(names) < 2 or N < 1:
        raise ValueError(
            f"win_matrix: needs two models and one prompt at least, got {len(names)} and {N}"
        )
    for name, texts in completions.items():
        if len(texts) != N:
            raise ValueError(
                f"win_matrix: {name} has {len(texts)} completions, for {N} prompts; give one each"
            )
    both = not is_antisymmetric(judge)
    judge = preference.as_preference(judge)

    def ask(first: str, second: str) -> Tensor:
        sides = prompts, completions[first], completions[second]
        pieces = [
            judge(*(list(side[start : start + batch_size]) for side in sides)).double()
            for start in range(0, N, batch_size)
        ]
        return torch.cat(pieces)

    wins = torch.full((len(names), len(names), N), 0.5, dtype=torch.float64)
    firsts = []
    pairs = list(itertools.combinations(range(len(names)), 2))
    for i, j in track(pairs, "pairs of models", len(pairs), show=progress):
        p = ask(names[i], names[j])
        if both:
            q = ask(names[j], names[i])
            firsts.append((p + q) / 2 - 0.5)
            p = (p + 1 - q) / 2
        wins[i, j], wins[j, i] = p, 1 - p
    if not both:
        return Wins(names, wins)
    mean, half = _estimate(torch.stack(firsts).mean(0))
    return Wins(names, wins, (mean.item(), half.item()))


@dataclass(frozen=True)
class Triple:
    """Models a > b > c > a."""

    models: tuple[int, int, int]
    """a, b and c; a is the first of the three in the table"""
    wins: tuple[float, float, float]
    """P(a > b), P(b > c), P(c > a): all above 1/2"""
    certain: bool
    """whether the 95 % intervals of all three lie above 1/2. A cycle needs all three, so this is a
    test of the cycle at that level"""


def intransitive_triples(matrix: Tensor, half: Tensor) -> list[Triple]:
    """Every cycle of three in win rates (K, K), half-widths (K, K): each once, the clearest first.

    A win rate of exactly 1/2 makes no cycle, and an unknown (NaN) half-width none certain.
    """
    found = []
    for i, j, k in itertools.combinations(range(len(matrix)), 3):
        for cycle in ((i, j, k), (i, k, j)):
            pairs = list(zip(cycle, (*cycle[1:], cycle[0]), strict=True))
            wins = tuple(matrix[pair].item() for pair in pairs)
            if min(wins) > 0.5:
                certain = all(matrix[pair] - half[pair] > 0.5 for pair in pairs)
                found.append(Triple(cycle, wins, certain))
    return sorted(found, key=lambda triple: (not triple.certain, -min(triple.wins)))


@dataclass(frozen=True)
class Equilibrium:
    """Of the game in which each player picks one of the K models."""

    tau: float
    weights: list[float]
    low: list[float]
    """lower ends of the weights' 95 % intervals; NaN with a single prompt"""
    high: list[float]
    exploitability: list[float]
    """of each model alone, in the original game: the best model's win rate against it, minus 1/2"""
    exploitability_mixture: float
    """of the equilibrium, in the original game too"""


def equilibrium(
    wins: Wins, *, tau: float = TAU, resamples: int = 1000, seed: int = 0
) -> Equilibrium:
    """The regularised equilibrium over the models (Munos et al. 2023, section 3), exactly solved.

    The reference is uniform over the models, so a small ``tau`` comes near the original game and
    still picks one equilibrium where that has several. Intervals of the weights are percentiles of
    a bootstrap: ``resamples`` times N prompts drawn with replacement, all pairs of a prompt
    together. Deterministic given ``seed``.
    """
    game = tabular.MatrixGame(wins.matrix, tau=tau, names=wins.names)
    policy = tabular.solve(game).policy
    N = wins.per_prompt.shape[-1]
    low = high = torch.full_like(policy, math.nan)
    if N > 1:
        generator = torch.Generator().manual_seed(seed)
        draws = torch.randint(N, (resamples, N), generator=generator)
        counts = torch.zeros(resamples, N, dtype=torch.float64)
        counts.scatter_add_(1, draws, torch.ones_like(draws, dtype=torch.float64))
        means = torch.einsum("rn,ijn->rij", counts, wins.per_prompt) / N
        resampled = tabular.MatrixGame(_antisymmetric(means.clamp(0, 1)), tau=tau)
        weights = tabular.solve(resampled).policy.exp()
        low, high = weights.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0)
    return Equilibrium(
        tau,
        policy.exp().tolist(),
        low.tolist(),
        high.tolist(),
        tabular.pure_exploitability(game).tolist(),
        tabular.exploitability(game, policy, tau=0).item(),
    )


def report(wins: Wins, triples: list[Triple], balance: Equilibrium) -> str:
    """Everything as Markdown."""
    names = [cell(name) for name in wins.names]
    matrix, half, N = wins.matrix, wins.half, wins.per_prompt.shape[-1]
    lines = [
        f"P(row > column) on {N:,} prompt{'s' * (N > 1)}, with 95 % intervals (normal "
        "approximation over the prompts, which are the same for all models); bold: the interval "
        "is clear of 1/2.",
        "",
        f"| | {' | '.join(names)} |",
        "|---" * (len(names) + 1) + "|",
    ]
    for i, name in enumerate(names):
        row = [_win(matrix[i, j].item(), half[i, j].item()) for j in range(len(names))]
        row[i] = ""
        lines.append(f"| **{name}** | {' | '.join(row)} |")
    lines += [
        "",
        "| model | mean win rate | weight in the equilibrium | 95 % interval | exploitability |",
        "|---|---|---|---|---|",
    ]
    order = sorted(range(len(names)), key=lambda i: -wins.mean[i][0])
    for i in order:
        mean, width = wins.mean[i]
        interval = f"{balance.low[i]:.3f} to {balance.high[i]:.3f}" if N > 1 else "unknown"
        lines.append(
            f"| {names[i]} | {_pm(mean, width)} | {balance.weights[i]:.3f} | {interval} "
            f"| {balance.exploitability[i]:.3f} |"
        )
    lines += [
        f"| the equilibrium itself | | | | {balance.exploitability_mixture:.3f} |",
        "",
        f"The equilibrium is that of the game over these models with tau = {balance.tau:g} and a "
        "uniform reference; intervals of its weights are from a bootstrap over the prompts. The "
        "exploitability is how far above 1/2 the best model wins against it, without "
        "regularisation.",
        "",
        *_cycles(names, triples),
    ]
    if wins.position_bias is None:
        lines.append("The preference has no position bias: it is antisymmetric by construction.")
    else:
        lines.append(
            "Every pair was asked in both orders and averaged; the response that stood first was "
            f"preferred with {_pm(wins.position_bias[0] + 0.5, wins.position_bias[1])} on average."
        )
    if N < FEW:
        lines += ["", f"With {N} prompt{'s' * (N > 1)} these intervals are rough: use more."]
    return "\n".join(lines) + "\n"


def _cycles(names: list[str], triples: list[Triple]) -> list[str]:
    if not triples:
        return ["No three models are intransitive.", ""]
    certain = sum(triple.certain for triple in triples)
    lines = [
        f"Intransitive triples: {len(triples)}, of which {certain} certain at 95 % (all three "
        "intervals are clear of 1/2):",
        "",
    ]
    for triple in triples[:20]:
        a, b, c = (names[i] for i in triple.models)
        wins = ", ".join(f"{p:.3f}" for p in triple.wins)
        sure = "certain at 95 %" if triple.certain else "within noise"
        lines.append(f"- {a} > {b} > {c} > {a} ({wins}): {sure}")
    if len(triples) > 20:
        lines.append(f"- and {len(triples) - 20} more")
    return [*lines, ""]


def _pm(mean: float, half: float) -> str:
    return f"{mean:.3f}" if math.isnan(half) else f"{mean:.3f} ± {half:.3f}"


def _win(mean: float, half: float) -> str:
    clear = abs(mean - 0.5) > half
    return f"**{_pm(mean, half)}**" if clear else _pm(mean, half)


def cell(text: str) -> str:
    """A text that cannot break a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")


def as_dict(wins: Wins, triples: list[Triple], balance: Equilibrium) -> dict:
    """Everything for JSON: what is unknown (NaN) becomes None."""
    return _known(
        {
            "names": wins.names,
            "prompts": wins.per_prompt.shape[-1],
            "wins": wins.matrix.tolist(),
            "half_widths": wins.half.tolist(),
            "mean_win_rates": wins.mean,
            "position_bias": wins.position_bias,
            "intransitive_triples": [
                asdict(triple) | {"models": [wins.names[i] for i in triple.models]}
                for triple in triples
            ],
            "equilibrium": asdict(balance),
        }
    )


def _known(value):
    if isinstance(value, dict):
        return {key: _known(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_known(inner) for inner in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def heatmap(wins: Wins, path: Path) -> None:
    """The win rates as a picture: blue where the row wins, red where it loses."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    K = len(wins.names)
    matrix, half = wins.matrix.clone(), wins.half
    matrix.fill_diagonal_(math.nan)
    names = [name if len(name) <= 24 else f"{name[:11]}…{name[-12:]}" for name in wins.names]
    # a cell has room for two lines of ten characters
    size = 0.95 * K
    figure, axis = pyplot.subplots(figsize=(size + 3.2, size + 2.0), layout="constrained")
    colours = pyplot.get_cmap("RdBu").with_extremes(bad="0.92")
    image = axis.imshow(matrix.numpy(), cmap=colours, vmin=0, vmax=1)
    for i, j in itertools.permutations(range(K), 2):
        text = f"{matrix[i, j]:.2f}"
        if not math.isnan(half[i, j]):
            text += f"\n±{half[i, j]:.2f}"
        dark = abs(matrix[i, j] - 0.5) > 0.3
        axis.text(
            j, i, text, ha="center", va="center", fontsize=10, color="white" if dark else "black"
        )
    axis.set_xticks(range(K), names, rotation=40, ha="left", rotation_mode="anchor")
    axis.set_yticks(range(K), names)
    axis.tick_params(top=True, labeltop=True, bottom=False, labelbottom=False, length=0)
    axis.spines[:].set_visible(False)
    axis.set_xlabel("P(row > column)")
    figure.colorbar(image, ax=axis, shrink=0.8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
