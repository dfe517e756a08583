"""Losses on a pair of responses: pure functions of models, pair and preference."""

from typing import Any

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
    inplace_backward: bool = True,
) -> Any:
    """The loss of Nash-MD-PG (Munos et al. 2023, eq. 13): its gradient improves on the opponent.

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
        inplace_backward: the backward writes over the logits, which nothing else reads.

    Returns:
        The op's result: loss (), the mean over the B sequences of this pair, and detached (B, T)
        logprobs, ref_logprobs, entropy and kl.

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
    return nk.pairwise_pg_loss(
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
