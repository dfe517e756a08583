"""Losses and log-probabilities of transformers' causal models without logits in memory."""

import functools
import inspect
import types
import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast

import nlhf_kernels as nk
from nlhf_kernels.integrations import rows, versions

_PATCH = "_nlhf_lm_head"


class _Curve(NamedTuple):
    """What a model does to the output of its head: softcap * tanh(scale * x / softcap)."""

    scale: float
    softcap: float | None


class _Patch(NamedTuple):
    """What a patched model carries, so that a copy has it too."""

    forward: Callable
    # that of the instance before, if it had one for itself
    before: Callable | None
    curve: _Curve
    memory_budget: int | None


# of models that are not patched, measured once
_curves: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def patch_lm_head(model: nn.Module, *, memory_budget: int | None = None) -> None:
    """From now on ``model(..., labels=...)`` gives its loss without logits; again: new budget.

    The loss and its gradients are those of the model's own forward: shifted labels or
    ``shift_labels``, ``ignore_index`` -100, ``num_items_in_batch``, soft caps, scales, biases and
    tied heads. ``logits`` in the output is ``None``. Without labels, as in ``generate``, the
    forward is the model's own.

    Args:
        model: a causal model of transformers, also inside a PeftModel.
        memory_budget: bytes for a chunk of logits, as in ``linear_token_logprobs``.

    Raises ``ValueError`` for a head that is no plain linear layer, as one with LoRA; for a model
    that does more with hidden states or logits than scale and cap them, which three tokens show;
    for a loss of its own.
    """
    op = "patch_lm_head"
    versions.check("transformers")
    target = _causal(op, model)
    if target.loss_function is not ForCausalLMLoss:
        raise ValueError(f"{op}: the loss of {type(target).__name__} is not ForCausalLMLoss")
    unpatch_lm_head(target)
    forward = _fused(type(target).forward)
    patch = _Patch(forward, vars(target).get("forward"), _measure(op, target), memory_budget)
    setattr(target, _PATCH, patch)
    target.forward = types.MethodType(forward, target)


def unpatch_lm_head(model: nn.Module) -> None:
    """The model's own forward again; again: no change.

    Raises ``ValueError`` where something has replaced or wrapped the forward since.
    """
    target = _causal("unpatch_lm_head", model)
    patch = getattr(target, _PATCH, None)
    if patch is None:
        return
    if getattr(vars(target).get("forward"), "__func__", None) is not patch.forward:
        kind = type(target).__name__
        raise ValueError(f"unpatch_lm_head: {kind}.forward was changed since: undo that first")
    del target.forward
    if patch.before is not None:
        target.forward = patch.before
    delattr(target, _PATCH)


def token_logprobs(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    temperature: float = 1.0,
    memory_budget: int | None = None,
    **inputs,
) -> nk.TokenLogprobs:
    """Log-probability of each token after the first, and entropy of its distribution; (B, T-1).

    Both are differentiable, need no ``patch_lm_head`` and make no logits.

    Args:
        model: as for ``patch_lm_head``.
        input_ids, attention_mask: (B, T); a token under the mask gets 0. The first token of a
            left-padded row is predicted from padding: leave it out.
        temperature: above 0.
        inputs: whatever else the model's forward takes, such as ``position_ids``.

    Raises ``ValueError`` as ``patch_lm_head`` does.
    """
    op = "token_logprobs"
    target = _causal(op, model)
    if any(x.is_prompt_learning for x in getattr(model, "peft_config", {}).values()):
        raise ValueError(f"{op}: prompt tuning puts tokens before the prompt: use patch_lm_head")
    output = target.base_model(input_ids=input_ids, attention_mask=attention_mask, **inputs)
    mask = None if attention_mask is None else attention_mask[:, 1:]
    hidden = output[0][:, :-1]
    return _statistics(op, target, hidden, input_ids[:, 1:], mask, memory_budget, temperature)


def _fused(original: Callable) -> Callable:
    """The forward of a class with its signature, which ``generate`` and trainers look at."""
    names = list(inspect.signature(original).parameters)[1:]

    @functools.wraps(original)
    def forward(self, *args, **kwargs):
        given = dict(zip(names, args, strict=False)) | kwargs
        if given.get("labels") is None:
            own = getattr(self, _PATCH).before or functools.partial(original, self)
            return own(*args, **kwargs)
        return _with_loss(self, **given)

    return forward


