"""The parts of the decode loop: its rows, a model with its cache, and the batch in flight."""

import functools
import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import nlhf_kernels as nk
from nlhf import caches
from nlhf import policy as policies
from nlhf.graphs import Graphs

# a batch is made smaller when this share of its rows or less is left: all the copies of a rollout
# together then cost no more than reading the caches three times, which every token does once
_COMPACT_AT = 0.75
# tokens from one look of the host at the batch to the next; where a look stalls the device, rows
# that have ended run on for a few tokens instead
LOOK_EVERY = {"cpu": 1}
_LOOK_EVERY = 16


@dataclass(frozen=True)
class Rows:
    """What belongs to the rows of a batch, (R,) each; ``place`` is where the result goes.

    ``token`` is the last one drawn, ``next`` its position id, ``alive`` whether the row goes on.
    """

    place: Tensor
    prompt: Tensor
    side: Tensor
    coef: Tensor
    seed: Tensor
    token: Tensor
    next: Tensor
    alive: Tensor

    def select(self, index: Tensor) -> "Rows":
        return Rows(*(x[index] for x in vars(self).values()))

    def copy_(self, other: "Rows") -> None:
        for x, y in zip(vars(self).values(), vars(other).values(), strict=True):
            x.copy_(y)


def all_rows(ordered: list[tuple[int, Any]], lengths: Tensor, seeds: Tensor) -> Rows:
    """All rows of ``ordered``, numbers and sides: side by side, prompt-major inside a side.

    ``lengths`` and ``seeds`` (P,) are those of the prompts.
    """
    P, like = len(seeds), {"dtype": torch.int64, "device": seeds.device}
    pieces = []
    for s, side in ordered:
        n = side.n_samples
        prompt = torch.arange(P, **like).repeat_interleave(n)
        sample = torch.arange(n, **like).repeat(P)
        coef = torch.full((P * n,), side.mixture_coef, dtype=torch.float64, device=seeds.device)
        pieces.append((prompt, sample, torch.full_like(prompt, s), coef))
    prompt, sample, side, coef = map(torch.cat, zip(*pieces, strict=True))
    seed = nk.fold_in(nk.fold_in(seeds[prompt], sample), side)
    place, alive = torch.arange(len(prompt), **like), torch.ones_like(prompt, dtype=torch.bool)
    return Rows(place, prompt, side, coef, seed, torch.zeros_like(prompt), lengths[prompt], alive)


class Decoder:
    """A model, the context it runs in, and a cache of ``length`` columns that is nobody else's.

    To be made before ``caches.grouped`` is entered; ``static`` is for graphs.
    """

    def __init__(
        self, model: nn.Module, context: AbstractContextManager, length: int, static: bool = False
    ):
        self.model = model
        self.cache = caches.new_cache(model.config, length, static)
        self._context = context
        attention = model.config.get_text_config()._attn_implementation
        self._takes_4d = attention == "sdpa" and not any(self.cache.is_sliding)
        # scores take a mask of their own dtype as it is; a boolean one, each layer would convert
        self.mask_dtype = model.dtype if caches.groups(model) else torch.bool

    def __call__(self, ids: Tensor, mask: Tensor | None, position_ids: Tensor) -> Tensor:
        """Logits (R, V) after the last column of ``ids`` (R, L).

        ``mask`` covers the cache too: (R, columns), or (R, 1, 1, columns) for a single column.
        """
        if mask is not None and mask.dim() == 4 and not self._takes_4d:
            mask = mask[:, 0, 0]
        # of two dimensions, transformers would look at its values, and stall a GPU
        with self._context:
            return policies.last_logits(self.model, ids, mask, position_ids, 1, self.cache)[:, 0]


