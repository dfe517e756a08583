"""Losses on a pair of responses: pure functions of models, pair and preference."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import nlhf_kernels as nk
from nlhf import policy as policies
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
    inplace_backward: bool = True,
) -> Any:
    """The loss of Nash-MD-PG (Munos et al. 2023, eq. 13): its gradient improves on the opponent.

    That of every policy gradient of the family: they differ in who the opponent is, and in anchors.

    One forward pass of the policy over prompt and y, and ``nk.pairwise_pg_loss``, whose docstring
    has the formula. y' enters through the preference alone. Inside of the contexts of
    ``nlhf.memory`` it takes less memory.

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
        inplace_backward: the backward writes over the logits, which nothing else reads.

    Returns:
        The op's result: loss (), the mean over the B sequences of this pair, and detached (B, T)
        logprobs, ref_logprobs, entropy and kl, the last with respect to the reference.

    Raises:
        ValueError: bad shapes or parameters; no reference where one is needed.
    """
    y = pair.y
    anchor = {"ref_logprobs": y.ref_logprobs}
    if kl == "exact":
        # the rollout's log-probabilities are of the tokens that were drawn, not of all
        anchor = {"ref_logits": ref_logits(policy, ref, pair, y)}
    elif y.ref_logprobs is None and (tau or ref is not None):
        # no name for these logits: they must be gone when those of the policy are made
        anchor["ref_logprobs"] = nk.token_logprobs(
            ref_logits(policy, ref, pair, y), y.tokens, mask=y.mask, temperature=temperature
        ).logprobs
    if anchors:
        if kl == "exact" or anchor["ref_logprobs"] is None:
            raise ValueError("nash_md_pg: anchors need a reference, and kl other than 'exact'")
        anchor["ref_logprobs"] = [anchor["ref_logprobs"], *(x for x, _ in anchors)]
        tau = [tau, *(strength for _, strength in anchors)]
    result = nk.pairwise_pg_loss(
        response_logits(policy, pair, y),
        y.tokens,
        y.mask,
        preference.to(y.tokens.device),
        tau=tau,
        **anchor,
        kl=kl,
        baseline=baseline,
        temperature=temperature,
        inplace_backward=inplace_backward,
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
        inplace_backward: the backward writes over the logits, which nothing else reads.

    Raises:
        ValueError: bad shapes or parameters.
    """

    def read(completion: Completion) -> Any:
        return nk.token_logprobs(
            response_logits(policy, pair, completion),
            completion.tokens,
            mask=completion.mask,
            temperature=temperature,
            inplace_backward=inplace_backward,
        )

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
    model: nn.Module, pair: Pair, completion: Completion, temperature: float
) -> Tensor:
    """(B, T) log-probabilities of a response under an anchor, 0 under the mask."""
    with policies.evaluating(model):
        logits = response_logits(model, pair, completion)
    return nk.token_logprobs(
        logits, completion.tokens, mask=completion.mask, temperature=temperature
    ).logprobs


def response_logits(model: nn.Module, pair: Pair, completion: Completion) -> Tensor:
    """Logits (B, T, V) that predict the tokens of ``completion``, a response to the prompts."""
    # the last token predicts nothing that is asked for; ids under the mask may be anything
    tokens = torch.where(completion.mask, completion.tokens, 0)[:, :-1]
    prompt_mask = pair.attention_mask != 0
    mask = torch.cat([prompt_mask, completion.mask[:, :-1]], -1)
    ids = torch.cat([pair.input_ids, tokens], -1)
    T = completion.tokens.shape[1]
    return policies.last_logits(model, ids, mask, policies.positions(mask), T)


@torch.no_grad()
def ref_logits(
    policy: nn.Module, ref: nn.Module | None, pair: Pair, completion: Completion
) -> Tensor:
    """The reference's ``response_logits``, without a gradient and with dropout off."""
    model, context = policies.reference(policy, ref)
    with context, policies.evaluating(model):
        return response_logits(model, pair, completion)
