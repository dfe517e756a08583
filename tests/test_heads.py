"""Losses from hidden states: equal to those from logits, without the model's own head."""

import contextlib
import logging

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from nlhf import heads, losses, memory, packing, policy, responses
from nlhf.rollout import Completion, Pair
from tests import tiny
from tests.test_losses import gradients, made

pytestmark = pytest.mark.usefixtures("one_thread")


def cohere(seed=0, dtype=torch.float64, **settings):
    """Logits times a factor, a tied head, another norm."""
    sizes = tiny.llama().config.to_dict()
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return tiny._build("Cohere", seed, dtype, **{n: sizes[n] for n in names}, logit_scale=0.125)


def granite(seed=0, dtype=torch.float64, **settings):
    """Logits divided by a number."""
    sizes = tiny.llama().config.to_dict()
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return tiny._build("Granite", seed, dtype, **{n: sizes[n] for n in names}, logits_scaling=4.0)


MODELS = {
    "llama": tiny.llama,
    "llama, tied": lambda seed: tiny.llama(seed, tie_word_embeddings=True),
    "gpt2": tiny.gpt2,
    "gemma2": tiny.gemma2,
    "mistral": tiny.mistral,
    "cohere": cohere,
    "granite": granite,
    "lora": lambda seed: tiny.with_lora(tiny.llama(seed)),
    "lora, tied": lambda seed: tiny.with_lora(tiny.gpt2(seed)),
}


class Wide(TorchDispatchMode):
    """Remembers the shapes of tensors with as many columns as there are ids, and rows enough."""

    def __init__(self, rows: int):
        super().__init__()
        self.rows, self.seen = rows, []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else [result]:
            if isinstance(x, torch.Tensor) and x.dim() > 1 and x.shape[-1] == tiny.V:
                self.seen += [x.shape] if x.numel() >= self.rows * tiny.V else []
        return result


@pytest.mark.parametrize("kl", ["reward_to_go", "sequence", "exact"])
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradient_are_those_from_logits(name, kl):
    model = MODELS[name](0)
    ref = None if "lora" in name else MODELS[name](1)
    pair, preference = made(model, ref, temperature=0.8)
    settings = {"tau": 0.1, "temperature": 0.8, "kl": kl}
    found = []
    for head in ("logits", "fused"):
        with memory.untied(model):
            result = losses.nash_md_pg(model, ref, pair, preference, head=head, **settings)
        found.append((result, gradients(model, result.loss)))
    tolerance = {"rtol": 1e-3, "atol": 1e-4} if name == "gemma2" else {"rtol": 0, "atol": 1e-9}
    torch.testing.assert_close(found[1], found[0], **tolerance)
    if "lora" in name:
        assert all("lora" in weight for weight in found[1][1])


@pytest.mark.parametrize("name", ["llama", "gemma2", "lora, tied"])
def test_pair_losses_and_anchors_are_those_from_logits(name):
    model = MODELS[name](0)
    ref = None if "lora" in name else MODELS[name](1)
    pair, preference = made(model, ref)
    both, found = (pair.y, pair.y_other), []
    for head in ("logits", "fused"):
        anchors = [tuple(losses.frozen_logprobs(model, pair, x, 1.0, head=head) for x in both)]
        anchors += [(pair.y.ref_logprobs, pair.y_other.ref_logprobs)]
        settings = {"method": "mnpo", "eta": 1.0, "weights": [0.4, 0.6]}
        result = losses.contrast(model, pair, preference, anchors=anchors, head=head, **settings)
        found.append((result, anchors, gradients(model, result.loss)))
    tolerance = {"rtol": 1e-3, "atol": 1e-4} if name == "gemma2" else {"rtol": 0, "atol": 1e-9}
    torch.testing.assert_close(found[1], found[0], **tolerance)


