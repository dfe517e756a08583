"""Logits: their dtype inside of an op, from hidden states, and of all parts of a vocabulary."""

import torch
import torch.distributed as dist
from torch import Tensor


def statistics_dtype(*logits: Tensor | None) -> torch.dtype:
    """float64 if any of the tensors is float64, else float32."""
    for x in logits:
        if x is not None and x.dtype == torch.float64:
            return torch.float64
    return torch.float32


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def scores(logits: Tensor, temperature: float, softcap: float | None) -> Tensor:
    """Up to a constant of each row, which a softmax does not see."""
    logits = capped(logits.to(statistics_dtype(logits)), softcap)
    if temperature < 1:
        # what is large must not become infinite
        logits = logits - logits.detach().amax(-1, keepdim=True)
    return logits / temperature


def linear_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    dtype: torch.dtype,
    logit_scale: float = 1.0,
) -> Tensor:
    """The logits of an LM head, in ``dtype``: scaled, then capped."""
    logits = hidden.to(dtype) @ weight.to(dtype).T
    if bias is not None:
        logits = logits + bias.to(dtype)
    return capped(logits if logit_scale == 1 else logit_scale * logits, softcap)


# ---- a vocabulary in parts


def whole_vocabulary(logits: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The parts of all ranks side by side; the gradient goes to this rank's own."""
    if group is None:
        return logits
    sizes = vocabulary_sizes(logits.shape[-1], logits.device, group)
    padded = logits.new_zeros(*logits.shape[:-1], max(sizes))
    padded[..., : logits.shape[-1]] = logits.detach()
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded, group=group)
    parts = [x[..., :size] for x, size in zip(parts, sizes, strict=True)]
    parts[dist.get_rank(group)] = logits
    return torch.cat(parts, -1)


def vocabulary_sizes(V: int, device: torch.device, group: dist.ProcessGroup) -> list[int]:
    """How many ids each rank holds, in their order."""
    own = torch.tensor([V], device=device)
    sizes = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, own, group=group)
    return torch.cat(sizes).tolist()


class SumOfGradients(torch.autograd.Function):
    """An identity on what every rank holds, whose gradient is the sum over the ranks."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        if ctx.group is not None:
            grad = grad.clone()
            dist.all_reduce(grad, group=ctx.group)
        return grad, None
