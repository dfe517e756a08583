"""Responses from a policy, a reference and their geometric mixture, in one decode loop.

Legend: P prompts of width L, R rows (responses), T tokens, V vocabulary.
"""

import contextlib
import dataclasses
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import nlhf_kernels as nk
from nlhf import policy as policies

# a batch is made smaller when this share of its rows or less is left: copying the caches costs
# about what their growth by one token does, so the copies stay far below the forward passes
_COMPACT_AT = 0.75


@dataclass(frozen=True)
class Side:
    """Who answers: ``model``, mixed with the reference at ``mixture_coef``, so often a prompt."""

    model: nn.Module
    mixture_coef: float = 0.0
    n_samples: int = 1


@dataclass(frozen=True)
class Completion:
    """R responses of at most T tokens; made elsewhere, they enter as the same type.

    ``tokens`` int64 (R, T), any id under the mask (``generate`` writes the padding id); ``mask``
    bool (R, T), True for the response and its end-of-sequence token, padding to the right. The
    rest is floating (R, T) in nats, 0 under the mask, or None if unknown: log-probabilities of the
    whole distributions at the sampling temperature, of the filtered mixture that was drawn from,
    and the log of the mass that the filters kept.
    """

    tokens: Tensor
    mask: Tensor
    policy_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None
    sampling_logprobs: Tensor | None = None
    log_kept_mass: Tensor | None = None

    def __post_init__(self):
        shape, device = self.tokens.shape, self.tokens.device
        if self.tokens.dtype != torch.int64 or self.tokens.dim() != 2:
            raise ValueError(f"Completion: tokens must be int64 (R, T), got {_say(self.tokens)}")
        for name, x in vars(self).items():
            kind = x is None or (x.dtype == torch.bool if name == "mask" else True)
            if x is not None and not (kind and x.shape == shape and x.device == device):
                wanted = "bool " if name == "mask" else ""
                raise ValueError(
                    f"Completion: {name} must be {wanted}{tuple(shape)} on {device} like tokens, "
                    f"got {_say(x)}"
                )

    def rows(self, index: slice | Tensor) -> "Completion":
        """Some of the rows: a micro-batch."""
        return Completion(*(None if x is None else x[index] for x in vars(self).values()))


@dataclass(frozen=True)
class Pair:
    """Prompts (B, L), padded to the left, with two responses each."""

    input_ids: Tensor
    attention_mask: Tensor
    y: Completion
    y_other: Completion

    def __post_init__(self):
        counts = [len(x) for x in (self.input_ids, self.y.tokens, self.y_other.tokens)]
        if len(set(counts)) > 1 or self.attention_mask.shape != self.input_ids.shape:
            raise ValueError(
                "Pair: prompts, mask, y and y_other must have one row each, got "
                f"{_say(self.input_ids)}, {_say(self.attention_mask)}, {counts[1]} and {counts[2]}"
            )

    def rows(self, index: slice | Tensor) -> "Pair":
        """Some of the rows: a micro-batch."""
        prompts = self.input_ids[index], self.attention_mask[index]
        return Pair(*prompts, self.y.rows(index), self.y_other.rows(index))


def generate_pair(
    policy: nn.Module,
    ref: nn.Module | None,
    input_ids: Tensor,
    attention_mask: Tensor,
    *,
    mixture_coef: float,
    **settings,
) -> Pair:
    """y from the policy and y' from its mixture with the reference, with independent noise.

    The case of ``generate`` with the sides (policy, 0) and (policy, ``mixture_coef``).
    """
    sides = [Side(policy), Side(policy, mixture_coef)]
    answers = generate(sides, ref, input_ids, attention_mask, **settings)
    return Pair(input_ids, attention_mask, *answers)


def mixture_generate(
    policy: nn.Module,
    ref: nn.Module | None,
    input_ids: Tensor,
    attention_mask: Tensor,
    *,
    mixture_coef: float,
    **settings,
) -> Completion:
    """y' alone. Its draws are those of side 0, so not the y' of ``generate_pair``."""
    side = Side(policy, mixture_coef)
    return generate([side], ref, input_ids, attention_mask, **settings)[0]


