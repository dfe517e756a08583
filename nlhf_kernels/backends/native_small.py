"""The "cpp" backend of the ops that have no logits: shims over the compiled module."""

# torch first: the compiled module then shares its OpenMP runtime, and with it set_num_threads
import torch
from torch import Tensor

from nlhf_kernels import _native

_CODES = {getattr(torch, name): code for name, code in _native.dtype_codes.items()}


def pair_loss_fwd(
    logprobs: Tensor,
    other_logprobs: Tensor,
    anchor_logprobs: Tensor,
    other_anchor_logprobs: Tensor,
    preference: Tensor,
    other_preference: Tensor | None,
    weights: list[float],
    form: str,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loss (); margins and the gradients at both log-probabilities (B,). All of one dtype."""
    tensors = (logprobs, other_logprobs, anchor_logprobs, other_anchor_logprobs, preference)
    small = [x.contiguous() for x in tensors]
    other = None if other_preference is None else other_preference.contiguous()
    loss = logprobs.new_empty(())
    outputs = [loss, *(logprobs.new_empty(logprobs.shape) for _ in range(3))]
    native = _native.float64 if logprobs.dtype == torch.float64 else _native.float32
    native.pair_loss(
        *(x.data_ptr() for x in small),
        0 if other is None else other.data_ptr(),
        weights,
        len(logprobs),
        form,
        scale,
        *(x.data_ptr() for x in outputs),
    )
    return tuple(outputs)


def ema_update__fwd(
    ema: list[Tensor],
    params: list[Tensor],
    decay: float,
    decay_tensor: Tensor | None,
    seed: int | None,
    seed_tensor: Tensor | None,
) -> None:
    """Writes ``ema``; a tensor, where there is one, is taken for the number before it."""
    _native.ema_update(
        [
            (x.data_ptr(), p.data_ptr(), x.numel(), _CODES[x.dtype], _CODES[p.dtype])
            for x, p in zip(ema, params, strict=True)
        ],
        decay if decay_tensor is None else decay_tensor.item(),
        seed if seed_tensor is None else seed_tensor.item(),
    )
