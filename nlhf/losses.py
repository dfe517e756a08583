"""Losses on a pair of responses: pure functions of models, pair and preference."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

import nlhf_kernels as nk
from nlhf import policy as policies
from nlhf import responses
from nlhf.rollout import Completion, Pair


def nash_md_pg(
    policy: nn.Module,
    ref: nn.Module | None,
    pair: Pair,
    preference: Tensor,
    *,
    tau: float,
    temperature: float = 1.0,
    kl: str = "reward_to_go",
    baseline: float = 0.5,
    anchors: Sequence[tuple[Tensor, float]] = (),
    head: str = "auto",
    packing: bool = False,
    inplace_backward: bool = True,
) -> nk.PairwisePGLoss:
    """The loss of Nash-MD-PG (Munos et al. 2023, eq. 13): its gradient improves on the opponent.

    That of every policy gradient of the family: they differ in who the opponent is, and in anchors.

    One forward pass of the policy over prompt and y, and ``nk.linear_pairwise_pg_loss`` or
    ``nk.pairwise_pg_loss``, whose docstring has the formula. y' enters through the preference
    alone. Inside of the contexts of ``nlhf.memory`` it takes less memory.

    Args:
        policy: its gradient is taken; train or eval mode as it is.
        ref: the reference, None: the base of a PEFT policy with its adapters off. It is run only if
            kl is "exact", or if ``pair.y.ref_logprobs`` is None and it is needed: tau is above 0,
            or ``ref`` is given.
        pair: B prompts with responses; those of ``pair.y`` are from the policy.
        preference: (B,) P(y > y'), or any real per sequence.
        tau, temperature, kl, baseline: as in the op; the rollout's temperature.
        anchors: more than the reference: (B, T) log-probabilities of y under each, and the strength
            of its KL. Not with kl "exact".
        head, packing: as ``head`` and ``packed`` of ``nlhf.responses.read``.
        inplace_backward: the backward writes over the logits, if there are any, which nothing else
            reads.

    Returns:
        The op's result: loss (), the mean over the B sequences of this pair, and detached (B, T)
        logprobs, ref_logprobs, entropy and kl, the last with respect to the reference.

    Raises:
        ValueError: bad shapes or parameters; no reference where one is needed; as in
            ``nlhf.responses.read``.
    """
    y, ref_logprobs, ref_reading = pair.y, pair.y.ref_logprobs, None
    if kl == "exact":
        # the rollout's log-probabilities are of the tokens that were drawn, not of all
        ref_logprobs, ref_reading = None, _read_ref(policy, ref, pair, y, head, packing)
    elif ref_logprobs is None and (tau or ref is not None):
        # no name for this reading: its logits must be gone when those of the policy are made
        ref_logprobs = _logprobs(_read_ref(policy, ref, pair, y, head, packing), temperature)
    if anchors:
        if ref_logprobs is None:
            raise ValueError("nash_md_pg: anchors need a reference, and kl other than 'exact'")
        ref_logprobs = [ref_logprobs, *(x for x, _ in anchors)]
        tau = [tau, *(strength for _, strength in anchors)]
    result = responses.read(policy, pair, y, head, packing).pairwise_pg_loss(
        preference.to(y.tokens.device),
        ref_reading,
        ref_logprobs,
        inplace_backward,
        tau=tau,
        kl=kl,
        baseline=baseline,
        temperature=temperature,
    )
    if anchors:
        result = result._replace(ref_logprobs=result.ref_logprobs[0], kl=result.kl[0])
    return result


class Contrast(NamedTuple):
    """loss (), and detached: (B, T) of y as the policy gradient returns them, margins (B,)."""

    loss: Tensor
    logprobs: Tensor
    ref_logprobs: Tensor
    entropy: Tensor
    kl: Tensor
    margins: Tensor


def contrast(
    policy: nn.Module,
    pair: Pair,
    preference: Tensor,
    other_preference: Tensor | None = None,
    *,
    method: str,
    anchors: Sequence[tuple[Tensor, Tensor]],
    temperature: float = 1.0,
    head: str = "auto",
    packing: bool = False,
    inplace_backward: bool = True,
    **parameters,
) -> Contrast:
    """A loss of ``nk.pair_loss`` between y and y': IPO, INPO, ONPO, MNPO, SPPO, DNO, EGPO.

    A forward pass of the policy over each of the two.

    Args:
        policy: its gradient is taken; train or eval mode as it is.
        pair: B prompts with responses, with ``ref_logprobs`` of y.
        preference, other_preference: (B,) as the method takes them.
        method, parameters: as in the op (tau, eta, weights).
        anchors: (B, T) log-probabilities of y and of y' under each frozen policy.
        temperature: the rollout's.
        head, packing, inplace_backward: as in ``nash_md_pg``.

    Raises:
        ValueError: bad shapes or parameters; as in ``nlhf.responses.read``.
    """

    def read(completion: Completion) -> nk.TokenLogprobs:
        reading = responses.read(policy, pair, completion, head, packing)
        return reading.token_logprobs(temperature, inplace_backward)

    y, y_other = read(pair.y), read(pair.y_other)
    device = pair.y.tokens.device
    judged = [None if p is None else p.to(device) for p in (preference, other_preference)]
    result = nk.pair_loss(
        y.logprobs.sum(-1),
        y_other.logprobs.sum(-1),
        *(torch.stack([x.sum(-1) for x in side]) for side in zip(*anchors, strict=True)),
        *judged,
        method=method,
        **parameters,
    )
    logprobs, ref_logprobs = y.logprobs.detach(), pair.y.ref_logprobs
    kl = logprobs - ref_logprobs
    return Contrast(result.loss, logprobs, ref_logprobs, y.entropy.detach(), kl, result.margins)


@torch.no_grad()
def frozen_logprobs(
    model: nn.Module,
    pair: Pair,
    completion: Completion,
    temperature: float,
    *,
    head: str = "auto",
    packing: bool = False,
) -> Tensor:
    """(B, T) log-probabilities of a response under an anchor, 0 under the mask."""
    with policies.evaluating(model):
        return _logprobs(responses.read(model, pair, completion, head, packing), temperature)


@torch.no_grad()
def score(
    policy: nn.Module,
    ref: nn.Module | None,
    pair: Pair,
    completion: Completion,
    temperature: float = 1.0,
    *,
    head: str = "auto",
    packing: bool = False,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities (B, T) of a response under the policy and the reference, without gradient.

    ``ref`` None is the base of a PEFT policy: one batch of 2B rows, half of them without the
    adapter, where peft runs such a batch (one LoRA adapter), else a pass for each. Packed, peft
    cannot tell the rows from each other, so that is a pass for each too.

    Raises:
        ValueError: there is no reference; as in ``nlhf.responses.read``.
    """
    model, context = policies.reference(policy, ref)
    B = len(completion.tokens)
    names = policies.mixed_names(policy, B) if ref is None and not packing and B else None
    if names is None:
        own = frozen_logprobs(policy, pair, completion, temperature, head=head, packing=packing)
        with context:
            other = frozen_logprobs(
                model, pair, completion, temperature, head=head, packing=packing
            )
        return own, other
    twice = torch.arange(2 * B, device=completion.tokens.device) % B
    both, answers = pair.rows(twice), completion.rows(twice)
    with policies.evaluating(policy):
        reading = responses.read(policy, both, answers, head, adapter_names=names)
    return _logprobs(reading, temperature).split(B)


def _logprobs(reading: responses.Reading, temperature: float) -> Tensor:
    return reading.token_logprobs(temperature).logprobs.detach()


def response_logits(model: nn.Module, pair: Pair, completion: Completion) -> Tensor:
    """Logits (B, T, V) that predict the tokens of ``completion``, a response to the prompts."""
    return responses.read(model, pair, completion, "logits").x


@torch.no_grad()
def ref_logits(
    policy: nn.Module, ref: nn.Module | None, pair: Pair, completion: Completion
) -> Tensor:
    """The reference's ``response_logits``, without a gradient and with dropout off."""
    return _read_ref(policy, ref, pair, completion, "logits", False).x


@torch.no_grad()
def _read_ref(
    policy: nn.Module,
    ref: nn.Module | None,
    pair: Pair,
    completion: Completion,
    head: str,
    packing: bool,
) -> responses.Reading:
    model, context = policies.reference(policy, ref)
    with context, policies.evaluating(model):
        return responses.read(model, pair, completion, head, packing)
