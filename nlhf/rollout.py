"""Responses from a policy, a reference and their geometric mixture, in one decode loop.

Legend: P prompts of width L, R rows (responses), T tokens, V vocabulary.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import nlhf_kernels as nk
from nlhf import caches, linears
from nlhf import policy as policies
from nlhf.decoding import Batch, Decoder, all_rows
from nlhf.graphs import Graphs, fingerprint


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


def joined(pieces: Sequence[Completion], pad_token_id: int) -> Completion:
    """The rows of several completions, one below the other, padded to the longest."""
    if len(pieces) == 1:
        return pieces[0]
    T = max(piece.tokens.shape[1] for piece in pieces)

    def rows(name: str) -> Tensor | None:
        found = [getattr(piece, name) for piece in pieces]
        if any(x is None for x in found):
            return None
        fill = pad_token_id if name == "tokens" else 0
        return torch.cat([nn.functional.pad(x, (0, T - x.shape[1]), value=fill) for x in found])

    return Completion(*(rows(field.name) for field in dataclasses.fields(Completion)))


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
    cuda_graphs: bool | Graphs = False,
    together: Callable[[bool], bool] | None = None,
) -> list[Completion]:
    """Responses of each side to each prompt, one token at a time from the geometric mixture.

    One forward pass of each model and one ``nk.mixture_sample`` a token, whatever the number of
    sides. Each model has a cache of its own, also where two share their weights. A row that has
    ended costs little: the batch is made smaller as rows end (not with ``cuda_graphs``).

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
        cuda_graphs: record the step of a token as a CUDA graph and play it back, for models with
            full attention through sdpa in every layer. True records anew in every call; a
            ``Graphs`` that is given to call after call records once, and keeps its buffers.
        together: for a model that several processes run together, a layer's weights gathered at a
            time: asked at every look whether any process has a row left, so that all of them run
            the model equally often. Not with ``cuda_graphs``.

    Returns:
        One Completion a side, T the same for all; sample k of prompt p at row p * n_samples + k.
        Log-probabilities in float32, or float64 for a float64 model. Modes of the models and
        adapters are as before.

    Raises:
        ValueError: bad input; ``cuda_graphs`` off CUDA, with ``check``, or for a model that cannot
            be recorded; or a model returned NaN, +inf or no finite logit for a row that is
            named with its prompt and token (at any time, also without ``check``).
    """
    _check_sides(sides, with_ref)
    attention_mask = _check_prompts(input_ids, attention_mask, max_new_tokens)
    models = list({id(side.model): side.model for side in sides}.values())
    readers = [(model, contextlib.nullcontext()) for model in models]
    if with_ref:
        peft = [model for model in models if policies.has_adapters(model)]
        readers.append(policies.reference((peft or models)[0], ref))
    _check_fit([model for model, _ in readers], input_ids, attention_mask, max_new_tokens)
    graphs = _check_graphs(cuda_graphs, readers, input_ids.device, check)
    if graphs and together:
        raise ValueError("generate: cuda_graphs cannot wait for others; leave together out")
    eos = torch.tensor(policies.end_tokens(models[0], eos_token_id), device=input_ids.device)
    pad = policies.pad_token(models[0], pad_token_id)

    # the rows of one model lie together, so that its logits are one part of the batch
    ordered = [(s, side) for model in models for s, side in enumerate(sides) if side.model is model]
    counts = {s: len(input_ids) * side.n_samples for s, side in ordered}
    sizes = [sum(counts[s] for s, side in ordered if side.model is model) for model in models]
    rows = all_rows(ordered, attention_mask.sum(-1), _prompt_seeds(seed, input_ids))
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    sampling["check"] = check
    # the last token is never read
    length = input_ids.shape[1] + max_new_tokens - 1
    if graphs:
        length = -(-length // graphs.bucket) * graphs.bucket

    def new_batch() -> Batch:
        decoders = [Decoder(*reader, length, bool(graphs)) for reader in readers]
        return Batch(decoders, sizes, max_new_tokens, length, eos, pad, sampling, graphs, together)

    if graphs:
        # all that a recording has baked in; the models themselves, so that none of them dies
        kinds = [(model, type(context), *fingerprint(model)) for model, context in readers]
        key = (kinds, sizes, max_new_tokens, length, eos.tolist(), pad, sampling, eos.device)
        batch = graphs.prepare(key, new_batch)
    else:
        batch = new_batch()
    models = [model for model, _ in readers]
    with policies.evaluating(*models), caches.grouped(models), linears.skinny(models):
        tokens, mask, stats = batch.run(rows, input_ids, attention_mask)

    names = ["policy_logprobs", "ref_logprobs", "sampling_logprobs", "log_kept_mass"]
    if not with_ref:
        names.remove("ref_logprobs")
    answers = Completion(tokens, mask, **dict(zip(names, stats, strict=True)))
    starts = dict(zip(counts, itertools.accumulate(counts.values(), initial=0), strict=False))
    return [answers.rows(slice(starts[s], starts[s] + counts[s])) for s in range(len(sides))]


def _prompt_seeds(seed: int | Tensor, input_ids: Tensor) -> Tensor:
    P, device = len(input_ids), input_ids.device
    if not isinstance(seed, Tensor):
        return nk.fold_in(seed, torch.arange(P, device=device))
    if seed.dtype != torch.int64 or seed.shape != (P,):
        raise ValueError(f"generate: seed must be an int or int64 ({P},), got {_say(seed)}")
    return seed.to(device)


# ---- checks


def _say(x: object) -> str:
    if not isinstance(x, Tensor):
        return repr(x)
    return f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)} on {x.device}"


def _check_sides(sides: Sequence[Side], with_ref: bool) -> None:
    if not sides:
        raise ValueError("generate: sides must hold at least one Side, got none")
    for s, side in enumerate(sides):
        coef, n = side.mixture_coef, side.n_samples
        if not isinstance(coef, int | float) or not 0 <= coef <= 1:
            raise ValueError(f"generate: mixture_coef of side {s} must be in [0, 1], got {coef!r}")
        if not isinstance(n, int) or n < 1:
            raise ValueError(f"generate: n_samples of side {s} must be at least 1, got {n!r}")
        if coef and not with_ref:
            raise ValueError(
                f"generate: mixture_coef of side {s} must be 0 with with_ref=False, got {coef!r}"
            )


def _check_prompts(input_ids: Tensor, attention_mask: Tensor, max_new_tokens: int) -> Tensor:
    if input_ids.dtype != torch.int64 or input_ids.dim() != 2 or not input_ids.numel():
        raise ValueError(
            f"generate: input_ids must be int64 (P, L), not empty, got {_say(input_ids)}"
        )
    same = attention_mask.shape == input_ids.shape and attention_mask.device == input_ids.device
    if not same or attention_mask.dtype.is_floating_point:
        raise ValueError(
            f"generate: attention_mask must be bool or integer {tuple(input_ids.shape)} on "
            f"{input_ids.device} like input_ids, got {_say(attention_mask)}"
        )
    if not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise ValueError(f"generate: max_new_tokens must be at least 1, got {max_new_tokens!r}")
    mask = attention_mask != 0
    empty = (~mask.any(-1)).nonzero()
    if len(empty):
        raise ValueError(
            f"generate: prompt {int(empty[0])} is empty (its mask is all 0); give it one token, "
            "the beginning-of-sequence token for example"
        )
    holes = (mask[:, :-1] & ~mask[:, 1:]).any(-1).nonzero()
    if len(holes):
        raise ValueError(
            f"generate: prompt {int(holes[0])} must be padded to the left, got a 0 after a 1 in "
            "its mask; tokenize with padding_side='left'"
        )
    return mask


def _check_graphs(
    cuda_graphs: bool | Graphs, readers: list, device: torch.device, check: bool
) -> Graphs | None:
    if not cuda_graphs:
        return None
    graphs = cuda_graphs if isinstance(cuda_graphs, Graphs) else Graphs()
    if device.type != graphs.device:
        raise ValueError(
            f"generate: cuda_graphs needs models and prompts on CUDA, got them on {device}"
        )
    if check:
        raise ValueError(
            "generate: check=True looks at the values of each draw, which a graph cannot; leave "
            "cuda_graphs off in this call"
        )
    for model, _ in readers:
        if not caches.groups(model):
            kind = model.config.get_text_config()
            raise ValueError(
                "generate: cuda_graphs needs full attention in every layer and "
                f"attn_implementation='sdpa', got a {kind.model_type} model with "
                f"{kind._attn_implementation!r}; leave cuda_graphs off"
            )
    return graphs


def _check_fit(
    models: list[nn.Module], input_ids: Tensor, attention_mask: Tensor, max_new_tokens: int
) -> None:
    """Vocabulary, context and device of every model."""
    V = policies.vocabulary(models[0])
    used = input_ids[attention_mask]
    if used.min() < 0 or used.max() >= V:
        raise ValueError(
            f"generate: input_ids must be in [0, {V}), got {int(used.min())} to {int(used.max())}; "
            "use the tokenizer of the model"
        )
    longest = int(attention_mask.sum(-1).max())
    for model in models:
        policies.check_same_vocabulary(models[0], model)
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if context is not None and longest + max_new_tokens > context:
            raise ValueError(
                f"generate: the longest prompt has {longest} tokens, with max_new_tokens = "
                f"{max_new_tokens} that is over the context of {context}; shorten one of the two"
            )
        device = next(model.parameters()).device
        if device != input_ids.device:
            raise ValueError(
                f"generate: input_ids must be on {device} like the model, got {_say(input_ids)}"
            )
