"""Contract of ``pair_loss``."""

from collections.abc import Sequence

import torch
from torch import Tensor

from nlhf_kernels import eager, registry
from nlhf_kernels.eager import PAIR_METHODS, PairLoss
from nlhf_kernels.eager.pair_loss import pair_settings
from nlhf_kernels.ops import common

OP = "pair_loss"
MOST_ANCHORS = 8


def _forward(*arguments):
    *arguments, backend = arguments
    return registry.load(f"{OP}_fwd", backend)(*arguments)


def _forward_fake(logprobs, *_):
    return logprobs.new_empty(()), *(torch.empty_like(logprobs) for _ in range(3))


# all of one dtype; loss (), margins (B,), and the gradients of the loss at both log-probabilities
common.define(
    f"{OP}_fwd(Tensor logprobs, Tensor other_logprobs, Tensor anchor_logprobs,"
    " Tensor other_anchor_logprobs, Tensor preference, Tensor? other_preference, float[] weights,"
    " str form, float scale, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)


class _PairLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments):
        loss, margins, grad, other_grad = torch.ops.nlhf.pair_loss_fwd(*arguments)
        ctx.save_for_backward(grad, other_grad)
        ctx.others = len(arguments) - 2
        ctx.mark_non_differentiable(margins)
        return loss, margins

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss, _):
        grad, other_grad = ctx.saved_tensors
        return grad_loss * grad, grad_loss * other_grad, *[None] * ctx.others


def _check_method(method, tau, eta, weights, count: int) -> None:
    if not isinstance(method, str) or method not in PAIR_METHODS:
        known = ", ".join(PAIR_METHODS)
        raise ValueError(f"{OP}: method must be one of {known}, got {common.describe(method)}")
    entry = PAIR_METHODS[method]
    for name, x in (("tau", tau), ("eta", eta)):
        if name in entry.parameters:
            # smaller ones leave no finite target in float32
            wanted = f"above 0 (1e-30) and finite for {method}"
            common.check_number(OP, name, x, 1e-30, common.LARGEST, wanted)
        elif x is not None:
            got = common.describe(x)
            raise ValueError(f"{OP}: {name} must be left out, since {method} has none, got {got}")
    if "tau" in entry.parameters and "eta" in entry.parameters and tau > eta:
        raise ValueError(f"{OP}: tau must be at most eta for {method}, got tau above eta")

    if entry.anchors and count != len(entry.anchors):
        wanted = f"{len(entry.anchors)} ({', '.join(entry.anchors)})"
        raise ValueError(f"{OP}: the number of anchors must be {wanted} for {method}, got {count}")
    if not 1 <= count <= MOST_ANCHORS:
        raise ValueError(
            f"{OP}: the number of anchors must be from 1 to {MOST_ANCHORS}, got {count}"
        )
    if weights is None:
        return
    if entry.anchors:
        raise ValueError(f"{OP}: weights must be left out, since {method} has its own")
    if not isinstance(weights, Sequence) or isinstance(weights, str) or len(weights) != count:
        wanted = f"{count} numbers, one per anchor"
        raise ValueError(f"{OP}: weights must be {wanted}, got {common.describe(weights)}")
    for j, weight in enumerate(weights):
        low, high = -common.LARGEST, common.LARGEST
        common.check_number(OP, f"weights[{j}]", weight, low, high, "finite")


def _check_preference(name: str, x: Tensor | None) -> None:
    """On the CPU, where looking costs nothing: probabilities."""
    if x is None or x.device.type != "cpu" or torch.compiler.is_compiling():
        return
    # NaN fails the comparison
    wrong = ~((x >= 0) & (x <= 1))
    if wrong.any():
        b = int(wrong.nonzero()[0])
        raise ValueError(f"{OP}: {name} must be in [0, 1], got {float(x[b])} at {b}")


def pair_loss(
    logprobs: Tensor,
    other_logprobs: Tensor,
    anchor_logprobs: Tensor,
    other_anchor_logprobs: Tensor,
    preference: Tensor,
    other_preference: Tensor | None = None,
    *,
    method: str,
    tau: float | None = None,
    eta: float | None = None,
    weights: Sequence[float] | None = None,
    backend: str = "",
) -> PairLoss:
    real = isinstance(logprobs, Tensor) and common.is_dense(logprobs) and not logprobs.is_meta
    if not real or logprobs.dim() != 1:
        wanted = "a real (B,) tensor of whole responses"
        raise ValueError(f"{OP}: logprobs must be {wanted}, got {common.describe(logprobs)}")
    shape, device = logprobs.shape, logprobs.device
    common.check_tensor(OP, "logprobs", logprobs, shape, common.FLOATS, device)
    common.check_tensor(OP, "other_logprobs", other_logprobs, shape, common.FLOATS, device)
    real = isinstance(anchor_logprobs, Tensor) and common.is_dense(anchor_logprobs)
    flat = real and anchor_logprobs.dim() == 1
    count = 1
    if not flat:
        if not real or anchor_logprobs.dim() != 2:
            wanted = f"(J, {shape[0]}), or ({shape[0]},) for one"
            got = common.describe(anchor_logprobs)
            raise ValueError(f"{OP}: anchor_logprobs must be {wanted}, got {got}")
        count = anchor_logprobs.shape[0]
    _check_method(method, tau, eta, weights, count)
    anchored = shape if flat else (count, *shape)
    for name, x in (
        ("anchor_logprobs", anchor_logprobs),
        ("other_anchor_logprobs", other_anchor_logprobs),
    ):
        common.check_tensor(OP, name, x, anchored, common.FLOATS, device)
    common.check_tensor(OP, "preference", preference, shape, common.FLOATS, device)
    if PAIR_METHODS[method].two_preferences:
        name = f"other_preference, which {method} takes,"
        common.check_tensor(OP, name, other_preference, shape, common.FLOATS, device)
    elif other_preference is not None:
        raise ValueError(f"{OP}: other_preference must be left out, since {method} has none")
    _check_preference("preference", preference)
    _check_preference("other_preference", other_preference)

    backend = common.resolve(OP, logprobs, backend)
    tensors = (logprobs, other_logprobs, anchor_logprobs, other_anchor_logprobs, preference)
    if backend == "eager":
        settings = {"method": method, "tau": tau, "eta": eta, "weights": weights}
        return common.run_eager(OP, *tensors, other_preference, **settings)
    dtype = eager.statistics_dtype(*tensors, other_preference)
    # what is cast here has its gradient cast back
    y, y_other, *frozen = (x.to(dtype) for x in tensors)
    anchors, other_anchors, p = (x.detach() for x in frozen)
    p_other = None if other_preference is None else other_preference.detach().to(dtype)
    form, numbers, scale = pair_settings(method, tau, eta, weights, count)
    numbers = [float(weight) for weight in numbers]
    return PairLoss(
        *_PairLoss.apply(
            y, y_other, anchors, other_anchors, p, p_other, numbers, form, float(scale), backend
        )
    )


pair_loss.__doc__ = eager.pair_loss.__doc__
