"""TRL's log-probability functions by the fused ops: same signatures, shapes, dtypes, gradients.

``patch_trl()`` puts them in place of TRL's own, in every trainer; ``unpatch_trl()`` takes them out.
They are also functions to call, with the arguments of the newest TRL.
"""

import functools
import inspect
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

import nlhf_kernels as nk
from nlhf_kernels.integrations import patching, rows, versions

_UTILS = "trl.trainer.utils"
# what every TRL of the tested range has; the others came later
_NEEDED = ("selective_log_softmax", "entropy_from_logits", "_ChunkedLogProbFunction")
# rows of logits that are widened at a time
_ROWS = 128
_patches = patching.Patches("trl")
# TRL's own question whether its kernel takes these arguments; None: it has none, or is not patched
_by_kernel: Callable | None = None


def patch_trl() -> None:
    """Replace TRL's functions by ours wherever a module of TRL holds them; again: no change.

    ``selective_log_softmax``, ``entropy_from_logits``, ``_ChunkedLogProbFunction`` and, where TRL
    has it, ``selective_log_softmax_and_entropy``. Raises ``ImportError`` without TRL, or if one of
    the first three is missing.
    """
    global _by_kernel
    utils = versions.load("trl", _UTILS)
    versions.check("trl")
    for name in _NEEDED:
        if not hasattr(utils, name):
            low, high = versions.TESTED["trl"]
            raise ImportError(f"patch_trl: {_UTILS} has no {name}: install trl {low} to {high}")
    # by what this TRL names them
    ours = {
        "selective_log_softmax": selective_log_softmax,
        "entropy_from_logits": entropy_from_logits,
        "selective_log_softmax_and_entropy": selective_log_softmax_and_entropy,
        "_fused_logprob_entropy": _as_kernel,
    }
    for name, function in ours.items():
        old = getattr(utils, name, None)
        if old is not None and not _patches.holds(old):
            _patches.replace(old, _signed(function, old))
    old = utils._ChunkedLogProbFunction
    if not _patches.holds(old):
        more = "outputs" in inspect.signature(old.forward).parameters
        _patches.replace(old, ChunkedStatistics if more else ChunkedLogprobs)
    if hasattr(utils, "_fused_logprob_entropy"):
        _by_kernel = utils._supports_trl_loss_kernel


def unpatch_trl() -> None:
    """Put TRL's own functions back, also in modules that were loaded since; again: no change."""
    global _by_kernel
    _patches.undo()
    _by_kernel = None


def selective_log_softmax(
    logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
) -> Tensor:
    """Log-probabilities of ``index`` under softmax(logits / temperature), like ``index``.

    Args:
        logits: (..., V), any dtype of floats, any strides.
        index: (...) or (..., K), in [0, V); outside: ``ValueError`` on the CPU.
        temperature: above 0.
        row_mask: of the shape of ``index``, or ``None``; where it is 0 the result is 0, without a
            gradient.

    Returns: in the dtype of the logits, where TRL's Triton kernel would answer in float32.
    """
    dtype = _dtype(logits, index, row_mask)
    if index.dim() == logits.dim():
        return _at_several(logits, index, temperature, row_mask).to(dtype)
    return rows.token_logprobs(logits, index, row_mask, temperature).logprobs.to(dtype)


def entropy_from_logits(logits: Tensor, chunk_size: int = 128) -> Tensor:
    """Entropy in nats (...) of softmax(logits), logits (..., V); differentiable.

    ``chunk_size`` is TRL's and without effect: no row is copied. 0 log 0 counts as 0.
    """
    zeros = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    return rows.token_logprobs(logits, zeros).entropy.to(_dtype(logits))


