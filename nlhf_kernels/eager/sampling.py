"""One draw per row from the geometric mixture, from logits or from hidden states."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from nlhf_kernels.eager.logits import linear_logits, statistics_dtype, whole_vocabulary
from nlhf_kernels.noise import MASK32, fold_in, gumbel, philox, split

TILE = 1024


class MixtureSample(NamedTuple):
    tokens: Tensor
    policy_logprobs: Tensor
    ref_logprobs: Tensor
    sampling_logprobs: Tensor
    log_kept_mass: Tensor


def mixture_sample(
    policy_logits: Tensor,
    ref_logits: Tensor | None = None,
    *,
    mixture_coef: float | Tensor | None = None,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
    seed: int | Tensor,
    position: int | Tensor,
    check: bool = False,
    extrapolate: bool = False,
    group: ProcessGroup | None = None,
    backend: str = "",
) -> MixtureSample:
    """Draw one token per row from the geometric mixture of a policy and a reference policy.

    Formula (Munos et al. 2023, appendix F.1, one step at a time), with b = ``mixture_coef``::

        tokens ~ filter(softmax(((1 - b) * policy_logits + b * ref_logits) / temperature))

    Args:
        policy_logits: (B, V) float16, bfloat16, float32 or float64; any row stride, last stride 1.
        ref_logits: (B, V), its dtype and row stride may differ; ``None`` is a plain sampler, and
            then ``mixture_coef`` is 0 or left out.
        mixture_coef: weight of the reference in [0, 1] (outside only with ``extrapolate``).
        temperature: at least 0; 0 takes the argmax, the lowest id on a tie.
        top_k, top_p, min_p: filters, applied in this order after mixing and temperature, each on
            what is left and renormalised; min_p is relative to the maximum. Off: 0, 1, 0. Ties:
            lowest id first, exactly ``top_k`` survive.
        seed: int64. Rows with equal seed and position share their noise; an int s gives row r the
            seed ``fold_in(s, r)``. With explicit seeds a draw does not depend on the batch around
            it.
        position: int64, at least 0: how many tokens the row has generated (its low 32 bits count).
        check: look at the values of tensors (a host sync) and raise on a bad row or parameter.
        extrapolate: allow coefficients outside [0, 1] (contrastive decoding).
        group: the ranks that share the vocabulary, each with the logits (B, V_rank) of its ids, in
            the order of the ranks; all else is the same on each. Rows are gathered, and every rank
            draws the same tokens. Not under torch.compile.
        backend: "", "eager", "cpp", "triton" or "cuda".

        ``mixture_coef``, ``temperature``, the filters, ``seed`` and ``position`` are scalars or
        (B,) tensors on the device of the logits.

    Returns:
        ``MixtureSample``, each (B,): ``tokens`` int64; ``policy_logprobs`` and ``ref_logprobs``
        (empty without a reference) of the whole distributions at the sampling temperature (at 1
        when it is 0);
        ``sampling_logprobs`` of the filtered mixture; ``log_kept_mass`` <= 0 of the filters, so
        that log of the whole mixture = sampling_logprobs + log_kept_mass. In nats.

        A token that is -inf in a model with a nonzero coefficient is never drawn. A row with NaN or
        +inf, or without a finite logit, gives token -1 and NaN.

    Raises:
        ValueError: wrong shapes, dtypes or devices, Python scalars out of range, and with
            ``check=True`` tensor values out of range or a bad row, which is named.

    Numerics: float32 statistics (float64 if an input is). The draw is exact and the same on every
    backend but for floating-point ties: one Gumbel per tile of 1,024 ids picks the tile, a Gumbel
    race picks the id inside it; the noise is Philox 4x32-10 keyed by seed, counted by (position,
    tile, stage, block).
    """
    with torch.no_grad():
        policy_logits = whole_vocabulary(policy_logits, group)
        ref_logits = None if ref_logits is None else whole_vocabulary(ref_logits, group)
        dtype = statistics_dtype(policy_logits, ref_logits)
        B = policy_logits.shape[0]
        device = policy_logits.device

        def row(value, kind=dtype):
            # not as_tensor, which would make torch.compile start again for every new int
            if not isinstance(value, Tensor):
                value = torch.full((), value, dtype=kind, device=device)
            return value.to(kind).expand(B)[:, None]

        coef, heat = row(0.0 if mixture_coef is None else mixture_coef), row(temperature)
        policy = policy_logits.to(dtype)
        ref = None if ref_logits is None else ref_logits.to(dtype)
        mixture = policy if ref is None else _mix(policy, ref, coef)

        greedy = heat == 0
        divisor = torch.where(greedy, 1, heat)
        scores = _tempered(mixture, divisor)
        kept = scores
        if not filters_off(top_k, top_p, min_p):
            keep = _keep(scores, row(top_k, torch.int64), row(top_p), row(min_p))
            kept = scores.masked_fill(~keep, -torch.inf)

        if isinstance(seed, Tensor):
            seeds = seed.expand(B)
        else:
            seeds = fold_in(seed, torch.arange(B, device=device))
        drawn = _draw(kept, seeds, row(position, torch.int64)[:, 0])
        tokens = torch.where(greedy[:, 0], mixture.argmax(-1), drawn)

        heated = (heat[:, 0] >= 0) & (heat[:, 0] < torch.inf)
        bad = ~_usable(policy) | ~_usable(mixture) | ~heated
        if ref is not None:
            bad |= ~_usable(ref)

        def at_token(x):
            logprobs = (x - x.logsumexp(-1, keepdim=True)).gather(-1, tokens[:, None])[:, 0]
            return logprobs.masked_fill(bad, torch.nan)

        whole, truncated = scores.logsumexp(-1), kept.logsumexp(-1)
        kept_mass = (truncated - whole).clamp(max=0)
        return MixtureSample(
            tokens.masked_fill(bad, -1),
            at_token(_tempered(policy, divisor)),
            policy.new_empty(0) if ref is None else at_token(_tempered(ref, divisor)),
            torch.where(greedy[:, 0] & ~bad, 0, at_token(kept)),
            torch.where(greedy[:, 0], 0, kept_mass).masked_fill(bad, torch.nan),
        )


def linear_mixture_sample(
    policy_hidden: Tensor,
    policy_weight: Tensor,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    *,
    policy_bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    softcap: float | None = None,
    mixture_coef: float | Tensor | None = None,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
    seed: int | Tensor,
    position: int | Tensor,
    check: bool = False,
    extrapolate: bool = False,
    group: ProcessGroup | None = None,
    backend: str = "",
) -> MixtureSample:
    """The draw of ``mixture_sample`` from hidden states: the LM head is part of it.

    Formula, for each of the two models::

        logits = hidden @ weight.T + bias   (with a softcap: softcap * tanh(logits / softcap))

    and the rest is that of ``mixture_sample``.

    Args:
        policy_hidden: (B, D) float16, bfloat16, float32 or float64; any row stride, last stride 1.
        policy_weight: (V, D), the dtype of its hidden states; any row stride, last stride 1.
        ref_hidden: (B, D_ref), its dtype may differ from the policy's; ``None``: a plain sampler.
        ref_weight: (V, D_ref), the dtype of its hidden states. ``None``, or the same memory as
            ``policy_weight``: one head for both, which is read once. ``None`` shares the bias too.
        policy_bias, ref_bias: (V,), the dtype of its weight, or ``None``; -inf bans a token.
        softcap: above 0 (at least 1e-30), for both models, before they are mixed; or ``None``.
        mixture_coef, temperature, top_k, top_p, min_p, seed, position, check, extrapolate, backend:
            as in ``mixture_sample``.
        group: as there; each rank has the weights (V_rank, D) and biases of its ids.

    Returns:
        ``MixtureSample``, as ``mixture_sample`` gives it. No gradient.

    Raises:
        ValueError: as in ``mixture_sample``.

    Numerics: products are summed, and logits kept, in float32 (float64 if an input is), never
    rounded to the dtype of the inputs. Logits differ in their last bits between backends and batch
    sizes, so tokens agree but for near ties. With a filter, in float64, or for more rows than the
    fused kernel is meant for, logits are made by torch's matrix product, with its settings for
    float32, and drawn from by the ``mixture_sample`` of the same backend.
    """
    # autocast would round the logits
    with torch.no_grad(), torch.autocast(policy_hidden.device.type, enabled=False):
        dtype = statistics_dtype(policy_hidden, ref_hidden)
        if ref_weight is None:
            ref_weight, ref_bias = policy_weight, policy_bias
        ref = None
        if ref_hidden is not None:
            ref = linear_logits(ref_hidden, ref_weight, ref_bias, softcap, dtype)
        return mixture_sample(
            linear_logits(policy_hidden, policy_weight, policy_bias, softcap, dtype),
            ref,
            mixture_coef=mixture_coef,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            seed=seed,
            position=position,
            group=group,
        )


def filters_off(top_k: int | Tensor, top_p: float | Tensor, min_p: float | Tensor) -> bool:
    """Whether no filter is asked for; a tensor counts as asked for: looking would be a sync."""
    scalars = not any(isinstance(x, Tensor) for x in (top_k, top_p, min_p))
    return scalars and top_k == 0 and top_p == 1 and min_p == 0


def _mix(policy: Tensor, ref: Tensor, coef: Tensor) -> Tensor:
    """(1 - coef) * policy + coef * ref; a coefficient of 0 leaves its model out, infinities too."""
    policy = torch.where(coef == 1, 0, policy)
    ref = torch.where(coef == 0, 0, ref)
    never = (policy == -torch.inf) | (ref == -torch.inf)
    return ((1 - coef) * policy + coef * ref).masked_fill(never, -torch.inf)


def _tempered(logits: Tensor, divisor: Tensor) -> Tensor:
    """Scaled logits whose maximum is 0, so that a tiny temperature does not overflow."""
    return (logits - logits.amax(-1, keepdim=True)) / divisor


def _usable(logits: Tensor) -> Tensor:
    """(B,) no NaN, no +inf and a finite value in a row: its maximum says all three."""
    return logits.amax(-1).isfinite()


def _keep(scores: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """(B, V) which tokens the three filters keep."""
    scores, order = scores.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(scores.shape[-1], device=scores.device).expand_as(scores)
    keep = (top_k == 0) | (rank < top_k)
    mass = scores.masked_fill(~keep, -torch.inf).softmax(-1).double().cumsum(-1)
    before = torch.cat([torch.zeros_like(mass[:, :1]), mass[:, :-1]], -1)
    keep &= (top_p >= 1) | (rank == 0) | (before < top_p)
    keep &= scores >= min_p.log()
    return torch.empty_like(keep).scatter_(-1, order, keep)


def _draw(scores: Tensor, seeds: Tensor, position: Tensor) -> Tensor:
    """The hierarchical draw: (B,) ids from softmax(scores), (B, V) with -inf for what is out."""
    B, V = scores.shape
    count = -(-V // TILE)
    tiles = torch.nn.functional.pad(scores, (0, count * TILE - V), value=-torch.inf)
    tiles = tiles.view(B, count, TILE)
    key = tuple(k[:, None] for k in split(seeds))
    place = (position & MASK32)[:, None]

    tile_ids = torch.arange(count, device=scores.device)
    first = philox((place, tile_ids, 1, 0), key)[0]
    winner = (tiles.logsumexp(-1) + gumbel(first, scores.dtype)).argmax(-1)

    blocks = torch.arange(TILE // 4, device=scores.device)
    words = torch.stack(philox((place, winner[:, None], 2, blocks), key), -1).view(B, TILE)
    inside = tiles.gather(1, winner[:, None, None].expand(B, 1, TILE))[:, 0]
    lane = (inside + gumbel(words, scores.dtype)).argmax(-1)
    return winner * TILE + lane
