"""Hidden states of a whole model for the ops that multiply with its head themselves."""

import itertools
import logging
import weakref
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard

from nlhf import policy as policies
from nlhf.names import nearest

CHOICES = ("auto", "fused", "logits")
# the logits that a model is shown once, to see what it makes of them, reach so far
_PROBE = 50.0
# what configurations call a soft cap and a factor on the logits
_CAPS = ("final_logit_softcapping", "logits_soft_cap")
_FACTORS = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")


class Scaling(NamedTuple):
    """What a model does to logits after the product, in this order."""

    logit_scale: float
    softcap: float | None

    def __call__(self, logits: Tensor) -> Tensor:
        if self.logit_scale != 1:
            logits = logits * self.logit_scale
        return logits if self.softcap is None else self.softcap * (logits / self.softcap).tanh()


class Head(NamedTuple):
    """logits = scaling(hidden @ weight.T + bias); the weight is the model's own parameter.

    With a ``group``, weight and bias are of the ids that this process has of all of them.
    """

    weight: Tensor
    bias: Tensor | None
    scaling: Scaling
    group: ProcessGroup | None = None


class Refused(ValueError):
    """This model's logits are not a linear layer, a factor and a soft cap, as far as one can see.

    ``reason`` says why, without the model's name.
    """

    def __init__(self, model: nn.Module, reason: str):
        super().__init__(f"head: {policies.class_name(model)} {reason}; use head: logits")
        self.reason = reason


# what was found of each model, or why it was refused
_FOUND: weakref.WeakKeyDictionary[nn.Module, Scaling | str] = weakref.WeakKeyDictionary()


def hidden_states(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor,
    keep: int | Tensor,
    **more,
) -> tuple[Tensor, Head]:
    """Hidden states (B, T, D) of the last ``keep`` columns, or of these, and the head for them.

    The whole model runs, through whatever wraps it, but its own head does not: for this call
    another module stands in for it, which keeps what it is given, so hooks on the head are not
    called. The backward pass begins at what the model returned, as the hooks of wrappers expect.

    The first call with a model shows it logits that reach from -50 to 50 instead, and compares what
    it makes of them with the factor and the soft cap that its configuration names.

    Args:
        model: causal language model of transformers, also in adapters or distributed.
        input_ids, attention_mask, position_ids, keep, more: as in ``policy.run``.

    Raises:
        Refused: a ValueError that names the model: its head is not a plain linear layer of which
            all weights are here, or an even share of the rows (adapters on the head, quantisation,
            other shards), or it does something else to its logits.
    """
    inner = policies.bare(model)
    found = _FOUND.get(inner)
    if isinstance(found, str):
        raise Refused(model, found)
    head = inner.get_output_embeddings()
    try:
        parent, name = _place(inner, head)
        factors = _candidates(inner)
        # a configuration that has been changed since is looked at anew
        probe = None if found in factors else _probe(head)
        stand_in = _StandIn(head, probe)
        setattr(parent, name, stand_in)
        try:
            output = policies.run(model, input_ids, attention_mask, position_ids, keep, **more)
        finally:
            setattr(parent, name, head)
        hidden = _only(stand_in.seen)
        # it is looked at now: before, a wrapper may not have gathered it
        _check_weight(head, hidden)
        if probe is not None:
            found = _FOUND[inner] = _explained(probe, output, factors)
    except _Reason as reason:
        _FOUND[inner] = str(reason)
        raise Refused(model, str(reason)) from None
    hidden = policies.kept(_Through.apply(hidden, output), keep)
    return hidden, _head(head, found)


def _head(head: nn.Linear, scaling: Scaling) -> Head:
    if not isinstance(head.weight, DTensor):
        return Head(head.weight, head.bias, scaling)
    bias = None if head.bias is None else head.bias.to_local()
    return Head(head.weight.to_local(), bias, scaling, head.weight.device_mesh.get_group())


def wanted(model: nn.Module, choice: str) -> bool:
    """Whether to ask for hidden states; "auto" asks where that has been no slower than logits.

    On the CPU a product of 16 bits is fast only where its result is rounded, and the ops round
    nothing: there they take 3 to 5 times as long. Nor does "auto" ask a model that refused.
    """
    if choice not in CHOICES:
        known = ", ".join(map(repr, CHOICES))
        hint = nearest(choice, CHOICES)
        raise ValueError(f"head: must be one of {known}, got {choice!r}{hint}")
    if choice != "auto":
        return choice == "fused"
    inner = policies.bare(model)
    weight = getattr(inner.get_output_embeddings(), "weight", None)
    narrow = weight is not None and weight.dtype in (torch.float16, torch.bfloat16)
    return not isinstance(_FOUND.get(inner), str) and not (narrow and weight.device.type == "cpu")