@pytest.mark.parametrize("name", ["llama, tied", "gemma2", "lora"])
def test_the_models_own_head_is_never_called_and_no_logits_of_all_tokens_are_made(name):
    model = MODELS[name](0)
    ref = None if name == "lora" else MODELS[name](1)
    pair, preference = made(model, ref, (3, 6, 2, 4) * 40)
    rows = pair.y.mask.sum()
    calls = []
    for one in filter(None, (model, ref)):
        one.get_output_embeddings().register_forward_hook(lambda *_: calls.append(1))
    y = Completion(pair.y.tokens, pair.y.mask)
    either = Pair(pair.input_ids, pair.attention_mask, y, y)
    # the ops themselves make chunks of at least 128 tokens
    assert rows > 4 * 128
    for head, expected in (("fused", False), ("logits", True)):
        with Wide(int(rows) // 2) as wide:
            result = losses.nash_md_pg(model, ref, either, preference, tau=0.1, head=head)
            result.loss.backward()
        assert bool(calls) == expected
        assert bool(wide.seen) == expected


@pytest.mark.parametrize("name", ["llama, tied", "gpt2", "lora"])
def test_recomputing_and_micro_batches_change_nothing(name):
    model = MODELS[name](0)
    ref = None if name == "lora" else MODELS[name](1)
    pair, preference = made(model, ref)
    found = []
    for lean in (contextlib.nullcontext, lambda: memory.recomputing(model)):
        model.zero_grad()
        for rows in (slice(0, 1), slice(1, 4)):
            with lean(), memory.untied(model):
                part = losses.nash_md_pg(
                    model, ref, pair.rows(rows), preference[rows], tau=0.1, head="fused"
                )
            part.loss.backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)
    assert isinstance(model.get_output_embeddings(), nn.Linear)