def selective_log_softmax_and_entropy(
    logits: Tensor,
    index: Tensor,
    entropy_requires_grad: bool = True,
    temperature: float = 1.0,
    row_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Both of the above from one read of the logits, at ``temperature``; ``index`` is (...)."""
    dtype = _dtype(logits, index, row_mask)
    found = rows.token_logprobs(logits, index, row_mask, temperature)
    logprobs, entropy = (x.to(dtype) for x in found)
    return logprobs, entropy if entropy_requires_grad else entropy.detach()


class ChunkedLogprobs:
    """TRL 1.13's ``_ChunkedLogProbFunction``: ``apply`` from hidden states and a head."""

    @staticmethod
    def apply(
        last_hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """float32 log-probabilities and entropies (N,), without logits (N, V); both differentiable.

        Args:
            last_hidden: (N, D).
            weight, bias: (V, D), and (V,) or ``None``; taken to the dtype of the hidden states.
            targets: (N,) in [0, V).
            temperature, final_logit_softcapping, logit_scale: logits are scaled, capped, divided.
            chunk_size: TRL's, of the vocabulary, and without effect: the op chooses chunks of
                tokens by memory.
        """
        _refuse_partitioned(weight)
        scaling = (temperature, final_logit_softcapping, logit_scale)
        head = rows.head(last_hidden, weight, bias, autocast=False)
        return _from_hidden(*head, targets, *scaling)


class ChunkedStatistics:
    """TRL 1.16's ``_ChunkedLogProbFunction``: the same, and statistics without a gradient."""

    @staticmethod
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"),
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """As ``ChunkedLogprobs``, in the dtype of autocast where that is on.

        Then come, each ``None`` unless ``outputs`` names it: log of the sum of squared
        probabilities, mean of the scaled logits, whether the target is the (first) largest.
        """
        _refuse_partitioned(weight)
        scaling = (temperature, final_logit_softcapping, logit_scale)
        head = rows.head(hidden, weight, bias)
        logprobs, entropy = _from_hidden(*head, targets, *scaling)
        more = _more(*head, targets, *scaling, outputs)
        return logprobs, entropy if "entropy" in outputs else None, *more


def _signed(function: Callable, host: Callable) -> Callable:
    """``function`` with the name and signature of the host's."""

    @functools.wraps(host)
    def replacement(*args, **kwargs):
        return function(*args, **kwargs)

    return replacement


def _dtype(logits: Tensor, index: Tensor | None = None, mask: Tensor | None = None) -> torch.dtype:
    # TRL's kernel answers in float32, its torch functions in the dtype of the logits
    by_kernel = _by_kernel is not None and _by_kernel(logits, index, mask)
    return torch.float32 if by_kernel else logits.dtype


def _as_kernel(
    logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    return tuple(rows.token_logprobs(logits, index, row_mask, temperature))


def _refuse_partitioned(weight: Tensor) -> None:
    if hasattr(weight, "ds_id"):
        raise ValueError(
            "patch_trl: the weights of the LM head are partitioned by DeepSpeed ZeRO-3, which "
            "gathers them for TRL's own function only: call unpatch_trl(), or use ZeRO-2"
        )


def _from_hidden(hidden, weight, bias, targets, temperature, softcap, scale):
    found = nk.linear_token_logprobs(
        hidden,
        weight,
        targets.long(),
        bias=bias,
        temperature=temperature,
        softcap=softcap,
        logit_scale=float(scale),
    )
    return found.logprobs.float(), found.entropy.float()


@torch.no_grad()
def _more(hidden, weight, bias, targets, temperature, softcap, scale, outputs):
    """The statistics that no op has, from a few rows of logits at a time."""
    like = {"dtype": torch.float32, "device": hidden.device}
    makers = {
        "log_sum_sq_probs": lambda z, _: (2 * z).logsumexp(-1) - 2 * z.logsumexp(-1),
        "mean_logits": lambda z, _: z.mean(-1),
        "is_top1": lambda z, target: z.argmax(-1) == target,
    }
    found = {name: torch.empty(len(hidden), **like) for name in makers if name in outputs}
    for start in range(0, len(hidden) if found else 0, _ROWS):
        some = slice(start, start + _ROWS)
        z = F.linear(hidden[some], weight, bias).float() * scale
        z = (z if softcap is None else softcap * torch.tanh(z / softcap)) / temperature
        for name, x in found.items():
            x[some] = makers[name](z, targets[some])
    if "is_top1" in found:
        found["is_top1"] = found["is_top1"].bool()
    return tuple(found.get(name) for name in makers)


# ---- several ids a row


def _at_several(logits, index, temperature, row_mask) -> Tensor:
    flat, ids = logits.reshape(-1, logits.shape[-1]), index.reshape(-1, index.shape[-1]).long()
    logprobs = _AtSeveral.apply(flat, ids, float(temperature)).reshape(index.shape)
    return logprobs if row_mask is None else logprobs.masked_fill(row_mask == 0, 0.0)


class _AtSeveral(torch.autograd.Function):
    """(N, V), (N, K) -> (N, K): the normaliser by the op, then a look at each id."""

    @staticmethod
    def forward(ctx, logits: Tensor, ids: Tensor, temperature: float) -> Tensor:
        top = logits.argmax(-1)
        # the largest has a log-probability near 0, so that little cancels
        found = rows.token_logprobs(logits, top, temperature=temperature).logprobs
        lse = logits.gather(1, top[:, None]).to(found.dtype) / temperature - found[:, None]
        ctx.save_for_backward(logits, ids, lse)
        ctx.temperature = temperature
        return logits.gather(1, ids).to(lse.dtype) / temperature - lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        logits, ids, lse = ctx.saved_tensors
        grad, made = grad / ctx.temperature, torch.empty_like(logits)
        for start in range(0, len(logits), _ROWS):
            some = slice(start, start + _ROWS)
            part = (logits[some].to(lse.dtype) / ctx.temperature - lse[some]).exp()
            part = part.mul_(-grad[some].sum(-1, keepdim=True))
            made[some] = part.scatter_add_(1, ids[some], grad[some]).to(logits.dtype)
        return made, None, None
