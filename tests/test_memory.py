"""The contexts that save memory leave a gradient as it is."""

import contextlib

import pytest
import torch

from nlhf import losses, memory
from tests import tiny
from tests.test_losses import gradients, made

pytestmark = pytest.mark.usefixtures("one_thread")


def dropping(model):
    """Dropout everywhere, also in what a layer itself looks at its mode for."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.3
    return model


MODELS = {
    "llama": lambda: tiny.llama(0),
    "llama, tied": lambda: tiny.llama(0, tie_word_embeddings=True),
    "llama, tied, padding": lambda: tiny.llama(0, tie_word_embeddings=True, pad_token_id=5),
    "llama, bfloat16": lambda: tiny.llama(0, torch.bfloat16, tie_word_embeddings=True),
    "gpt2": lambda: dropping(tiny.gpt2(0)),
    "gpt2, training": lambda: dropping(tiny.gpt2(0)).train(),
    "gemma2": lambda: tiny.gemma2(0),
    "lora": lambda: tiny.with_lora(tiny.llama(0, tie_word_embeddings=True)),
}


@pytest.mark.parametrize("name", MODELS)
def test_recomputing_changes_no_bit(name):
    model, ref = MODELS[name](), tiny.llama(1)
    ref = None if name == "lora" else ref
    modes = [m.training for m in model.modules()]
    with torch.no_grad():
        pair, preference = made(model, ref, temperature=0.8)
    found, calls, counts = [], [], []
    for module in model.modules():
        if type(module).__name__.endswith("MLP"):
            module.register_forward_pre_hook(lambda *_: calls.append(1))
    for lean in (contextlib.nullcontext(), memory.recomputing(model)):
        calls.clear()
        torch.manual_seed(3)
        with lean:
            result = losses.nash_md_pg(model, ref, pair, preference, tau=0.1, temperature=0.8)
        found.append((result.loss.detach(), gradients(model, result.loss)))
        counts.append(len(calls))
    assert counts == [2, 4]
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)
    assert [m.training for m in model.modules()] == modes
    assert not any("forward" in vars(m) for m in model.modules())


def test_recomputing_leaves_a_rollout_and_a_forward_of_its_own_alone():
    model = tiny.llama(0)
    layer = model.model.layers[0]
    inner, calls = layer.forward, []

    def own(*args, **kwargs):
        calls.append(1)
        return inner(*args, **kwargs)

    layer.forward = own
    plain, _ = made(model, model)
    with memory.recomputing(model):
        pair, _ = made(model, model)
    assert torch.equal(pair.y.tokens, plain.y.tokens)
    assert torch.equal(pair.y.policy_logprobs, plain.y.policy_logprobs)
    assert layer.forward is own
    assert calls


def test_recomputing_needs_layers():
    with (
        pytest.raises(ValueError, match="gradient_checkpointing: Linear has no layer"),
        memory.recomputing(torch.nn.Linear(2, 2)),
    ):
        pass
    with memory.recomputing(torch.nn.Linear(2, 2), False):
        pass


@pytest.mark.parametrize("name", MODELS)
def test_untied_embeddings_have_the_same_gradient(name):
    """Over two micro-batches, as a gradient that is there already is added to."""
    model, ref = MODELS[name](), tiny.llama(1)
    ref = None if name == "lora" else ref
    with torch.no_grad():
        pair, preference = made(model, ref)
    embed, head = model.get_input_embeddings(), model.get_output_embeddings()
    before = embed.weight, head.weight
    found = []
    for make in (lambda _: contextlib.nullcontext(), memory.untied):
        model.zero_grad()
        torch.manual_seed(3)
        for rows in (slice(0, 1), slice(1, 4)):
            with make(model):
                part = losses.nash_md_pg(model, ref, pair.rows(rows), preference[rows], tau=0.1)
            part.loss.backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        assert all(not g.is_sparse for g in grads.values())
        found.append({n: g.clone() for n, g in grads.items()})
    tolerance = {"rtol": 0, "atol": 1e-12}
    if embed.weight.dtype != torch.float64:
        scale = max(float(g.abs().max()) for g in found[0].values())
        tolerance["atol"] = 4 * torch.finfo(embed.weight.dtype).eps * scale
    torch.testing.assert_close(found[1], found[0], **tolerance)
    assert before[0] is embed.weight
    assert before[1] is head.weight
    assert not getattr(embed, "sparse", False)
