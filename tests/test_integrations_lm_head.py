"""Losses and log-probabilities without logits, against transformers' own forward."""

import copy

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import nlhf_kernels as nk
from nlhf_kernels import integrations
from tests import tiny
from tests.test_integrations import example

hosts = integrations.transformers
pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
MODELS = {
    # its loss is in float32 all the same
    "float64": tiny.llama,
    "llama": lambda: tiny.llama(dtype=torch.float32),
    "tied": lambda: tiny.gpt2(dtype=torch.float32),
    "softcap": tiny.gemma2,
    "logit_scale": lambda: tiny._build("Cohere", 0, torch.float32, logit_scale=0.3, **SIZES),
    "logits_scaling": lambda: tiny._build("Granite", 0, torch.float32, logits_scaling=4.0, **SIZES),
    "bias": lambda: biased(tiny._build("Phi", 0, torch.float32, **SIZES)),
    "decoder": lambda: tiny._build(
        "OPT", 0, torch.float32, word_embed_proj_dim=16, ffn_dim=24, **SIZES
    ),
}


def biased(model: nn.Module) -> nn.Module:
    nn.init.normal_(model.lm_head.bias)
    return model


def batch(width: int = 7) -> dict:
    ids, mask = tiny.prompts([width, width - 2, 3])
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, : width // 2] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def step(model: nn.Module, **inputs) -> tuple[Tensor, dict]:
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), grads


def same(got: tuple[Tensor, dict], want: tuple[Tensor, dict], rtol: float = 2e-6) -> None:
    assert got[0].dtype == want[0].dtype
    torch.testing.assert_close(got[0], want[0], rtol=rtol, atol=0)
    assert got[1].keys() == want[1].keys()
    top = max(float(grad.abs().max()) for grad in want[1].values())
    for name, grad in want[1].items():
        # a gradient that is 0 but for rounding has no size of its own
        scale = max(float(grad.abs().max()), top / 100)
        torch.testing.assert_close(got[1][name], grad, rtol=0, atol=rtol * 10 * scale)


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_the_models_own(name):
    model, inputs = MODELS[name](), batch()
    count = int((inputs["labels"][:, 1:] != -100).sum())
    several = ({}, {"num_items_in_batch": 5}, {"num_items_in_batch": torch.tensor(2 * count)})
    own = [step(model, **inputs, **more) for more in several]
    hosts.patch_lm_head(model)
    model.lm_head.register_forward_hook(never)
    for more, want in zip(several, own, strict=True):
        same(step(model, **inputs, **more), want)
    assert model(**inputs).logits is None


def never(*_):
    raise AssertionError("the head was called, which makes logits")


class Widest(TorchDispatchMode):
    """The most elements of a tensor whose last dimension is the vocabulary."""

    most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **kwargs or {})
        if isinstance(found, Tensor) and found.dim() and found.shape[-1] == tiny.V:
            self.most = max(self.most, found.numel())
        return found


def test_no_tensor_is_as_large_as_the_logits(monkeypatch):
    model = tiny.llama(dtype=torch.float32)
    inputs = batch(60)
    size = inputs["labels"][:, 1:].numel() * tiny.V
    with Widest() as before:
        step(model, **inputs)
    op, budgets = nk.linear_token_logprobs, []
    monkeypatch.setattr(
        nk,
        "linear_token_logprobs",
        lambda *a, **k: budgets.append(k["memory_budget"]) or op(*a, **k),
    )
    hosts.patch_lm_head(model, memory_budget=1)
    with Widest() as after:
        step(model, **inputs)
    hosts.token_logprobs(model, inputs["input_ids"], memory_budget=2)
    assert before.most >= size
    assert after.most < size
    assert budgets == [1, 2]


@pytest.mark.parametrize("name", ["llama", "softcap"])
def test_labels_that_are_shifted_already_and_others_to_ignore(name):
    model, inputs = MODELS[name](), batch()
    labels = inputs.pop("labels")
    shifted = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:].contiguous()
    given = {"labels": labels, "shift_labels": shifted}
    ignored = {"labels": labels.where(labels != -100, 3), "ignore_index": 3}
    own = [step(model, **inputs, **given), step(model, **inputs, **ignored)]
    hosts.patch_lm_head(model)
    same(step(model, **inputs, **given), own[0])
    same(step(model, **inputs, **ignored), own[1])


