"""What a model says of responses: logits or hidden states, in padded rows or packed."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

import nlhf_kernels as nk
from nlhf import heads, packing, vocabulary
from nlhf import policy as policies
from nlhf.heads import Head
from nlhf.rollout import Completion, Pair


@dataclass(frozen=True)
class Reading:
    """What predicts the tokens of a response.

    ``x`` is logits, or hidden states if there is a ``head``: padded (B, T, .), or packed (n, .),
    the n tokens that the mask keeps. ``tokens`` and ``mask`` (B, T) are those of the responses.
    """

    x: Tensor
    head: Head | None
    tokens: Tensor
    mask: Tensor
    packed: bool

    def laid_out(self, x: Tensor) -> Tensor:
        """(B, T) like the tokens in the layout of the ops."""
        return x[self.mask] if self.packed else x

    def padded(self, x: Tensor) -> Tensor:
        """(..., B, T) of what an op returned for each token."""
        return packing.unpacked(x, self.mask) if self.packed else x

    def places(self) -> tuple[Tensor, Tensor]:
        """Tokens and mask in the layout of the ops."""
        mask = self.laid_out(self.mask)
        return self.laid_out(self.tokens), mask

    @property
    def shared(self) -> bool:
        """Whether several processes share the head's vocabulary."""
        return self.head is not None and self.head.group is not None

    def states(self) -> Tensor:
        """Hidden states (n, D) of the tokens that the mask keeps."""
        return self.x if self.packed else self.x[self.mask]

    def logits(self) -> Tensor:
        """As the model itself makes them."""
        if self.head is None:
            return self.x
        if self.shared:
            raise ValueError(
                "head: policy and reference must do the same to their logits where processes share "
                "the vocabulary; leave vocabulary_parallel off"
            )
        return self.head.scaling(linear(self.x, self.head.weight, self.head.bias))

    def token_logprobs(
        self, temperature: float, inplace_backward: bool = False
    ) -> nk.TokenLogprobs:
        """(B, T) log-probabilities and entropies, 0 under the mask."""
        if self.shared:
            places = (self.tokens, self.mask, temperature)
            return vocabulary.token_logprobs(self.states(), self.head, *places)
        tokens, mask = self.places()
        if self.head is None:
            found = nk.token_logprobs(
                self.x,
                tokens,
                mask=mask,
                temperature=temperature,
                inplace_backward=inplace_backward,
            )
        else:
            found = nk.linear_token_logprobs(
                self.x,
                self.head.weight,
                tokens,
                mask=mask,
                temperature=temperature,
                bias=self.head.bias,
                **self.head.scaling._asdict(),
            )
        return nk.TokenLogprobs(*map(self.padded, found))

    def pairwise_pg_loss(
        self,
        preference: Tensor,
        ref: "Reading | None",
        ref_logprobs: Tensor | list[Tensor] | None,
        inplace_backward: bool,
        **settings,
    ) -> nk.PairwisePGLoss:
        """The op with a reference that is read here, or whose log-probabilities are known."""
        direct = self.head is not None
        if direct and ref is not None:
            # the op has one factor and one soft cap for the two
            direct = ref.head is not None and ref.head.scaling == self.head.scaling
        if direct and self.shared:
            theirs = None if ref is None else (ref.states(), ref.head)
            places = (self.tokens, self.mask, preference, ref_logprobs, theirs)
            return vocabulary.pairwise_pg_loss(self.states(), self.head, *places, **settings)
        tokens, mask = self.places()
        if isinstance(ref_logprobs, list):
            settings["ref_logprobs"] = [self.laid_out(x) for x in ref_logprobs]
        elif ref_logprobs is not None:
            settings["ref_logprobs"] = self.laid_out(ref_logprobs)
        if self.packed:
            settings["cu_seqlens"] = packing.offsets(self.mask.sum(-1))
        if direct:
            if ref is not None:
                settings["ref_hidden"], settings["ref_weight"] = ref.x, ref.head.weight
                settings["ref_bias"] = ref.head.bias
            op, x = nk.linear_pairwise_pg_loss, self.x
            settings |= {"weight": self.head.weight, "bias": self.head.bias}
            settings |= self.head.scaling._asdict()
        else:
            op, x = nk.pairwise_pg_loss, self.logits()
            settings["inplace_backward"] = inplace_backward
            if ref is not None:
                settings["ref_logits"] = ref.logits()
        found = op(x, tokens=tokens, mask=mask, preference=preference, **settings)
        loss, logprobs, refs, entropy, kl = found
        if ref is not None or ref_logprobs is not None:
            # without a reference they are empty
            refs, kl = self.padded(refs), self.padded(kl)
        return nk.PairwisePGLoss(loss, self.padded(logprobs), refs, self.padded(entropy), kl)


def read(
    model: nn.Module,
    pair: Pair,
    completion: Completion,
    head: str = "auto",
    packed: bool = False,
    **more: Any,
) -> Reading:
    """A forward pass over the prompts of the pair and ``completion``, a response to each.

    Args:
        head: "fused" takes hidden states, "logits" what the model returns, "auto" hidden states
            where that is no slower and the model allows it.
        packed: without padding, one sequence after the other, in a row or in a few.
        more: goes to the model.

    Raises:
        ValueError: "fused" with a model that does more to its logits than ``nlhf.heads`` knows;
            ``packed`` with a model whose sequences would see each other.
    """
    # ids under the mask may be anything
    tokens = torch.where(completion.mask, completion.tokens, 0)
    prompt_mask = pair.attention_mask != 0
    if not packed:
        # the last token predicts nothing that is asked for
        mask = torch.cat([prompt_mask, completion.mask[:, :-1]], -1)
        ids = torch.cat([pair.input_ids, tokens[:, :-1]], -1)
        inputs = (ids, mask, policies.positions(mask), tokens.shape[1])
        return Reading(*_run(model, inputs, head, more), tokens, completion.mask, False)
    packing.check(model, tokens.device)
    pieces = []
    for rows in packing.passes(model, prompt_mask.sum(-1) + completion.mask.sum(-1)):
        columns = (pair.input_ids, prompt_mask, tokens, completion.mask)
        row = packing.pack(*(x[rows] for x in columns))
        inputs = (row.input_ids, None, row.position_ids, row.places)
        x, own = _run(model, inputs, head, more | packing.arguments(model, row.lengths))
        pieces.append(x[0])
    x = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    return Reading(x, own, tokens, completion.mask, True)


def _run(model: nn.Module, inputs: tuple, head: str, more: dict) -> tuple[Tensor, Head | None]:
    """Hidden states and their head, or logits and none."""
    if heads.wanted(model, head):
        try:
            return heads.hidden_states(model, *inputs, **more)
        except heads.Refused as error:
            if head != "auto":
                raise
            heads.refused(error)
    return policies.last_logits(model, *inputs, **more), None