@torch.no_grad()
def generate(
    sides: Sequence[Side],
    ref: nn.Module | None,
    input_ids: Tensor,
    attention_mask: Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    eos_token_id: int | Iterable[int] | None = None,
    pad_token_id: int | None = None,
    seed: int | Tensor,
    with_ref: bool = True,
    check: bool = False,
) -> list[Completion]:
    """Responses of each side to each prompt, one token at a time from the geometric mixture.

    One forward pass of each model and one ``nk.mixture_sample`` a token, whatever the number of
    sides. Each model has a cache of its own, also where two share their weights. A row that has
    ended costs little: the batch is made smaller as rows end.

    Args:
        sides: what to draw; sides of the same model are decoded together.
        ref: the reference policy; None: the base, adapters off, of the first PEFT model in
            ``sides``.
        input_ids, attention_mask: (P, L) int64 and bool or integer, padded to the left.
        max_new_tokens: at least 1; prompt and response must fit the context of every model.
        temperature, top_k, top_p, min_p: as in ``nk.mixture_sample``.
        eos_token_id, pad_token_id: default to those of the first side's model.
        seed: an int s, which gives prompt p the seed fold_in(s, p), or (P,) int64, one a prompt.
            A row draws with fold_in(fold_in(prompt's seed, sample), side), so its tokens depend
            neither on the batch around it nor on the padding.
        with_ref: False leaves the reference out (plain sampling, no ``ref_logprobs``), for which
            every coefficient must be 0.
        check: look at every parameter of each draw (``nk.mixture_sample``; a host sync a token).

    Returns:
        One Completion a side, T the same for all; sample k of prompt p at row p * n_samples + k.
        Log-probabilities in float32, or float64 for a float64 model. Modes of the models and
        adapters are as before.

    Raises:
        ValueError: bad input; or a model returned NaN, +inf or no finite logit for a row that is
            named with its prompt and token (at any time, also without ``check``).
    """
    _check_sides(sides, with_ref)
    _check_prompts(input_ids, attention_mask)
    models = list({id(side.model): side.model for side in sides}.values())
    decoders = [_Decoder(model, contextlib.nullcontext()) for model in models]
    if with_ref:
        peft = [model for model in models if policies.has_adapters(model)]
        decoders.append(_Decoder(*policies.reference((peft or models)[0], ref)))
    _check_fit(decoders, input_ids, attention_mask, max_new_tokens)
    eos = torch.tensor(policies.end_tokens(models[0], eos_token_id), device=input_ids.device)
    pad = policies.pad_token(models[0], pad_token_id)

    # rows of one model lie together: `of_side` says where those of each side are
    order = sorted(range(len(sides)), key=lambda s: _place(models, sides[s].model))
    counts = [len(input_ids) * sides[s].n_samples for s in order]
    table = _rows([(s, sides[s]) for s in order], input_ids, seed)
    of_side = dict(zip(order, torch.arange(sum(counts)).split(counts), strict=True))
    groups = [0] * len(models)
    for s, count in zip(order, counts, strict=True):
        groups[_place(models, sides[s].model)] += count

    batch = _Batch(decoders, groups, table, input_ids, attention_mask, max_new_tokens)
    shape = (len(table.prompt), max_new_tokens)
    tokens, mask = input_ids.new_full(shape, pad), torch.zeros_like(batch.rows, dtype=torch.bool)
    mask = mask[:, None].repeat(1, max_new_tokens)
    logprobs = None
    with policies.evaluating(*(d.model for d in decoders)):
        for position in range(max_new_tokens):
            policy_logits, ref_logits = batch.logits()
            draw = nk.mixture_sample(
                policy_logits,
                ref_logits,
                mixture_coef=batch.table.coef if with_ref else None,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                min_p=min_p,
                seed=batch.table.seed,
                position=position,
                check=check,
            )
            alive, rows = batch.alive, batch.rows
            kinds = torch.stack([x for x in draw[1:] if len(x) == len(rows)])
            if logprobs is None:
                logprobs = kinds.new_zeros(len(kinds), *shape)
            logprobs[:, rows, position] = torch.where(alive, kinds, 0)
            tokens[rows, position] = torch.where(alive, draw.tokens, pad)
            mask[rows, position] = alive
            if not batch.advance(draw.tokens, eos):
                break

    width = position + 1
    names = ["policy_logprobs", "ref_logprobs", "sampling_logprobs", "log_kept_mass"]
    if not with_ref:
        names.remove("ref_logprobs")
    kinds = dict(zip(names, logprobs[..., :width], strict=True))
    whole = Completion(tokens[:, :width], mask[:, :width], **kinds)
    return [whole.rows(_span(of_side[s])) for s in range(len(sides))]


@dataclass(frozen=True)
class _Rows:
    """What each row of the batch is drawn with, (R,) each."""

    prompt: Tensor
    sample: Tensor
    side: Tensor
    coef: Tensor
    seed: Tensor

    def select(self, index: Tensor) -> "_Rows":
        return _Rows(*(x[index] for x in vars(self).values()))