class Batch:
    """The rows that are being written, and the decoders that do it.

    ``sizes`` says how many rows each policy has, one after the other. A decoder more than that is
    the reference, which reads all rows. ``sampling`` goes to ``nk.mixture_sample``. With
    ``graphs`` all but the first token is a recorded step that touches static tensors only, and the
    batch can be started again; it is never made smaller: a recording has one shape, and what it
    mostly reads, the weights, is read whatever the rows. ``together`` is told whether a row is left
    and says whether to go on: where processes run a model together, each runs it as often as all.
    """

    def __init__(
        self,
        decoders: list[Decoder],
        sizes: list[int],
        max_new_tokens: int,
        length: int,
        eos: Tensor,
        pad: int,
        sampling: dict[str, Any],
        graphs: Graphs | None = None,
        together: Callable[[bool], bool] | None = None,
    ):
        self._decoders, self._whole, self._graphs = decoders, sizes, graphs
        self._together = together
        self._T, self._length = max_new_tokens, length
        self._eos, self._pad, self._sampling = eos, pad, sampling
        self._every = LOOK_EVERY.get(eos.device.type, _LOOK_EVERY)
        like = {"dtype": torch.int64, "device": eos.device}
        # how many tokens have been drawn, and which column the next forward pass writes
        self._position, self._column = torch.zeros((), **like), torch.zeros(1, **like)
        self._tokens = torch.empty(max_new_tokens, sum(sizes), **like)
        self._mask = torch.empty_like(self._tokens, dtype=torch.bool)
        self._kinds: Tensor | None = None
        self._masks: dict[torch.dtype, Tensor] = {}
        self.rows: Rows | None = None

    def run(self, rows: Rows, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        """Tokens and mask (R, n), and log-probabilities (kinds, R, n); n until the last row ends.

        ``attention_mask`` is boolean.
        """
        with torch.cuda.device_of(input_ids):
            self._start(rows, input_ids, attention_mask)
            step = functools.partial(self._read_prompts, input_ids, attention_mask)
            while True:
                step()
                self._step += 1
                last = self._step == self._T
                if (last or self._step % self._every == 0) and (not self._look(rows) or last):
                    break
                fixed = self._graphs or self._together
                if not fixed and sum(self._left) <= _COMPACT_AT * sum(self._sizes):
                    self._compact()
                step = self._replay if self._graphs else self._read_tokens
        n = int(self._mask.any(1).sum())
        # copies, because a static batch writes over its own
        whole = {"memory_format": torch.contiguous_format}
        tokens, mask = (x[:n].T.clone(**whole) for x in (self._tokens, self._mask))
        return tokens, mask, self._kinds[:, :n].transpose(1, 2).clone(**whole)

    def _start(self, rows: Rows, input_ids: Tensor, attention_mask: Tensor) -> None:
        """Everything as before the first token; in place where a graph knows the tensors."""
        self._sizes = self._left = self._whole
        self._step = self._looked = 0
        self._everyone = rows
        self._width, self._padded = input_ids.shape[1], not attention_mask.all()
        self._position.zero_()
        self._column.fill_(self._width)
        self._tokens.fill_(self._pad)
        self._mask.zero_()
        for decoder in self._decoders:
            decoder.cache.reset()
        masks = self._row_masks(rows.prompt, attention_mask)
        if self.rows is not None:
            self.rows.copy_(rows)
            for dtype, mask in masks.items():
                self._masks[dtype].copy_(mask)
        else:
            self.rows = rows
            self._masks = masks

    def _row_masks(self, prompt: Tensor, attention_mask: Tensor) -> dict[torch.dtype, Tensor]:
        """(R, 1, 1, length or more) per dtype, none without padding; a graph fills in the tail."""
        if not self._padded and not self._graphs:
            return {}
        # a GPU's attention copies a mask whose rows do not begin at a multiple of 8
        tail = (len(prompt), -(-self._length // 8) * 8 - self._width)
        new = attention_mask.new_zeros if self._graphs else attention_mask.new_ones
        seen = torch.cat([attention_mask[prompt], new(tail)], -1)[:, None, None]
        masks = {decoder.mask_dtype: seen for decoder in self._decoders}
        for dtype in masks:
            if dtype != torch.bool:
                zero = torch.zeros_like(seen, dtype=dtype)
                masks[dtype] = zero.masked_fill_(~seen, -torch.inf)
        return masks

    # ---- steps: one forward pass of each model, one draw

    def _read_prompts(self, input_ids: Tensor, attention_mask: Tensor) -> None:
        position_ids = policies.positions(attention_mask)
        mask = attention_mask if self._padded else None

        def read(decoder, span):
            logits = decoder(input_ids, mask, position_ids)
            # each prompt was read once; only now it becomes the rows of all samples and sides
            prompt = self._everyone.prompt[span]
            decoder.cache.batch_select_indices(prompt)
            return logits[prompt]

        self._draw(*self._read(read))

    def _read_tokens(self, seen: int | None = None) -> None:
        """``seen`` is how many columns there are, if not just those that are written."""
        columns = seen or self._width + self._step

        def read(decoder, span):
            tokens = self.rows.token[span, None]
            mask = self._masks.get(decoder.mask_dtype)
            if mask is not None:
                mask = mask[span, ..., :columns]
            return decoder(tokens, mask, self.rows.next[span, None]) if len(tokens) else None

        logits = self._read(read)
        self.rows.next.add_(1)
        self._draw(*logits)

    def _replay(self) -> None:
        bucket = self._graphs.bucket
        seen = -(-(self._width + self._step) // bucket) * bucket

        def step():
            for decoder in self._decoders:
                for layer in decoder.cache.layers:
                    layer.fix(self._column, seen)
            for mask in self._masks.values():
                mask.index_fill_(3, self._column, 0)
            self._read_tokens(seen)
            self._column.add_(1)

        self._graphs.play(seen, step)

    def _read(self, read) -> tuple[Tensor, Tensor | None]:
        """Next-token logits (R, V) of the policies, row for row, and of the reference."""
        own = [read(*pair) for pair in zip(self._decoders, self._spans(), strict=False)]
        own = [logits for logits in own if logits is not None]
        ref = None
        if len(self._decoders) > len(self._sizes):
            ref = read(self._decoders[-1], slice(None))
        return own[0] if len(own) == 1 else torch.cat(own), ref

    def _draw(self, policy_logits: Tensor, ref_logits: Tensor | None) -> None:
        rows = self.rows
        draw = nk.mixture_sample(
            policy_logits,
            ref_logits,
            mixture_coef=None if ref_logits is None else rows.coef,
            seed=rows.seed,
            position=self._position,
            **self._sampling,
        )
        kinds = torch.stack([x for x in draw[1:] if len(x)])
        if self._kinds is None:
            self._kinds = kinds.new_zeros(len(kinds), *self._tokens.shape)
        drawn = torch.where(rows.alive, draw.tokens, self._pad)
        # as one line of tokens: where a graph writes cannot be a number
        at = torch.add(rows.place, self._position, alpha=self._tokens.shape[1])
        self._tokens.view(-1).index_copy_(0, at, drawn)
        self._mask.view(-1).index_copy_(0, at, rows.alive)
        kinds = torch.where(rows.alive, kinds, 0)
        self._kinds.view(len(kinds), -1).index_copy_(1, at, kinds)
        rows.alive.logical_and_((drawn[:, None] != self._eos).all(-1))
        # a bad row, -1, is found at the next look, and until then must not stop the device
        rows.token.copy_(drawn.clamp_(min=0))
        self._position.add_(1)

    # ---- what the host decides

    def _look(self, rows: Rows) -> bool:
        """Whether a row is left to go on with. The one host sync."""
        new = self._tokens[self._looked : self._step]
        left = [part.sum() for part in self.rows.alive.split(self._sizes)]
        *self._left, least = torch.stack([*left, new.amin()]).tolist()
        if least < 0:
            bad = new < 0
            at = int(bad.any(1).nonzero()[0])
            row = int(bad[at].nonzero()[0])
            raise ValueError(
                f"generate: a model returned NaN, +inf or no finite logit for prompt "
                f"{int(rows.prompt[row])}, side {int(rows.side[row])}, token "
                f"{self._looked + at} ({int(bad[at].sum())} rows in all); look at the weights of "
                "the models"
            )
        self._looked = self._step
        goes_on = sum(self._left) > 0
        return self._together(goes_on) if self._together else goes_on

    def _spans(self) -> list[slice]:
        ends = itertools.accumulate(self._sizes, initial=0)
        return [slice(a, b) for a, b in itertools.pairwise(ends)]

    def _compact(self) -> None:
        """Drop the rows that have ended, from the caches too."""
        keep = self.rows.alive.nonzero()[:, 0]
        parts = keep.split(self._left)
        for decoder, span, part in zip(self._decoders, self._spans(), parts, strict=False):
            decoder.cache.batch_select_indices(part - span.start)
        if len(self._decoders) > len(self._sizes):
            self._decoders[-1].cache.batch_select_indices(keep)
        self.rows = self.rows.select(keep)
        self._masks = {dtype: mask[keep] for dtype, mask in self._masks.items()}
        self._sizes = self._left
