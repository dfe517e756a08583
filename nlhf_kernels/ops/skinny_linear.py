"""Contract of ``skinny_linear``, which has no logits: a layer of the model, while it decodes."""

import torch
from torch import Tensor

from nlhf_kernels import registry
from nlhf_kernels.ops import common

OP = "skinny_linear"


def _forward(input, weight, backend):
    return registry.load(f"{OP}_fwd", backend)(input, weight)


def _forward_fake(input, weight, backend):
    return input.new_empty(*input.shape[:-1], weight.shape[0])


common.define(
    f"{OP}_fwd(Tensor input, Tensor weight, str backend) -> Tensor", _forward, _forward_fake
)


def skinny_linear(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str = ""
) -> Tensor:
    """A linear layer for few rows on the CPU, without gradients: decoding.

    Formula: ``input @ weight.T + bias``, as ``torch.nn.functional.linear``. With few rows its time
    is that of reading the weights once, which a general matrix product does not reach.

    Args:
        input: (..., D) float32 on the CPU.
        weight: (N, D) float32, contiguous.
        bias: (N,) float32 or None.
        backend: "cpp", "eager" or "" for the first that is there.

    Returns:
        (..., N) float32, without a gradient.

    Raises:
        ValueError: bad input; a gradient would be needed; or the backend cannot be used.

    Numerics: sums in float32 over 16, 8 or 4 lanes, as wide as the registers are. With "cpp" a row
    is the same to the bit whatever the other rows and however many threads; "eager" is torch's
    product. It is meant for fewer than 16 rows: from there on a general product is faster.
    """
    if why := _unfit(input, weight, bias):
        raise ValueError(f"{OP}: {why}")
    if torch.is_grad_enabled():
        for name, x in (("input", input), ("weight", weight), ("bias", bias)):
            if x is not None and x.requires_grad:
                why = "it has no gradient: call it under torch.no_grad()"
                raise ValueError(f"{OP}: {name} requires one, and {why}")
    backend = common.resolve(OP, input, backend)
    if backend == "eager":
        if not torch.compiler.is_compiling():
            registry.count(OP, backend)
        return torch.nn.functional.linear(input, weight, bias)
    output = torch.ops.nlhf.skinny_linear_fwd(input, weight, backend)
    return output if bias is None else output.add_(bias)


def _unfit(input: Tensor, weight: Tensor, bias: Tensor | None) -> str:
    """What is wrong, or ""; in haste: a token of a small model makes hundreds of these calls."""
    for name, x in (("input", input), ("weight", weight), ("bias", bias)):
        if type(x) not in common.PLAIN:
            common.check_local(OP, name, x)
        plain = isinstance(x, Tensor) and x.dtype == torch.float32 and x.is_cpu
        plain = plain and common.is_dense(x)
        if not plain and not (x is None and name == "bias"):
            return f"{name} must be float32 on the CPU, got {common.describe(x)}"
    if weight.dim() != 2 or not weight.is_contiguous():
        layout = f"{common.describe(weight)} with strides {weight.stride()}"
        return f"weight must be (N, D) and contiguous, got {layout}"
    N, D = weight.shape
    if input.dim() == 0 or input.shape[-1] != D:
        return f"input must be (..., {D}) like weight ({N}, {D}), got {tuple(input.shape)}"
    if bias is not None and bias.shape != (N,):
        return f"bias must be ({N},) like weight ({N}, {D}), got {tuple(bias.shape)}"
    return ""
