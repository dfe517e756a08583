"""The geometric mixture of two models inside transformers' ``generate``."""

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor

from nlhf_kernels.integrations import versions

_NAME = "MixtureLogitsProcessor"


class MixtureLogitsProcessor(LogitsProcessor):
    """Scores of ``policy.generate`` become log of the normalised geometric mixture with ``ref``.

    Formula: log_softmax((1 - mixture_coef) policy_logits + mixture_coef ref_logits)

    Temperature and filters of ``generate`` come after it, so they are those of the mixture.
    ``ref`` keeps a KV cache of its own: one forward over the prompts, then one token a call. Rows
    that beam search moves or copies are found again by their tokens; on anything else, as a new
    prompt, the cache starts anew, so one processor serves any number of calls. Call ``reset`` after
    a change of the reference's weights.

    Args:
        policy: the model that generates.
        ref: another model of its vocabulary; ``None``: the base of a PEFT policy, adapters off.
        mixture_coef: weight of ``ref`` in [0, 1].
        attention_mask: (B, P) of the prompts, as given to ``generate``. ``None``: pad tokens at the
            beginning of a row are padding, so give it where a prompt may begin with one.
        pad_token_id: that of ``generate``; ``None``: the policy's.

    Raises ``ValueError`` for an encoder-decoder, two vocabularies, a coefficient out of range, a
    mask that does not fit the rows, or a base that adapters do not leave intact.

    Numerics: in the dtype of the scores (float32 in ``generate``). A score of -inf stays, whatever
    the coefficient: another processor has banned the token.
    """

    def __init__(
        self,
        policy: nn.Module,
        ref: nn.Module | None = None,
        *,
        mixture_coef: float,
        attention_mask: Tensor | None = None,
        pad_token_id: int | None = None,
    ):
        versions.check("transformers")
        number = isinstance(mixture_coef, int | float) and not isinstance(mixture_coef, bool)
        if not (number and 0 <= mixture_coef <= 1):
            got = repr(mixture_coef)
            raise ValueError(f"{_NAME}: mixture_coef must be a number in [0, 1], got {got}")
        if policy.config.is_encoder_decoder:
            raise ValueError(f"{_NAME}: policy must be a decoder, got {type(policy).__name__}")
        self.mixture_coef = float(mixture_coef)
        self._model, self._layers = (policy, _adapters(policy)) if ref is None else (ref, [])
        sizes = [x.config.get_text_config().vocab_size for x in (policy, self._model)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"{_NAME}: policy and ref must have one vocabulary, got {sizes[0]} and {sizes[1]}"
            )
        self._mask = attention_mask
        self._pad = _pad_token(policy) if pad_token_id is None else pad_token_id
        # what the model takes: those without left padding know no positions
        inner = getattr(self._model, "get_base_model", lambda: self._model)()
        self._takes = inspect.signature(inner.forward).parameters
        self.reset()

    def reset(self) -> None:
        """Forget the prompts, and free the cache."""
        self._cache: Any = None
        self._ids: Tensor | None = None
        self._attention: Tensor | None = None

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(R, L) tokens so far and (R, V) logits or log-probabilities of the policy -> (R, V)."""
        b = self.mixture_coef
        mixed = scores
        if b > 0:
            ref = self._ref_logits(input_ids).to(scores)
            if ref.shape != scores.shape:
                shapes = f"{tuple(scores.shape)} and {tuple(ref.shape)}"
                raise ValueError(f"{_NAME}: scores of policy and ref must be alike, got {shapes}")
            # 0 * -inf would be NaN
            mixed = ref if b == 1 else (1 - b) * scores + b * ref
        return mixed.masked_fill(scores == -torch.inf, -torch.inf).log_softmax(-1)

    def _ref_logits(self, input_ids: Tensor) -> Tensor:
        attention = self._attention_of(input_ids)
        new = input_ids
        if self._follow(input_ids, attention):
            new = input_ids[:, -1:]
        else:
            self.reset()
        positions = (attention.cumsum(-1) - 1).clamp(min=0)[:, -new.shape[1] :]
        # the reference may have a device of its own
        device = self._model.get_input_embeddings().weight.device
        given = {"position_ids": positions.to(device), "logits_to_keep": 1}
        # a call that fails may leave a cache with half of a token in it
        cache, self._cache = self._cache, None
        with self._adapters_off():
            output = self._model(
                input_ids=new.to(device),
                attention_mask=attention.to(device),
                past_key_values=cache,
                use_cache=True,
                **{name: x for name, x in given.items() if name in self._takes},
            )
        self._cache = output.past_key_values
        self._ids, self._attention = input_ids.clone(), attention
        return output.logits[:, -1]

    def _follow(self, input_ids: Tensor, attention: Tensor) -> bool:
        """Whether each row is one of the last call with a token more; the cache then has its order.

        The padding belongs to a row: equal tokens under another mask are another prompt.
        """
        if self._cache is None or self._ids.shape[1] != input_ids.shape[1] - 1:
            return False
        before = torch.where(self._attention.bool(), self._ids, -1)
        now = torch.where(attention[:, :-1].bool(), input_ids[:, :-1], -1)
        if before.shape == now.shape and bool((before == now).all()):
            return True
        same = (now[:, None] == before).all(-1)
        if not bool(same.any(-1).all()):
            return False
        self._cache.reorder_cache(same.int().argmax(-1))
        return True

    def _attention_of(self, input_ids: Tensor) -> Tensor:
        """(R, L): the prompts' mask, a row for each that ``generate`` made of it, and then ones."""
        R, L = input_ids.shape
        if self._mask is None:
            pad = -1 if self._pad is None else self._pad
            return (input_ids != pad).cumsum(-1).clamp(max=1)
        B, P = self._mask.shape
        if R % B or P > L:
            raise ValueError(
                f"{_NAME}: attention_mask must be (B, P) of prompts that {R} rows of {L} tokens "
                f"come from, got {(B, P)}"
            )
        mask = self._mask.to(input_ids).repeat_interleave(R // B, 0)
        return torch.cat([mask, mask.new_ones(R, L - P)], 1)

    @contextlib.contextmanager
    def _adapters_off(self) -> Iterator[None]:
        # not peft's own context, which walks over the model and sets requires_grad at every token
        before = [layer._disable_adapters for layer in self._layers]
        for layer in self._layers:
            layer._disable_adapters = True
        try:
            yield
        finally:
            for layer, was in zip(self._layers, before, strict=True):
                layer._disable_adapters = was


def _adapters(policy: nn.Module) -> list[nn.Module]:
    """The layers of peft whose adapters can be switched off, which leaves the base."""
    layers = [x for x in policy.modules() if hasattr(x, "_disable_adapters")]
    configs = getattr(policy, "peft_config", {}).values()
    trained = any(getattr(config, "bias", "none") != "none" for config in configs)
    if not layers or trained or any(config.is_prompt_learning for config in configs):
        raise ValueError(
            f"{_NAME}: without ref, policy must be a PEFT model whose base is left by switching "
            "its adapters off (no prompt tuning, no trained biases): give ref, a model of its own"
        )
    return layers


def _pad_token(policy: nn.Module) -> int | None:
    generation = getattr(policy, "generation_config", None)
    found = getattr(generation, "pad_token_id", None)
    return policy.config.get_text_config().pad_token_id if found is None else found