def test_without_a_label_the_loss_is_nan_as_the_models_own():
    model, inputs = tiny.llama(), batch()
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    assert model(**inputs).loss.isnan()
    hosts.patch_lm_head(model)
    assert model(**inputs).loss.isnan()


def test_positional_arguments_tuples_and_caches_come_back():
    model, inputs = tiny.llama(), batch()
    hosts.patch_lm_head(model)
    ids, mask, labels = inputs.values()
    loss = model(ids, mask, labels=labels).loss
    assert torch.equal(model(ids, mask, None, None, None, labels).loss, loss)
    assert torch.equal(model(ids, mask, labels=labels, return_dict=False)[0], loss)
    output = model(ids, mask, labels=labels, use_cache=True, output_hidden_states=True)
    assert output.past_key_values.get_seq_length() == ids.shape[1]
    assert len(output.hidden_states) == 3


def test_without_labels_the_model_is_as_before():
    model, inputs = tiny.llama(), batch()
    inputs.pop("labels")
    logits = model(**inputs).logits
    said = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    hosts.patch_lm_head(model)
    assert torch.equal(model(**inputs).logits, logits)
    assert torch.equal(model.generate(**inputs, max_new_tokens=5, do_sample=False), said)


@pytest.mark.parametrize("name", MODELS)
def test_token_logprobs_are_those_of_the_logits(name):
    model, inputs = MODELS[name](), batch()
    ids, mask, _ = inputs.values()
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
    logs = (logits.double() / 0.8).log_softmax(-1)
    keep = mask[:, 1:]
    want = logs.gather(-1, ids[:, 1:, None])[..., 0] * keep, -(logs.exp() * logs).sum(-1) * keep
    (want[0].sum() - 0.1 * want[1].sum()).backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    got = hosts.token_logprobs(model, ids, mask, temperature=0.8)
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x.double(), y, atol=1e-5, rtol=1e-5)
    (got.logprobs.sum() - 0.1 * got.entropy.sum()).backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    same((want[0], found), (want[0], grads), rtol=1e-5)


def test_patching_is_undone_and_done_twice():
    model, inputs = tiny.llama(), batch()
    hosts.patch_lm_head(model)
    hosts.patch_lm_head(model, memory_budget=2**20)
    hosts.unpatch_lm_head(model)
    hosts.unpatch_lm_head(model)
    assert "forward" not in vars(model)
    assert model(**inputs).logits is not None
    model.forward = own = lambda **kwargs: "somebody's"
    hosts.patch_lm_head(model)
    assert model(input_ids=inputs["input_ids"]) == "somebody's"
    assert model(**inputs).logits is None
    hosts.unpatch_lm_head(model)
    assert model.forward is own
    hosts.patch_lm_head(model)
    ours = model.forward
    model.forward = lambda **kwargs: ours(**kwargs)
    with pytest.raises(ValueError, match="was changed since: undo that first"):
        hosts.unpatch_lm_head(model)


def test_a_copy_has_weights_of_its_own():
    model, inputs = tiny.llama(dtype=torch.float32), batch()
    hosts.patch_lm_head(model)
    twin = copy.deepcopy(model)
    before = model(**inputs).loss
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(1.1)
    assert torch.equal(model(**inputs).loss, before)
    want = tiny.llama(dtype=torch.float32)
    want.load_state_dict(twin.state_dict())
    torch.testing.assert_close(twin(**inputs).loss, want(**inputs).loss)
    ids = inputs["input_ids"]
    assert torch.equal(twin(ids).logits, want(ids).logits)


