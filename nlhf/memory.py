"""What takes less memory: contexts of a loss and its gradient, and fewer rows at a time."""

import contextlib
import functools
import gc
import logging
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nlhf import policy as policies

T = TypeVar("T")

# what allocators say that raise nothing of their own
_WORDS = ("out of memory", "can't allocate memory", "ALLOC_FAILED")


class Chunks:
    """How many rows go through a model at a time: half as many from when memory has run out.

    what: where it runs out, for the log and for errors.
    remedy: what to set where a single row is too much.
    size: at first; 0: all of them.
    fixed: they stay so many, and ``remedy`` is said at once.
    """

    def __init__(self, what: str, remedy: str, size: int = 0, fixed: bool = False):
        self.size = size
        self._what, self._remedy, self._fixed = what, remedy, fixed

    def over(self, count: int) -> Iterator[slice]:
        """All rows in order, as many at a time as there is room for now."""
        start = 0
        while start < count:
            yield slice(start, start := min(start + (self.size or count), count))

    def each(self, count: int, run: Callable[[slice], T]) -> list[T]:
        """``run`` of each chunk; one that does not fit is run again in two."""
        results: list[T] = []
        start = 0
        while start < count:
            rows = slice(start, min(start + (self.size or count), count))
            found = self.attempt(rows.stop - rows.start, lambda rows=rows: [run(rows)])
            if found is not None:
                results += found
                start = rows.stop
        return results

    def attempt(self, rows: int, run: Callable[[], T]) -> T | None:
        """``run``'s result; None if memory ran out, for which ``rows`` at a time were too many.

        Raises:
            ValueError: there was a single row, or their number is fixed.
        """
        try:
            return run()
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not ran_out(error):
                raise
            said = next(iter(str(error).splitlines()), "") or type(error).__name__
        # here the error and what its frames held are gone
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if rows < 2 or self._fixed:
            many = "1 row" if rows == 1 else f"{rows} rows at a time"
            raise ValueError(f"{self._what}: out of memory with {many} ({said}); {self._remedy}")
        self.size = -(-rows // 2)
        logging.getLogger(__name__).warning(
            "%s: out of memory with %d rows at a time, %d from now on (%s)",
            self._what, rows, self.size, said,
        )  # fmt: skip
        return None


def ran_out(error: BaseException) -> bool:
    """Whether an error is of memory, of a GPU or the machine, that there was not enough of."""
    kinds = (torch.OutOfMemoryError, MemoryError)
    return isinstance(error, kinds) or any(word in str(error) for word in _WORDS)


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