class Whispering(type(tiny.llama())):
    """Says less of every other id than its head does."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits[..., ::2] -= 1
        return output


def test_a_model_that_does_more_to_its_logits_is_refused_or_asked_for_them(caplog):
    model = Whispering(tiny.llama().config).double().eval()
    pair, preference = made(model, tiny.llama(1))
    head = model.get_output_embeddings()

    def loss(choice):
        return losses.nash_md_pg(model, None, pair, preference, tau=0.1, head=choice).loss

    for _ in range(2):
        with pytest.raises(ValueError, match=r"head: Whispering .*; use head: logits"):
            loss("fused")
    assert model.get_output_embeddings() is head
    fresh = Whispering(model.config).double().eval()
    fresh.load_state_dict(model.state_dict())
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            got = losses.nash_md_pg(fresh, None, pair, preference, tau=0.1).loss
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "Whispering" in caplog.text
    torch.testing.assert_close(got, loss("logits"), rtol=0, atol=0)


def test_a_soft_cap_that_the_configuration_forgets_is_seen():
    model = tiny.gemma2(0)
    pair, preference = made(model, model)
    losses.nash_md_pg(model, model, pair, preference, tau=0.1, head="fused")
    hidden = tiny.llama(0)
    hidden.config.final_logit_softcapping = 5.0
    # named, but this model has none
    plain = losses.nash_md_pg(hidden, model, pair, preference, tau=0.1, head="fused")
    logits = losses.nash_md_pg(hidden, model, pair, preference, tau=0.1, head="logits")
    torch.testing.assert_close(plain.loss, logits.loss)


def test_a_factor_that_is_a_word_is_none():
    model = tiny.llama(0)
    model.config.logit_scale = "inv_sqrt_d_model"
    pair, preference = made(model, model)
    losses.nash_md_pg(model, model, pair, preference, tau=0.1, head="fused")


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_heads_that_are_no_plain_linear_layer_are_refused():
    from peft import LoraConfig, get_peft_model

    model = tiny.llama(0)
    pair, preference = made(model, model)
    adapted = get_peft_model(tiny.llama(0), LoraConfig(target_modules=["lm_head"], r=2)).eval()
    with pytest.raises(ValueError, match="LlamaForCausalLM has a Linear as its head, not a plain"):
        losses.nash_md_pg(adapted, None, pair, preference, tau=0.1, head="fused")
    auto = losses.nash_md_pg(adapted, None, pair, preference, tau=0.1)
    torch.testing.assert_close(auto.logprobs, pair.y.policy_logprobs)

    class Odd(nn.Linear):
        pass

    model.lm_head = Odd(16, tiny.V, bias=False).double()
    with pytest.raises(ValueError, match="a Odd as its head"):
        losses.nash_md_pg(model, None, pair, preference, tau=0.1, head="fused")
    with pytest.raises(
        ValueError, match=r"head: must be one of .*, got 'fuse'; do you mean fused\?"
    ):
        losses.nash_md_pg(model, None, pair, preference, tau=0.1, head="fuse")


def test_sixteen_bits_on_the_cpu_are_asked_for_logits_unless_told():
    assert heads.wanted(tiny.llama(0, torch.float32), "auto")
    narrow = tiny.llama(0, torch.bfloat16)
    assert not heads.wanted(narrow, "auto")
    assert heads.wanted(narrow, "fused")
    assert not heads.wanted(narrow, "logits")
    pair, preference = made(narrow, narrow)
    found = [
        losses.nash_md_pg(narrow, narrow, pair, preference, tau=0.1, head=head)
        for head in ("fused", "logits")
    ]
    torch.testing.assert_close(found[0].logprobs, found[1].logprobs, rtol=0.02, atol=0.1)


@pytest.fixture
def group(tmp_path):
    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("unused", [False, True])
@pytest.mark.parametrize("name", ["llama", "lora, tied"])
def test_through_the_wrapper_of_a_distributed_model(name, group, unused):
    model = MODELS[name](0)
    ref = None if "lora" in name else MODELS[name](1)
    pair, preference = made(model, ref)
    expected = losses.nash_md_pg(model, ref, pair, preference, tau=0.1, head="logits")
    wanted = gradients(model, expected.loss)
    # or it warns that it searched for nothing
    if unused:
        model.never = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    wrapped, calls = DistributedDataParallel(model, find_unused_parameters=unused), []
    wrapped.register_forward_hook(lambda *_: calls.append("forward"))
    wrapped.register_comm_hook(None, lambda _, bucket: reduced(bucket, calls))
    assert policy.bare(wrapped) is model
    for _ in range(2):
        result = losses.nash_md_pg(wrapped, ref, pair, preference, tau=0.1, head="fused")
        torch.testing.assert_close(gradients(model, result.loss), wanted, rtol=0, atol=1e-9)
    assert calls[0] == "forward"
    assert calls.count("forward") == 2
    assert calls.count("reduced") >= 2


@pytest.mark.parametrize("name", ["llama", "llama, tied"])
def test_through_shards(name, group, monkeypatch):
    """Several processes run as many passes each, so packing makes one row here."""
    monkeypatch.setitem(packing.MOST, "cpu", 1)
    model, ref = MODELS[name](0), MODELS[name](1)
    pair, preference = made(model, ref)
    expected = losses.nash_md_pg(model, ref, pair, preference, tau=0.1, head="logits")
    wanted, calls = gradients(model, expected.loss), []
    model.zero_grad()
    for layer in (*model.model.layers, model):
        fully_shard(layer)
    for packed in (False, True):
        # not later: those of weights that are gathered for a pass are others
        model.zero_grad()
        losses.frozen_logprobs(model, pair, pair.y, 1.0, packing=packed)
        with memory.untied(model), memory.recomputing(model):
            hook = model.register_forward_hook(lambda *_: calls.append(1))
            result = losses.nash_md_pg(
                model, ref, pair, preference, tau=0.1, head="fused", packing=packed
            )
            hook.remove()
        found = {n: x.full_tensor() for n, x in gradients(model, result.loss).items()}
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9)
    assert len(calls) == 2


def reduced(bucket, calls):
    calls.append("reduced")
    done = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


def test_the_hooks_of_what_a_model_returns_are_called_in_the_backward_pass():
    """Wrappers that shard weights gather them there."""
    model = tiny.llama(0)
    pair, preference = made(model, model)
    calls = []

    def hook(module, args, output):
        output.logits.register_hook(lambda grad: calls.append(grad.abs().max().item()))

    model.register_forward_hook(hook)
    for _ in range(2):
        result = losses.nash_md_pg(model, model, pair, preference, tau=0.1, head="fused")
        result.loss.backward()
    assert calls == [0.0, 0.0]


def test_hidden_states_are_the_input_of_the_head():
    model = tiny.llama(0)
    pair, _ = made(model, model)
    reading = responses.read(model, pair, pair.y, "fused")
    assert reading.x.shape == (*pair.y.tokens.shape, 16)
    assert reading.head.weight is model.lm_head.weight
    expected = losses.response_logits(model, pair, pair.y)
    torch.testing.assert_close(reading.logits(), expected, rtol=0, atol=1e-12)
