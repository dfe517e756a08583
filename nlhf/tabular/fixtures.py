"""Named games with their sources."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nlhf.names import nearest
from nlhf.tabular.matrix_game import MatrixGame, row_blocks


def game(name: str, **settings: Any) -> MatrixGame:
    """The game of ``GAMES`` of that name; ``settings`` are its own, and tau and ref.

    Raises:
        ValueError: an unknown name; the nearest is suggested.
    """
    if name not in GAMES:
        raise ValueError(
            f"game: unknown name {name!r}, known are {', '.join(GAMES)}{nearest(name, GAMES)}"
        )
    return GAMES[name](**settings)


def _antisymmetric(wins: dict[tuple[int, int], float], Y: int) -> Tensor:
    """The matrix with P(i > j) as given, and 1/2 where nothing is."""
    preference = torch.full((Y, Y), 0.5, dtype=torch.float64)
    for (i, j), p in wins.items():
        preference[i, j], preference[j, i] = p, 1 - p
    return preference


_DICE = ((2, 4, 9), (1, 6, 8), (3, 5, 7))


def dice(**settings: Any) -> MatrixGame:
    """Three dice, each of which beats the next in 5 of 9 throws (Munos et al. 2023, app. C.1)."""
    wins = {
        (i, j): sum(a > b for a in _DICE[i] for b in _DICE[j]) / 9
        for i in range(3)
        for j in range(3)
        if i < j
    }
    names = ["die " + "-".join(map(str, faces)) for faces in _DICE]
    return MatrixGame(_antisymmetric(wins, 3), names=names, **settings)


def population(**settings: Any) -> MatrixGame:
    """Three transitive annotators whose majority is cyclic, 2/3 (Munos et al. 2023, app. C.2).

    Annotator k scores the actions with the k-th numbers of (2, 4, 9), (1, 6, 8) and (3, 5, 7).
    """
    wins = {
        (i, j): sum(a > b for a, b in zip(_DICE[i], _DICE[j], strict=True)) / 3
        for i in range(3)
        for j in range(3)
        if i < j
    }
    return MatrixGame(_antisymmetric(wins, 3), names=("y1", "y2", "y3"), **settings)


def three_types(epsilon: float = 0.1, **settings: Any) -> MatrixGame:
    """Three types of annotators, each with one strict preference (Munos et al. 2023, section 3.2).

    Their shares are 1/3 - e, 1/3 + e/2, 1/3 + e/2, abs(e) <= 1/3. The equilibrium of the original
    game is (1/3 + e/2, 1/3 + e/2, 1/3 - e); the best reward flips from y1 to y2 with the sign of e.
    """
    if not abs(epsilon) <= 1 / 3:
        raise ValueError(f"three_types: epsilon must be in [-1/3, 1/3], got {epsilon!r}")
    share = (1 / 3 - epsilon, 1 / 3 + epsilon / 2, 1 / 3 + epsilon / 2)
    strict = ((1, 0), (0, 2), (2, 1))
    # all else is a tie
    wins = {pair: 0.5 + p / 2 for pair, p in zip(strict, share, strict=True)}
    return MatrixGame(_antisymmetric(wins, 3), names=("y1", "y2", "y3"), **settings)


def elo(**settings: Any) -> MatrixGame:
    """A reward, (0, log 9, log 2), fits all preferences (Munos et al. 2023, app. A)."""
    wins = {(1, 0): 9 / 10, (2, 0): 2 / 3, (2, 1): 2 / 11}
    return MatrixGame(_antisymmetric(wins, 3), names=("y1", "y2", "y3"), **settings)


def rock_paper_scissors(win: float = 1.0, **settings: Any) -> MatrixGame:
    """The winner wins with probability ``win``; the equilibrium is uniform if the reference is."""
    wins = {(1, 0): win, (2, 1): win, (0, 2): win}
    return MatrixGame(_antisymmetric(wins, 3), names=("rock", "paper", "scissors"), **settings)


def random(
    actions: int = 10, contexts: int | None = None, seed: int = 0, **settings: Any
) -> MatrixGame:
    """P(i > j), i > j, uniform in [0, 1], as in the simulations of Zhou, Fazel and Du 2025."""
    if actions < 1 or (contexts is not None and contexts < 1):
        raise ValueError(
            f"random: actions and contexts must be at least 1, got {actions!r} and {contexts!r}"
        )
    generator = torch.Generator().manual_seed(seed)
    shape = (actions, actions) if contexts is None else (contexts, actions, actions)
    preference = torch.rand(shape, generator=generator, dtype=torch.float64)
    columns = torch.arange(actions)
    for rows in row_blocks(preference):
        block, mirror = preference[..., rows, :], preference[..., :, rows].mT
        own = columns[rows, None]
        # below the diagonal stays as drawn, so nothing is read that was written here
        block.copy_(torch.where(columns > own, 1 - mirror, block).masked_fill(columns == own, 0.5))
    return MatrixGame(preference, **settings)


GAMES: dict[str, Callable[..., MatrixGame]] = {
    "dice": dice,
    "population": population,
    "three-types": three_types,
    "elo": elo,
    "rock-paper-scissors": rock_paper_scissors,
    "random": random,
}