def _with_loss(
    model: nn.Module,
    *,
    labels: Tensor,
    shift_labels: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    logits_to_keep: int | Tensor = 0,
    return_dict: bool | None = None,
    **inputs,
):
    op = "patch_lm_head"
    config = model.config
    router = inputs.get("output_router_logits")
    if getattr(config, "output_router_logits", False) if router is None else router:
        raise ValueError(f"{op}: the loss of a router is not in it: output_router_logits=False")
    if isinstance(logits_to_keep, Tensor) or logits_to_keep:
        raise ValueError(f"{op}: logits_to_keep is for a forward without labels")
    outputs = model.base_model(**inputs, return_dict=True)
    hidden = outputs.last_hidden_state
    if shift_labels is None:
        hidden, shift_labels = hidden[:, :-1], labels[:, 1:]
    shift_labels = shift_labels.to(hidden.device)
    mask = shift_labels != ignore_index
    budget = getattr(model, _PATCH).memory_budget
    tokens = torch.where(mask, shift_labels, 0)
    logprobs = _statistics(op, model, hidden, tokens, mask, budget).logprobs
    count = mask.sum() if num_items_in_batch is None else num_items_in_batch
    if isinstance(count, Tensor):
        count = count.to(hidden.device)
    output = CausalLMOutputWithPast(
        # float32 whatever the model is in, as ForCausalLMLoss
        loss=(-logprobs.sum()).float() / count,
        past_key_values=outputs.get("past_key_values"),
        hidden_states=outputs.get("hidden_states"),
        attentions=outputs.get("attentions"),
    )
    wanted = config.return_dict if return_dict is None else return_dict
    return output if wanted else output.to_tuple()


def _statistics(
    op: str,
    model: nn.Module,
    hidden: Tensor,
    tokens: Tensor,
    mask: Tensor | None,
    memory_budget: int | None,
    temperature: float = 1.0,
) -> nk.TokenLogprobs:
    head, curve = _head(op, model), _curve(op, model)
    # a model split over devices ends on another than that of its head
    hidden = hidden.to(head.weight.device)
    hidden, weight, bias = rows.head(hidden, head.weight, head.bias)
    return nk.linear_token_logprobs(
        hidden,
        weight,
        tokens.to(hidden.device),
        bias=bias,
        mask=None if mask is None else mask.to(hidden.device),
        temperature=temperature,
        softcap=curve.softcap,
        logit_scale=curve.scale,
        memory_budget=memory_budget,
    )


# ---- what a model does around its head


def _causal(op: str, model: nn.Module) -> nn.Module:
    """The causal model itself, whose base is a module of its own."""
    target = getattr(model, "get_base_model", lambda: model)()
    if not hasattr(target, "get_output_embeddings") or target.base_model is target:
        got = type(target).__name__
        raise ValueError(f"{op}: model must be a causal model of transformers, got {got}")
    return target


def _head(op: str, model: nn.Module) -> nn.Linear:
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        kind = type(head)
        raise ValueError(
            f"{op}: the LM head must be a plain torch.nn.Linear, got "
            f"{kind.__module__}.{kind.__qualname__}: merge its adapter, or leave the head out of "
            "target_modules and modules_to_save"
        )
    return head


def _curve(op: str, model: nn.Module) -> _Curve:
    if patch := getattr(model, _PATCH, None):
        return patch.curve
    if model not in _curves:
        _curves[model] = _measure(op, model)
    return _curves[model]


@torch.no_grad()
def _measure(op: str, model: nn.Module) -> _Curve:
    """The model's own forward of three tokens, in which the head says known numbers."""
    head, seen = _head(op, model), {}
    V = head.out_features
    said = torch.linspace(-90, 90, V, dtype=torch.float64, device=head.weight.device)
    # at 0 the curve is a line, and far out it is a line or the cap
    said[:2] = torch.tensor([2.0**-20, 2.0**40])

    def say(module, inputs, output):
        seen["hidden"] = inputs[0]
        return said.expand(output.shape)

    def listen(module, inputs, output):
        seen["body"] = output[0]

    # one may be padding, whose embedding is 0
    ids = torch.arange(3, device=model.get_input_embeddings().weight.device)[None]
    # some forwards go past the base, to the decoder that is all of it
    bodies = {model.base_model, model.get_decoder()}
    hooks = [head.register_forward_hook(say), *(x.register_forward_hook(listen) for x in bodies)]
    try:
        logits = type(model).forward(model, input_ids=ids, use_cache=False, return_dict=True).logits
    finally:
        for hook in hooks:
            hook.remove()
    scale = float(logits[0, 0, 0]) * 2**20
    far = float(logits[0, 0, 1])
    softcap = None if far > 2**20 * scale else far
    curve = said * scale
    curve = curve if softcap is None else softcap * torch.tanh(curve / softcap)
    whole = logits.shape[-1] == V and torch.equal(seen["hidden"], seen["body"].to(said.device))
    if not (whole and scale > 0 and torch.allclose(logits.double(), curve.expand_as(logits))):
        raise ValueError(
            f"{op}: {type(model).__name__} does more around its LM head than scale and cap logits"
        )
    return _Curve(scale, softcap)
