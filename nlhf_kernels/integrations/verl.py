"""verl's log-probability functions by the fused ops: same signatures, shapes and dtypes.

They need no verl. ``patch_verl()`` puts them in place of verl's own, ``unpatch_verl()`` back.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

import nlhf_kernels as nk
from nlhf_kernels.integrations import patching, rows, versions

_patches = patching.Patches("verl")
versions.check("verl")


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    reduction: str = "none",
    dist_process_group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the labels and entropies, from hidden states; both differentiable.

    Args:
        hidden: (N, D) or (B, T, D).
        weight: (V, D), taken to the dtype of ``hidden``.
        labels: (N,) or (B, T) in [0, V), of the whole vocabulary.
        temperature: above 0.
        reduction: "none", "sum" or "mean" of the log-probabilities; entropies are never reduced.
        dist_process_group: the ranks that share the vocabulary, each with its rows of the weight.
            As verl's, the gradient of ``hidden`` is then a rank's share: over the ranks the shares
            add up to the gradient, which Megatron's sequence parallelism does.

    Returns:
        float32 (float64 for float64): log-probabilities (N,), flat also for (B, T, D), or () when
        reduced, and entropies (N,).

    Raises ``ValueError`` for another reduction, and as ``linear_token_logprobs`` does.
    """
    names = ("none", "sum", "mean")
    if not isinstance(reduction, str) or reduction.lower() not in names:
        wanted = ", ".join(names)
        raise ValueError(f"linear_cross_entropy: reduction must be {wanted}, got {reduction!r}")
    if dist_process_group is not None:
        hidden = _Share.apply(hidden, dist.get_world_size(dist_process_group))
    hidden, weight, _ = rows.head(hidden.reshape(-1, hidden.shape[-1]), weight, None)
    logprobs, entropy = nk.linear_token_logprobs(
        hidden,
        weight,
        labels.reshape(-1).long(),
        temperature=temperature,
        group=dist_process_group,
    )
    reduced = {"none": logprobs, "sum": logprobs.sum(), "mean": logprobs.mean()}
    return reduced[reduction.lower()], entropy


class FusedLinearForPPO(nn.Module):
    """verl's module of the same name: (hidden_states, vocab_weights, input_ids, temperature).

    ``chunk_size`` and ``impl_backend`` ("torch" or "liger") are verl's and without effect: the op
    chooses its chunks by memory.
    """

    def __init__(self, chunk_size: int = 512, impl_backend: str = "torch"):
        super().__init__()
        if impl_backend not in ("torch", "liger"):
            raise ValueError(
                f"FusedLinearForPPO: impl_backend must be 'torch' or 'liger', got {impl_backend!r}"
            )
        self.chunk_size = chunk_size
        self.impl_backend = impl_backend

    def forward(
        self,
        hidden_states: Tensor,
        vocab_weights: Tensor,
        input_ids: Tensor,
        temperature: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """float32 log-probabilities, and entropies in the dtype of the hidden states.

        (N, D) or (B, T, D), (V, D) and (N,) or (B, T) give (N,) or (B, T); both differentiable.
        """
        hidden, weight, _ = rows.head(hidden_states, vocab_weights, None)
        logprobs, entropy = nk.linear_token_logprobs(
            hidden, weight, input_ids.long(), temperature=temperature
        )
        return logprobs.float(), entropy.to(hidden_states.dtype)


def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    """Log-probabilities (...) of labels (...) under logits (..., V).

    Args:
        inplace_backward: the backward writes the gradient over the logits, so that nothing else may
            use them after it, and a second backward raises. verl's own does so with flash-attn.

    Returns: in the dtype of the logits; on a GPU in float32 for 16 bits, as verl's with flash-attn.
    """
    logprobs = rows.token_logprobs(logits, labels, inplace_backward=inplace_backward).logprobs
    return logprobs.to(logits.dtype) if logits.is_cpu else logprobs


def patch_verl() -> None:
    """Put the three in place of verl's wherever a module of verl holds them; again: no change.

    Models that ``patch_forward_with_backends`` has given a fused forward take them too. Raises
    ``ImportError`` without verl.
    """
    homes = {
        "linear_cross_entropy": "verl.utils.kernel.linear_cross_entropy",
        "FusedLinearForPPO": "verl.utils.experimental.torch_functional",
        "logprobs_from_logits": "verl.utils.torch_functional",
    }
    modules = {name: versions.load("verl", home) for name, home in homes.items()}
    versions.check("verl")
    for name, module in modules.items():
        old = getattr(module, name)
        if not _patches.holds(old):
            _patches.replace(old, globals()[name])


def unpatch_verl() -> None:
    """Put verl's own back; again: no change."""
    _patches.undo()


class _Share(torch.autograd.Function):
    """An identity, whose gradient, the same on every rank, is shared out equally."""

    @staticmethod
    def forward(ctx, x: Tensor, ranks: int) -> Tensor:
        ctx.ranks = ranks
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad / ctx.ranks, None
