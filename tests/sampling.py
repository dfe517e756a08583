"""What the tests of sampling share: rows of every kind, and what float32 can tell."""

import math

import torch
from torch import Tensor

from nlhf_kernels import eager
from nlhf_kernels.testing.draw import Draw, finite_maximum

INF = math.inf
# a mass that sums in float32 may miss, and roundings of its largest operand that a score may have
MASS, ROUNDINGS = 2e-6, 8


def rows(target, many: int, few: int) -> int:
    """An interpreted row costs tens of milliseconds."""
    return few if target.interpreted else many


def seeds_for(count: int, device: str) -> Tensor:
    return eager.fold_in(2024, torch.arange(count)).to(device)


def surprise(counts: Tensor, probs: Tensor, least: float = 5.0) -> float:
    """The chi-square statistic in standard deviations from its mean (Wilson and Hilferty).

    Tokens that are expected fewer than ``least`` times are counted together with others as rare.
    """
    expected, order = (probs.double() * counts.sum()).sort(descending=True, stable=True)
    counts = counts[order].double()
    assert not counts[expected == 0].any(), "a token of probability 0 was drawn"
    live = expected > 0
    counts, expected = counts[live], expected[live]
    bins = ((expected.cumsum(0) - expected) / least).long().unique(return_inverse=True)[1]
    sums = torch.zeros(2, int(bins.max()) + 1, dtype=torch.float64)
    counts, expected = sums.index_add_(1, bins, torch.stack([counts, expected]))
    free = len(expected) - 1
    chi2 = float(((counts - expected) ** 2 / expected).sum())
    spread = 2 / (9 * free)
    return ((chi2 / free) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)


# ---- rows of every kind


def _one(kind: str, V: int, generator: torch.Generator) -> Tensor:
    x = torch.randn(V, generator=generator)
    if kind == "peaked":
        return 4 * x
    if kind == "equal":
        return torch.zeros(V)
    if kind == "ties":
        # sums of these are exact, so that a tie in one precision is one in all
        return (2 * x).round()
    if kind == "dominant":
        x[V // 3] += 30
    if kind == "infinities":
        out = torch.rand(V, generator=generator) < 0.3
        # not every token of a row
        out[-1] = False
        x = (3 * x).masked_fill(out, -INF)
    return x


KINDS = ("flat", "peaked", "equal", "ties", "dominant", "infinities")


def models(kinds: tuple[str, ...], V: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Policy and reference (len(kinds), V), a row of each kind."""
    generator = torch.Generator().manual_seed(seed)
    policy, ref = ([_one(kind, V, generator) for kind in kinds] for _ in range(2))
    return torch.stack(policy), torch.stack(ref)


# ---- what float32 can tell


class Ranked:
    """A row of scores in float64 as top-p sees it: in order, and what top-k left of it."""

    def __init__(self, scores: Tensor, top_k: int):
        self.scores = scores.sort(descending=True, stable=True).values
        self.left = min(top_k or len(scores), len(scores))
        self.mass = self.scores[: self.left].softmax(0)
        self.reached = self.mass.cumsum(0)

    def count(self, top_p: float) -> int:
        """How many it takes to reach ``top_p``."""
        if top_p >= 1:
            return self.left
        return min(int((self.reached < top_p).sum()) + 1, self.left)

    def disputed(self, top_p: float) -> bool:
        """Whether sums in float32 may end at another token, and that matters."""
        if top_p >= 1:
            return False
        first, last = self.count(top_p - MASS), self.count(min(top_p + MASS, 1 - 1e-12))
        return float(self.mass[first:last].sum()) > 2 * MASS

    def swapped(self, count: int, gap: float) -> bool:
        """Whether rounding may change who is the last of ``count``, and that matters."""
        if not 0 < count < len(self.scores):
            return False
        apart = float(self.scores[count - 1] - self.scores[count])
        return 0 < apart <= gap and float(self.scores.softmax(0)[count]) > MASS


def settle(policy: Tensor, ref: Tensor | None, settings: dict, move: bool = False) -> tuple:
    """(which rows (B,), their top_p (B,)): what any exact sampler in float32 must keep.

    ``settings`` are those of the op, its filters scalars or (B,). Rows are left out whose kept set
    hangs on less than float32 can tell. ``move``: where it is top_p that does, it moves into the
    middle of the token that it meets; the mass of that must then be enough.
    """
    filters = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
    plain = {name: x for name, x in settings.items() if name not in filters}
    draw = Draw(policy, ref, **plain)
    asked = [torch.as_tensor(settings.get(x, off)).expand(len(policy)).tolist()
             for x, off in filters.items()]  # fmt: skip
    sizes = sum(map(finite_maximum, draw.models)) / draw.divisor[:, 0]
    gaps = ROUNDINGS * torch.finfo(draw.dtype).eps * sizes
    settled, moved = [], []
    for scores, bad, gap, k, p, least in zip(
        draw.whole, draw.bad, gaps.tolist(), *asked, strict=True
    ):
        moved.append(p)
        settled.append(bool(bad))
        if bad:
            continue
        row = Ranked(scores, k)
        if move and row.disputed(p):
            at = row.count(p) - 1
            moved[-1] = float(row.reached[at] - row.mass[at] / 2)
        apart = (row.scores - math.log(least)).abs() if least else row.scores.new_ones(1)
        near = (apart > 0) & (apart <= gap)
        settled[-1] = not (
            row.disputed(moved[-1])
            or row.swapped(row.left, gap)
            or row.swapped(row.count(moved[-1]), gap)
            or near.any()
        )
    return torch.tensor(settled, dtype=torch.bool), torch.tensor(moved, dtype=draw.dtype)
