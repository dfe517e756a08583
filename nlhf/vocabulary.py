"""Losses over a head whose ids several processes share: each takes its own for all tokens.

The head is never gathered, hidden states are: with N tokens in all, N x D numbers go around instead
of V x D, and no process holds more than its part of the head, of its gradient and of its moments.
Gradients are those of the mean over the processes, as their engine averages all others.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

import nlhf_kernels as nk
from nlhf import packing
from nlhf.heads import Head


class Everyone:
    """Rows of all processes of a group, side by side in the order of the ranks: ``n`` are here."""

    def __init__(self, n: int, group: dist.ProcessGroup, device: torch.device):
        self.group, self.rank = group, dist.get_rank(group)
        mine = torch.tensor([n], device=device)
        found = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
        dist.all_gather(found, mine, group=group)
        self.counts = torch.cat(found).tolist()
        start = sum(self.counts[: self.rank])
        self.here = slice(start, start + n)

    def gather(self, x: Tensor) -> Tensor:
        """(N, ...) of everybody's (n, ...)."""
        return _Gather.apply(x, self)

    def own(self, x: Tensor) -> Tensor:
        """This process's (n, ...) of (N, ...)."""
        return _Own.apply(x, self)

    def collect(self, x: Tensor) -> Tensor:
        """``gather`` without a gradient."""
        most = max(self.counts)
        padded = x.new_zeros(most, *x.shape[1:])
        padded[: len(x)] = x
        found = [torch.empty_like(padded) for _ in self.counts]
        dist.all_gather(found, padded, group=self.group)
        return torch.cat([part[:n] for part, n in zip(found, self.counts, strict=True)])


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, everyone: Everyone) -> Tensor:
        ctx.everyone = everyone
        return everyone.collect(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        # the whole gradient, the same everywhere; the engine will take the mean of what are parts
        return grad[ctx.everyone.here] * len(ctx.everyone.counts), None


class _Own(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, everyone: Everyone) -> Tensor:
        ctx.everyone = everyone
        return x[everyone.here].clone()

    @staticmethod
    def backward(ctx, grad: Tensor):
        # each process brings what its own loss says of its own rows
        return ctx.everyone.collect(grad.contiguous()) / len(ctx.everyone.counts), None


def token_logprobs(
    x: Tensor, head: Head, tokens: Tensor, mask: Tensor, temperature: float
) -> nk.TokenLogprobs:
    """``nk.linear_token_logprobs`` of the (n, D) hidden states that the mask (B, T) keeps."""
    everyone = Everyone(len(x), head.group, x.device)
    found = nk.linear_token_logprobs(
        everyone.gather(x),
        head.weight,
        everyone.collect(tokens[mask]),
        temperature=temperature,
        bias=head.bias,
        group=head.group,
        **head.scaling._asdict(),
    )
    return nk.TokenLogprobs(*(packing.unpacked(everyone.own(v), mask) for v in found))


def pairwise_pg_loss(
    x: Tensor,
    head: Head,
    tokens: Tensor,
    mask: Tensor,
    preference: Tensor,
    ref_logprobs: Tensor | Sequence[Tensor] | None,
    ref: tuple[Tensor, Head] | None,
    **settings,
) -> nk.PairwisePGLoss:
    """``nk.linear_pairwise_pg_loss`` likewise: the loss of all sequences, the rest of those here.

    ref: hidden states of the reference, (n, D), and its head, whole here or shared likewise.
    """
    group = head.group
    everyone = Everyone(len(x), group, x.device)
    sequences = Everyone(len(mask), group, x.device)
    if isinstance(ref_logprobs, Tensor):
        settings["ref_logprobs"] = everyone.collect(ref_logprobs[mask])
    elif ref_logprobs is not None:
        settings["ref_logprobs"] = [everyone.collect(v[mask]) for v in ref_logprobs]
    if ref is not None:
        states, theirs = ref
        weight, bias = theirs.weight, theirs.bias
        if theirs.group is None:
            # the ids that are here of the policy's head
            ids = Everyone(len(head.weight), group, x.device).here
            weight, bias = weight[ids], None if bias is None else bias[ids]
        settings |= {"ref_hidden": everyone.collect(states), "ref_weight": weight}
        settings["ref_bias"] = bias
    drawn = everyone.collect(tokens[mask])
    loss, *rest = nk.linear_pairwise_pg_loss(
        everyone.gather(x),
        head.weight,
        drawn,
        torch.ones_like(drawn, dtype=torch.bool),
        sequences.collect(preference),
        bias=head.bias,
        cu_seqlens=packing.offsets(sequences.collect(mask.sum(-1))),
        group=group,
        **head.scaling._asdict(),
        **settings,
    )
    # without a reference some are empty
    own = (packing.unpacked(v[..., everyone.here], mask) if v.numel() else v for v in rest)
    return nk.PairwisePGLoss(loss, *own)