# peft still asks transformers by a name that 5.23 deprecates
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_adapters_below_the_head_learn_and_one_on_it_is_refused():
    model, inputs = tiny.with_lora(tiny.llama(dtype=torch.float32)), batch()
    want = step(model, **inputs)
    hosts.patch_lm_head(model)
    same(step(model, **inputs), want)
    assert model(**inputs).logits is None
    logs = model(inputs["input_ids"]).logits[:, :-1].log_softmax(-1)
    chosen = logs.gather(-1, inputs["input_ids"][:, 1:, None])[..., 0]
    got = hosts.token_logprobs(model, inputs["input_ids"]).logprobs
    torch.testing.assert_close(got, chosen, atol=1e-5, rtol=1e-5)

    import peft

    for settings in ({"target_modules": ["lm_head"]}, {"modules_to_save": ["lm_head"]}):
        config = peft.LoraConfig(r=2, **{"target_modules": ["q_proj"]} | settings)
        adapted = peft.get_peft_model(tiny.llama(), config)
        with pytest.raises(ValueError, match=r"plain torch.nn.Linear, got peft\..*: merge"):
            hosts.patch_lm_head(adapted)
    later = tiny.llama()
    hosts.patch_lm_head(later)
    later.lm_head = nn.Sequential(later.lm_head)
    with pytest.raises(ValueError, match=r"plain torch\.nn\.Linear"):
        later(**inputs)


def test_the_example_runs():
    said = example("transformers_lm_head").splitlines()
    loss, own = said[0].removeprefix("loss ").split(", the model's own ")
    assert abs(float(loss) - float(own.split(";")[0])) < 1e-4
    assert said[0].endswith("logits: None")


class Squared(transformers.LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits**3
        return output


class Halved(transformers.LlamaForCausalLM):
    def forward(self, input_ids=None, **kwargs):
        hidden = self.model(input_ids=input_ids).last_hidden_state / 2
        return transformers.modeling_outputs.CausalLMOutputWithPast(logits=self.lm_head(hidden))


@pytest.mark.parametrize("kind", [Squared, Halved])
def test_a_model_that_does_more_around_its_head_is_refused(kind):
    model = kind(tiny.llama().config)
    for refused in (
        hosts.patch_lm_head,
        lambda m: hosts.token_logprobs(m, torch.ones(1, 3).long()),
    ):
        with pytest.raises(ValueError, match=f"{kind.__name__} does more around its LM head"):
            refused(model)
    assert "forward" not in vars(model)


def test_what_cannot_be_had_is_said():
    model, inputs = tiny.llama(), batch()
    with pytest.raises(ValueError, match="must be a causal model of transformers, got Linear"):
        hosts.patch_lm_head(nn.Linear(2, 2))
    model.loss_function = lambda *a, **k: None
    with pytest.raises(ValueError, match="loss of LlamaForCausalLM is not ForCausalLMLoss"):
        hosts.patch_lm_head(model)
    model = tiny.llama()
    hosts.patch_lm_head(model)
    with pytest.raises(ValueError, match="logits_to_keep is for a forward without labels"):
        model(**inputs, logits_to_keep=1)
    with pytest.raises(ValueError, match="output_router_logits=False"):
        model(**inputs, output_router_logits=True)


@pytest.mark.parametrize("autocast", [False, True])
def test_sixteen_bits_lose_no_more_than_the_models_own(autocast):
    inputs = batch()
    exact = tiny.llama()
    model = tiny.llama(dtype=torch.float32 if autocast else torch.bfloat16)
    exact.load_state_dict(model.state_dict())
    want = float(exact(**inputs).loss.detach())
    losses = []
    for patch in (lambda m: None, hosts.patch_lm_head):
        patch(model)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(**inputs).loss
        assert loss.dtype == torch.float32
        losses.append(abs(float(loss.detach()) - want))
        loss.backward()
    assert losses[1] <= losses[0] + 2**-8 * want


def test_a_patched_model_compiles_as_one_graph():
    torch._dynamo.reset()
    model, inputs = tiny.llama(dtype=torch.float32), batch()
    hosts.patch_lm_head(model)
    want = step(model, **inputs)
    compiled = torch.compile(
        lambda **given: model(**given).loss, fullgraph=True, backend="aot_eager"
    )
    model.zero_grad()
    loss = compiled(**inputs)
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    same((loss.detach(), grads), want)
