"""A preference over finitely many actions, with a reference policy: the regularised matrix game.

Legend: Y actions, leading dimensions ``...`` are contexts (prompts). Policies are log-probabilities
(..., Y) float64 everywhere, since at a small tau the probabilities underflow.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nlhf.tabular.policies import kl

ANTISYMMETRY = 1e-12
_SUM = 1e-6
# entries of a matrix that are looked at together: 8 MiB in float64
_BLOCK = 2**20


def row_blocks(matrix: Tensor) -> Iterator[slice]:
    """Slices of the rows of (..., Y, Y) such that a block is small, whatever the matrix is."""
    Y = matrix.shape[-1]
    contexts = max(1, matrix.numel() // (Y * Y))
    rows = max(1, _BLOCK // (contexts * Y))
    return (slice(start, min(start + rows, Y)) for start in range(0, Y, rows))


@dataclass(frozen=True, eq=False)
class MatrixGame:
    """The game of Munos et al. 2023, section 3: P_tau(pi > pi') on a preference matrix.

    P_tau(pi > pi') = P(pi > pi') - tau KL(pi, ref) + tau KL(pi', ref) in every context.

    Args:
        preference: (..., Y, Y), P[i, j] = P(i > j) in [0, 1], with P + P^T = 1 to 1e-12. Anything
            that torch reads; float64 on its device is taken as it is, without a copy.
        ref: probabilities (Y,) or (..., Y), above 0, sum 1 (to 1e-6; they are divided by their
            sum); default uniform.
        tau: strength of the regularisation, at least 0 and finite. 0 is the original game, which
            has no unique equilibrium: functions that need more than 0 say so.
        names: of the Y actions; default their numbers.

    Raises:
        ValueError: names the first entry that is wrong, its value and its mirror.
    """

    preference: Tensor
    ref: Tensor | None = None
    tau: float = 0.1
    names: Sequence[str] | None = None
    log_ref: Tensor = field(init=False, repr=False)
    asymmetry: float = field(init=False, repr=False)
    """The largest abs(P + P^T - 1), at most 1e-12."""

    def __post_init__(self):
        preference = torch.as_tensor(self.preference, dtype=torch.float64).detach()
        if preference.dim() < 2 or preference.shape[-1] != preference.shape[-2]:
            raise ValueError(
                f"MatrixGame: preference must be (..., Y, Y), got shape {tuple(preference.shape)}"
            )
        if preference.numel() == 0:
            raise ValueError(
                "MatrixGame: preference needs at least one context and one action, got shape "
                f"{tuple(preference.shape)}"
            )
        names = self.names
        if names is None:
            names = range(preference.shape[-1])
        names = tuple(str(name) for name in names)
        if len(names) != preference.shape[-1]:
            raise ValueError(
                f"MatrixGame: names must be {preference.shape[-1]}, one per action, "
                f"got {len(names)}"
            )
        self._set(
            preference=preference,
            asymmetry=_check_antisymmetric(preference),
            tau=_checked_tau(self.tau),
            names=names,
        )
        self._set_ref(self.ref)

    def _set(self, **values: Any) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def _set_ref(self, ref: Any) -> None:
        shape = self.preference.shape[:-1]
        if ref is None:
            ref = torch.full(shape[-1:], 1 / shape[-1], dtype=torch.float64)
        ref = torch.as_tensor(ref, dtype=torch.float64, device=self.device).detach()
        if ref.shape not in (shape, shape[-1:]):
            raise ValueError(
                f"MatrixGame: ref must have one probability for each of the {shape[-1]} actions, "
                f"shape {' or '.join(sorted({str(tuple(s)) for s in (shape, shape[-1:])}))}, "
                f"got {tuple(ref.shape)}"
            )
        bad = ~((ref > 0) & (ref <= 1 + _SUM))
        if bad.any():
            where = tuple(bad.nonzero()[0].tolist())
            raise ValueError(
                f"MatrixGame: ref must be above 0 and at most 1, got {ref[where].item()!r} "
                f"at {_place(where)}"
            )
        total = ref.sum(-1, keepdim=True)
        off = (total - 1).abs().amax().item()
        if off > _SUM:
            raise ValueError(
                f"MatrixGame: ref must sum to 1, it is off by {off:.3g}; divide it by its sum"
            )
        ref = (ref / total).expand(shape)
        self._set(ref=ref, log_ref=ref.log())

    @property
    def actions(self) -> int:
        """Y."""
        return self.preference.shape[-1]

    @property
    def device(self) -> torch.device:
        return self.preference.device

    def replace(self, *, tau: float | None = None, ref: Any = None) -> "MatrixGame":
        """The same preference, which is neither copied nor checked again, with other settings."""
        other = object.__new__(MatrixGame)
        other._set(**vars(self))
        if tau is not None:
            other._set(tau=_checked_tau(tau))
        if ref is not None:
            other._set_ref(ref)
        return other

    def positive_tau(self, caller: str) -> float:
        """tau, where a function needs a unique equilibrium; ValueError in its name if it is 0."""
        if not self.tau > 0:
            raise ValueError(f"{caller}: tau must be above 0, got {self.tau!r}")
        return self.tau

    def wins(self, log_policy: Tensor) -> Tensor:
        """P(y > policy) for every action y: (..., Y)."""
        return self.product(self.checked(log_policy, "wins").exp())

    def product(self, vector: Tensor) -> Tensor:
        """P vector, (..., Y) to (..., Y)."""
        if self.preference.dim() == 2:
            return vector @ self.preference.mT
        # not matmul: it would copy the matrices if the vectors have dimensions in front of them
        return torch.einsum("...ij,...j->...i", self.preference, vector)

    def checked(self, log_policy: Tensor, caller: str) -> Tensor:
        """The policy, or ValueError if its dtype or number of actions is wrong."""
        if log_policy.dtype != torch.float64 or log_policy.shape[-1:] != (self.actions,):
            raise ValueError(
                f"{caller}: a policy must be float64 log-probabilities (..., {self.actions}), "
                f"got {log_policy.dtype} {tuple(log_policy.shape)}"
            )
        return log_policy

    def value(self, log_policy: Tensor, log_other: Tensor, tau: float | None = None) -> Tensor:
        """P_tau(policy > other) per context (Munos et al. 2023, eq. 2); tau None: the game's."""
        tau = self.tau if tau is None else _checked_tau(tau)
        won = (log_policy.exp() * self.wins(log_other)).sum(-1)
        if tau == 0:
            return won
        return won - tau * kl(log_policy, self.log_ref) + tau * kl(log_other, self.log_ref)


def _checked_tau(tau: Any) -> float:
    if not (isinstance(tau, int | float) and 0 <= tau < math.inf):
        raise ValueError(f"MatrixGame: tau must be a number, at least 0 and finite, got {tau!r}")
    return float(tau)


def _place(where: tuple[int, ...]) -> str:
    return f"[{', '.join(map(str, where))}]"


def _check_antisymmetric(preference: Tensor) -> float:
    """The largest abs(P + P^T - 1), in blocks of rows; ValueError if it is no preference."""
    worst = 0.0
    for rows in row_blocks(preference):
        block = preference[..., rows, :]
        mirror = preference[..., :, rows].mT
        bad = ~((block >= 0) & (block <= 1))
        if bad.any():
            where, value, _ = _first(bad, block, mirror, rows)
            raise ValueError(
                f"MatrixGame: preference{where} must be a probability in [0, 1], got {value!r}"
            )
        # exact but for 2^-55 where a sum of P and its mirror would be rounded
        off = ((block - 0.5) + (mirror - 0.5)).abs_()
        # a mirror that is no number is no probability either
        bad = ~(off <= ANTISYMMETRY)
        if bad.any():
            where, value, other = _first(bad, block, mirror, rows)
            raise ValueError(
                f"MatrixGame: preference{where} = {value!r} and its mirror {other!r} must sum to 1 "
                f"to {ANTISYMMETRY}; make it antisymmetric, as by (1 + P - P^T) / 2 in float64"
            )
        worst = max(worst, off.amax().item())
    return worst


def _first(bad: Tensor, block: Tensor, mirror: Tensor, rows: slice) -> tuple[str, float, float]:
    at = tuple(bad.nonzero()[0].tolist())
    where = (*at[:-2], at[-2] + rows.start, at[-1])
    return _place(where), block[at].item(), mirror[at].item()
