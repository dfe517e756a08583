"""Linear layers that decode at the speed of reading their weights, on the CPU."""

import contextlib
import functools
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

import nlhf_kernels as nk

# from so many rows on a general product is as fast
_ROWS = 16
# with fewer weights the call costs more than the product saves
_WEIGHTS = 2**17


@contextlib.contextmanager
def skinny(models: Iterable[nn.Module]) -> Iterator[None]:
    """Inside it large float32 linear layers of these models use ``nk.skinny_linear`` for few rows.

    For passes without a gradient; nothing changes where the compiled backend is not there.
    """
    try:
        here = nk.resolve("skinny_linear", "cpu") == "cpp"
    except ValueError:
        # another backend is forced, which has no linear layer of its own
        here = False
    layers = {layer for model in models for layer in model.modules() if _fits(layer)}
    layers = layers if here and not torch.is_autocast_enabled("cpu") else set()
    for layer in layers:
        layer.forward = functools.partial(_forward, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _fits(layer: nn.Module) -> bool:
    # subclasses do more than multiply, and so does a layer that somebody has wrapped
    if type(layer) is not nn.Linear or "forward" in vars(layer):
        return False
    weight = layer.weight
    plain = weight.device.type == "cpu" and weight.dtype == torch.float32
    return plain and weight.is_contiguous() and weight.numel() >= _WEIGHTS


def _forward(layer: nn.Linear, input: Tensor) -> Tensor:
    linear = nk.skinny_linear
    if input.numel() >= _ROWS * layer.in_features or input.dtype != torch.float32:
        linear = nn.functional.linear
    return linear(input, layer.weight, layer.bias)
