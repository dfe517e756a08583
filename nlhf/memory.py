"""Contexts in which a loss and its gradient take less memory."""

import contextlib
import functools
from collections.abc import Iterator

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nlhf import policy as policies


@contextlib.contextmanager
def recomputing(model: nn.Module, enabled: bool = True) -> Iterator[None]:
    """Layers that run inside it keep their inputs alone; the backward pass runs them again.

    Gradient checkpointing (Chen et al. 2016), the gradient to the bit where kernels repeat to the
    bit. It works in the mode that the model is in, which must still be that of the backward pass;
    transformers' own switch needs train mode, which turns dropout on. Differentiate no pass with a
    cache: it would be written twice.

    Raises:
        ValueError: none of the layers is one that transformers can checkpoint.
    """
    # not at the top: it takes the whole of transformers' modelling code, which a model has loaded
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [m for m in model.modules() if enabled and isinstance(m, GradientCheckpointingLayer)]
    if enabled and not layers:
        raise ValueError(
            f"gradient_checkpointing: {type(model).__name__} has no layer that transformers can "
            "checkpoint; leave it off"
        )
    # an instance has a forward of its own where e.g. accelerate gave it one
    before = [vars(layer).get("forward") for layer in layers]
    for layer in layers:
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
    try:
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            del layer.forward
            if own is not None:
                layer.forward = own


@contextlib.contextmanager
def untied(model: nn.Module) -> Iterator[None]:
    """A tied head that runs inside it adds its gradient to ``weight.grad`` as soon as it is there.

    Autograd would hold it until that of the embeddings is there, and then make a third of the size
    for the sum. For ``backward()``: ``torch.autograd.grad`` misses the head's part. Without effect
    on a model whose embeddings are not tied, not trained, or sharded.
    """
    inner = policies.bare(model)
    head, embed = inner.get_output_embeddings(), inner.get_input_embeddings()
    plain = isinstance(head, nn.Linear) and isinstance(embed, nn.Embedding)
    # a sharded weight is gathered under the name that it has
    plain = plain and type(head.weight) is nn.Parameter
    if not plain or head.weight is not embed.weight or not embed.weight.requires_grad:
        yield
        return
    weight, sparse = embed.weight, embed.sparse

    def move(leaf: Tensor) -> None:
        if weight.grad is None:
            weight.grad = leaf.grad
        else:
            weight.grad += leaf.grad
        leaf.grad = None

    head.weight = nn.Parameter(weight.detach())
    head.weight.register_post_accumulate_grad_hook(move)
    # only the rows of the prompt and y have a gradient; on CUDA adding them is not deterministic
    embed.sparse = weight.device.type == "cpu"
    try:
        yield
    finally:
        head.weight, embed.sparse = weight, sparse
