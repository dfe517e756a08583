"""The parts of the decode loop: its rows, a model with its cache, and the batch in flight."""

import contextlib
import itertools
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

import nlhf_kernels as nk
from nlhf import policy as policies

# a batch is made smaller when this share of its rows or less is left: copying the caches costs
# about what their growth by one token does, so the copies stay far below the forward passes
_COMPACT_AT = 0.75


@dataclass(frozen=True)
class Rows:
    """What belongs to the rows of a batch, (R,) each; ``place`` is where the result goes."""

    place: Tensor
    prompt: Tensor
    side: Tensor
    coef: Tensor
    seed: Tensor

    def select(self, index: Tensor) -> "Rows":
        return Rows(*(x[index] for x in vars(self).values()))


def all_rows(ordered: list[tuple[int, Any]], P: int, seeds: Tensor) -> Rows:
    """All rows of ``ordered``, numbers and sides: side by side, prompt-major inside a side."""
    like = {"dtype": torch.int64, "device": seeds.device}
    pieces = []
    for s, side in ordered:
        n = side.n_samples
        prompt = torch.arange(P, **like).repeat_interleave(n)
        sample = torch.arange(n, **like).repeat(P)
        coef = torch.full((P * n,), side.mixture_coef, dtype=torch.float64, device=seeds.device)
        seed = nk.fold_in(nk.fold_in(seeds[prompt], sample), s)
        pieces.append((prompt, torch.full_like(prompt, s), coef, seed))
    prompt, *others = map(torch.cat, zip(*pieces, strict=True))
    return Rows(torch.arange(len(prompt), **like), prompt, *others)


class Decoder:
    """A model, the context it runs in, and a cache that is nobody else's."""

    def __init__(self, model: nn.Module, context: AbstractContextManager | None = None):
        self.model = model
        self.cache = DynamicCache(config=model.config)
        self._context = context or contextlib.nullcontext()
        attention = model.config.get_text_config()._attn_implementation
        self._takes_4d = attention == "sdpa" and not any(self.cache.is_sliding)

    def __call__(self, ids: Tensor, mask: Tensor | None, position_ids: Tensor) -> Tensor:
        """Logits (R, V) after the last column of ``ids`` (R, L); ``mask`` covers the cache too."""
        if mask is not None and self._takes_4d and ids.shape[1] == 1:
            # of two dimensions, transformers would look at its values, and stall a GPU
            mask = mask[:, None, None]
        with self._context:
            return policies.last_logits(self.model, ids, mask, position_ids, 1, self.cache)[:, 0]


class Batch:
    """The rows that are being written, and the decoders that do it.

    ``sizes`` says how many rows each policy has, one after the other. A decoder more than that is
    the reference, which reads all rows.
    """

    def __init__(self, decoders, sizes, rows, input_ids, attention_mask, max_new_tokens):
        self.rows = rows
        self.alive = torch.ones_like(rows.place, dtype=torch.bool)
        self._decoders, self._sizes, self._left = decoders, sizes, sizes
        self._prompts = input_ids, attention_mask
        self._lengths = attention_mask.sum(-1)[rows.prompt]
        self._tokens, self._step = None, 0
        self._mask = None
        if not attention_mask.all():
            tail = attention_mask.new_ones(len(input_ids), max_new_tokens)
            self._mask = torch.cat([attention_mask, tail], -1)[rows.prompt]

    def logits(self) -> tuple[Tensor, Tensor | None]:
        """Next-token logits (R, V) of the policies, row for row, and of the reference."""
        if sum(self._left) <= _COMPACT_AT * sum(self._sizes):
            self._compact()
        run = self._extend if self._step else self._prefill
        own = [run(*pair) for pair in zip(self._decoders, self._spans(), strict=False)]
        own = [logits for logits in own if logits is not None]
        ref = None
        if len(self._decoders) > len(self._sizes):
            ref = run(self._decoders[-1], slice(None))
        return own[0] if len(own) == 1 else torch.cat(own), ref

    def take(self, tokens: Tensor, eos: Tensor) -> bool:
        """Append (R,) tokens; whether a row is left to go on with. The one host sync a token."""
        wrong = self.alive & (tokens < 0)
        self.alive = self.alive & ~torch.isin(tokens, eos)
        left = [part.sum() for part in self.alive.split(self._sizes)]
        *self._left, bad = torch.stack([*left, wrong.sum()]).tolist()
        if bad:
            row = int(wrong.nonzero()[0])
            raise ValueError(
                f"generate: a model returned NaN, +inf or no finite logit for prompt "
                f"{int(self.rows.prompt[row])}, side {int(self.rows.side[row])}, token "
                f"{self._step} ({bad} rows in all); look at the weights of the models"
            )
        self._tokens, self._step = tokens, self._step + 1
        return sum(self._left) > 0

    def _spans(self) -> list[slice]:
        ends = itertools.accumulate(self._sizes, initial=0)
        return [slice(a, b) for a, b in itertools.pairwise(ends)]

    def _prefill(self, decoder: Decoder, span: slice) -> Tensor:
        ids, mask = self._prompts
        logits = decoder(ids, None if self._mask is None else mask, policies.positions(mask))
        # each prompt was read once; only now it becomes the rows of all samples and sides
        prompt = self.rows.prompt[span]
        decoder.cache.batch_select_indices(prompt)
        return logits[prompt]

    def _extend(self, decoder: Decoder, span: slice) -> Tensor | None:
        tokens = self._tokens[span, None]
        if not len(tokens):
            return None
        mask = self._mask
        if mask is not None:
            mask = mask[span, : self._prompts[0].shape[1] + self._step]
        return decoder(tokens, mask, self._lengths[span, None] + self._step - 1)

    def _compact(self) -> None:
        """Drop the rows that have ended, from the caches too."""
        keep = self.alive.nonzero()[:, 0]
        parts = keep.split(self._left)
        for decoder, span, part in zip(self._decoders, self._spans(), parts, strict=False):
            decoder.cache.batch_select_indices(part - span.start)
        if len(self._decoders) > len(self._sizes):
            self._decoders[-1].cache.batch_select_indices(keep)
        self.rows, self.alive = self.rows.select(keep), self.alive[keep]
        self._tokens, self._lengths = self._tokens[keep], self._lengths[keep]
        self._mask = None if self._mask is None else self._mask[keep]
        self._sizes = self._left