def refused(error: Refused) -> None:
    """Under "auto", at the first call with a model: logits from now on."""
    logging.getLogger(__name__).warning(f"{error}, as from now on")


class _Reason(Exception):
    pass


class _StandIn(nn.Module):
    """Keeps its input and returns next to nothing, or the probe.

    The head is no submodule of it: its weights are those of the model, here and elsewhere.
    """

    def __init__(self, head: nn.Linear, probe: Tensor | None):
        super().__init__()
        self._own = [head]
        self._probe = probe
        self.seen: list[Tensor] = []

    @property
    def weight(self) -> Tensor:
        # some models look at its dtype
        return self._own[0].weight

    @property
    def bias(self) -> Tensor | None:
        return self._own[0].bias

    def forward(self, hidden: Tensor) -> Tensor:
        self.seen.append(hidden)
        answer = hidden.new_zeros(*hidden.shape[:-1], 1) if self._probe is None else self._probe
        return _Answer.apply(hidden, self.weight, answer)


class _Answer(torch.autograd.Function):
    """In the graph what a head is, in numbers the answer, without a gradient.

    A wrapper that looks for weights that the model has not used finds this one.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, answer: Tensor) -> Tensor:
        # the model may write over it
        return answer.clone()

    @staticmethod
    def backward(ctx, _):
        return None, None, None


class _Through(torch.autograd.Function):
    """Hidden states that depend on what the model returned, whose gradient is 0."""

    @staticmethod
    def forward(ctx, hidden: Tensor, output: Tensor) -> Tensor:
        ctx.like = output.shape, output.dtype
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx, grad: Tensor):
        shape, dtype = ctx.like
        return grad, grad.new_zeros((), dtype=dtype).expand(shape)


def _place(model: nn.Module, head: nn.Module | None) -> tuple[nn.Module, str]:
    """The module whose attribute the head is."""
    # FSDP2 makes a class of its own of a layer that it shares out by itself
    if type(head) is not nn.Linear and type(head).__bases__ != (FSDPModule, nn.Linear):
        kind = "no output embeddings" if head is None else f"a {type(head).__name__} as its head"
        raise _Reason(f"has {kind}, not a plain linear layer")
    if hasattr(head, "_hf_hook"):
        raise _Reason("has a head whose weights are moved for each call")
    for module in model.modules():
        for name, child in module.named_children():
            if child is head:
                return module, name
    raise _Reason("keeps its head where it cannot be found")


def _candidates(model: nn.Module) -> list[Scaling]:
    """What the configuration may mean, the most it says first."""
    config = model.config.get_text_config()

    def numbers(names: tuple[str, ...]) -> list[float]:
        found = (getattr(config, name, None) for name in names)
        return [float(x) for x in found if isinstance(x, int | float) and x]

    factors = numbers(_FACTORS)
    # a factor divides in one model and multiplies in another
    factors = [1.0, *factors, *(1 / x for x in factors)]
    caps = [*numbers(_CAPS), None]
    return [Scaling(factor, cap) for cap, factor in itertools.product(caps, factors)]


def _probe(head: nn.Linear) -> Tensor:
    weight = head.weight
    values = torch.linspace(-_PROBE, _PROBE, head.out_features, dtype=torch.float64)
    return values.to(weight.device, weight.dtype)[None, None]


def _only(seen: list[Tensor]) -> Tensor:
    if len(seen) != 1:
        raise _Reason(f"calls its head {len(seen)} times in a forward pass")
    return seen[0]


def _check_weight(head: nn.Linear, hidden: Tensor) -> None:
    weight = head.weight
    shape = (head.out_features, hidden.shape[-1])
    plain = type(weight) in (Tensor, nn.Parameter) and tuple(weight.shape) == shape
    # the rows shared out over all processes, as FSDP2 does
    parts = isinstance(weight, DTensor) and weight.placements == (Shard(0),)
    if not (plain or parts) or weight.device != hidden.device:
        raise _Reason("has a head whose weights are not all here after a forward pass")
    if weight.dtype != hidden.dtype:
        kinds = (str(x.dtype).removeprefix("torch.") for x in (hidden, weight))
        raise _Reason("has {} hidden states and a {} head".format(*kinds))


def _explained(probe: Tensor, output: Tensor, candidates: list[Scaling]) -> Scaling:
    """The candidate that makes of the probe what the model has made of it, up to rounding."""
    eps = max(torch.finfo(x.dtype).eps for x in (probe, output))
    if output.shape == probe.shape:
        for scaling in candidates:
            expected = scaling(probe.double())
            if ((output.detach() - expected).abs() <= 8 * eps * expected.abs()).all():
                return scaling
    raise _Reason("does something to its logits that its configuration does not name")
