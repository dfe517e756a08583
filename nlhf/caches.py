"""Keys and values in buffers that stay where they are, and attention that reads them as they are.

A DynamicCache copies all that it holds for every token and layer. Here a token writes one column.
"""

import contextlib
import functools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

# the name under which transformers knows ``attention``
GROUPED = "nlhf_grouped"
# what models hand to attention that says nothing new about a single query
_HARMLESS = {"position_ids", "use_cache", "is_causal"}


class Buffered(DynamicLayer):
    """One layer: ``length`` columns at most, written in place.

    First one update with the prompts; then ``batch_select_indices`` makes them the rows of the
    batch, and allocates; then a column an update. With ``static`` the buffers outlive ``reset``,
    and what was not yet written is 0, so that it can be read under a mask.
    """

    def __init__(self, length: int, static: bool = False):
        super().__init__()
        self._length, self._static = length, static
        self._buffers: list[Tensor] = []
        self._filled = 0
        self._fixed: tuple[Tensor, int] | None = None

    def fix(self, column: Tensor, seen: int) -> None:
        """From now on write where ``column`` (1,) says on the device, and return ``seen`` columns.

        Nothing on the host changes any more: a graph can hold an update.
        """
        self._fixed = column, seen

    def update(
        self, key_states: Tensor, value_states: Tensor, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        news = key_states, value_states
        if self._fixed:
            column, seen = self._fixed
            for buffer, new in zip(self._buffers, news, strict=True):
                buffer.index_copy_(2, column, new)
            return tuple(buffer[:, :, :seen] for buffer in self._buffers)
        start, self._filled = self._filled, self._filled + key_states.shape[2]
        if start == 0:
            self.lazy_initialization(*news)
            self.keys, self.values = news
        else:
            for buffer, new in zip(self._buffers, news, strict=True):
                buffer[:, :, start : self._filled] = new
            self.keys, self.values = (buffer[:, :, : self._filled] for buffer in self._buffers)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self._filled

    def batch_select_indices(self, indices: Tensor) -> None:
        R = len(indices)
        states = self.keys, self.values
        if not self._buffers or len(self._buffers[0]) != R:
            new = torch.zeros if self._static else torch.empty
            shapes = [(R, x.shape[1], self._length, x.shape[3]) for x in states]
            self._buffers = [
                new(shape, dtype=x.dtype, device=x.device)
                for shape, x in zip(shapes, states, strict=True)
            ]
        elif self._static:
            # what a call before this one left behind may be NaN, which a mask does not stop
            for buffer in self._buffers:
                buffer.zero_()
        for buffer, x in zip(self._buffers, states, strict=True):
            buffer[:, :, : self._filled] = x[indices]
        self.keys, self.values = (buffer[:, :, : self._filled] for buffer in self._buffers)

    def reset(self) -> None:
        self.keys = self.values = None
        self.is_initialized = False
        self._filled, self._fixed = 0, None
        if not self._static:
            self._buffers = []


def new_cache(config: Any, length: int, static: bool = False) -> DynamicCache:
    """A cache for ``length`` columns: in buffers if every layer is plain full attention."""
    cache = DynamicCache(config=config)
    # sliding windows, linear attention and shared layers stay as transformers has them
    if all_full(cache):
        cache.layers = [Buffered(length, static) for _ in cache.layers]
    return cache


def all_full(cache: DynamicCache) -> bool:
    return bool(cache.layers) and all(type(layer) is DynamicLayer for layer in cache.layers)


# ---- attention


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """A single query (R, H, 1, D) against keys (R, K, L, D) as they are; else transformers' sdpa.

    The H / K heads that share keys become queries of one head, so that keys and values are read
    once and never expanded.
    """
    mask = attention_mask
    if mask is not None and mask.is_floating_point():
        # autocast, or a float32 layer in a model of half precision
        mask = mask.to(query.dtype)
    R, H, count, D = query.shape
    unusual = [x for name, x in kwargs.items() if name not in _HARMLESS]
    if (
        count > 1
        or dropout
        or (mask is not None and mask.shape[1:3] != (1, 1))
        or any(x is not None and x is not False for x in unusual)
    ):
        from transformers import AttentionInterface

        kwargs |= {"dropout": dropout, "scaling": scaling}
        return AttentionInterface()["sdpa"](module, query, key, value, mask, **kwargs)
    output = nn.functional.scaled_dot_product_attention(
        query.reshape(R, key.shape[1], -1, D), key, value, attn_mask=mask, scale=scaling
    )
    return output.reshape(R, 1, H, value.shape[-1]), None


@functools.cache
def _register() -> None:
    # not at the top: it takes the whole of transformers' modelling code, which a model has loaded
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(GROUPED, attention)
    AttentionMaskInterface.register(GROUPED, AttentionMaskInterface()["sdpa"])


def groups(model: nn.Module) -> bool:
    """Whether ``attention`` may stand in for the model's own.

    It can if the model asks transformers for sdpa, and has plain full attention in every layer.
    """
    config = model.config
    plain = config.get_text_config() is config and config._attn_implementation == "sdpa"
    known = getattr(model, "_supports_attention_backend", False)
    return plain and known and all_full(DynamicCache(config=config))


@contextlib.contextmanager
def grouped(models: Iterable[nn.Module]) -> Iterator[None]:
    """Inside it those of the models that can, and keep their caches in buffers, use ``attention``.

    After it, also after an exception, they use what they used before.
    """
    _register()
    configs = {id(model.config): model.config for model in models if groups(model)}.values()
    for config in configs:
        config._attn_implementation = GROUPED
    try:
        yield
    finally:
        for config in configs:
            config._attn_implementation = "sdpa"
