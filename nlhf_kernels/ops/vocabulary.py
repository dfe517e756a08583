"""A vocabulary that several ranks share: which ids are here, and statistics of the whole.

Each rank works out its part as if it were all there is. With L_r the log-sum-exp of rank r and
w_r = exp(L_r - L) its share, entropy = sum_r w_r (entropy_r - log w_r), and likewise the KL.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from nlhf_kernels.eager.logits import vocabulary_sizes, whole_vocabulary
from nlhf_kernels.ops import common

# a token of another part: kernels find no logit for it, and its log-probability has a gradient
ELSEWHERE = -(2**62)


class Part(NamedTuple):
    group: dist.ProcessGroup
    start: int
    size: int
    # of the whole
    V: int

    def ids(self, tokens: Tensor) -> Tensor:
        """Tokens as ids of this part; those of no part stay outside of all."""
        mine = tokens - self.start
        here = (mine >= 0) & (mine < self.size)
        known = (tokens >= 0) & (tokens < self.V)
        return torch.where(here, mine, torch.where(known, ELSEWHERE, -1))


def part_of(
    op: str, group: dist.ProcessGroup | None, logits: Tensor, axis: int = -1
) -> Part | None:
    """This rank's part; ``axis`` of ``logits``, or of a weight, is its ids. A collective call."""
    if group is None:
        return None
    check_group(op, group)
    rank = dist.get_rank(group)
    sizes = vocabulary_sizes(logits.shape[axis], logits.device, group)
    return Part(group, sum(sizes[:rank]), sizes[rank], sum(sizes))


def gathered(logits: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Rows of all ids, for an op that has no gradient. A collective call."""
    return whole_vocabulary(logits.detach(), group)


def check_group(op: str, group: dist.ProcessGroup | None) -> None:
    if group is None:
        return
    common.require(not torch.compiler.is_compiling(), op, "group cannot be used in torch.compile")
    mine = isinstance(group, dist.ProcessGroup) and dist.get_rank(group) >= 0
    got = common.describe(group)
    common.require(mine, op, f"group must be a process group of this process, got {got}")


def whole(
    part: Part | None,
    tokens: Tensor,
    mask: Tensor | None,
    logprobs: Tensor,
    entropy: Tensor,
    lse: Tensor,
) -> tuple[Tensor, ...]:
    """The three statistics of ``token_logprobs_fwd``, in its order, of the whole vocabulary."""
    if part is None:
        return logprobs, entropy, lse
    here = _here(part, tokens)
    chosen = torch.where(here, logprobs, 0)
    lses, here, chosen, entropies = _gathered(part.group, lse, here, chosen, entropy)
    total, shares, logs = _shares(lses)
    return _cut(mask, _chosen(here, chosen, logs), _sum(shares, entropies - logs), total)


def whole_kl(
    part: Part | None,
    tokens: Tensor,
    mask: Tensor | None,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    entropy: Tensor,
    kl: Tensor,
    lse: Tensor,
    ref_lse: Tensor,
) -> tuple[Tensor, ...]:
    """The six statistics of ``token_kl_fwd``, in its order, of the whole vocabulary."""
    if part is None:
        return logprobs, ref_logprobs, entropy, kl, lse, ref_lse
    here = _here(part, tokens)
    chosen, ref_chosen = torch.where(here, logprobs, 0), torch.where(here, ref_logprobs, 0)
    mine = (lse, ref_lse, here, chosen, ref_chosen, entropy, kl)
    lses, ref_lses, here, chosen, ref_chosen, entropies, kls = _gathered(part.group, *mine)
    total, shares, logs = _shares(lses)
    ref_total, _, ref_logs = _shares(ref_lses)
    # a part that the reference alone bans makes no number of its own
    banned = (ref_logs == -torch.inf) & (shares > 0)
    kls = torch.where(banned, torch.inf, kls + logs - ref_logs)
    return _cut(
        mask,
        _chosen(here, chosen, logs),
        _chosen(here, ref_chosen, ref_logs),
        _sum(shares, entropies - logs),
        _sum(shares, kls),
        total,
        ref_total,
    )


def _cut(mask: Tensor | None, *statistics: Tensor) -> tuple[Tensor, ...]:
    """Rows under the mask are 0 in each part, which is not what the parts add up to."""
    return statistics if mask is None else tuple(torch.where(mask, x, 0) for x in statistics)


def _here(part: Part, tokens: Tensor) -> Tensor:
    mine = part.ids(tokens)
    return (mine >= 0) & (mine < part.size)


def _gathered(group: dist.ProcessGroup, *mine: Tensor) -> tuple[Tensor, ...]:
    """Each as (ranks, ...)."""
    one = torch.stack([x.to(mine[0].dtype) for x in mine])
    parts = [torch.empty_like(one) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, one, group=group)
    return torch.stack(parts).unbind(1)


def _shares(lses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log-sum-exp of all, share of each rank and its logarithm."""
    total = lses.logsumexp(0)
    logs = lses - total
    return total, logs.exp(), logs


def _sum(shares: Tensor, terms: Tensor) -> Tensor:
    # a part without a finite logit has no entropy, and no share; NaN stays
    return torch.where(shares == 0, 0, shares * terms).sum(0)


def _chosen(here: Tensor, logprobs: Tensor, logs: Tensor) -> Tensor:
    """The log-probability of the token from the rank that holds it; NaN if none does."""
    moved = torch.where(logs == -torch.inf, -torch.inf, logprobs + logs)
    found = torch.where(here != 0, moved, 0).sum(0)
    return torch.where((here != 0).any(0), found, torch.nan)
