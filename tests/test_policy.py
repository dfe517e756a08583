"""Loading, adapters, the reference, and what `rollout` and `policy` say to bad input."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from nlhf import config as configs
from nlhf import losses, policy, rollout
from nlhf.rollout import Completion, Pair, Side
from tests import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "llama"
    tiny.llama(0, torch.float32).save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    return path


def test_load(folder):
    model = policy.load_model(folder, torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert not model.training
    assert policy.load_model(folder).dtype == torch.float32
    tokenizer = policy.load_tokenizer(folder)
    assert tokenizer("w1 w2")["input_ids"] == [4, 5]
    assert policy.end_tokens(model) == [2]
    assert policy.end_tokens(model, 7) == [7]
    model.generation_config.eos_token_id = [4, 5]
    assert policy.end_tokens(model) == [4, 5]
    assert policy.pad_token(model) == 0


def broken(folder, to, name, change):
    """A copy of the folder with one file changed by ``change``, a function of its bytes."""
    to.mkdir()
    for file in folder.iterdir():
        data = file.read_bytes()
        (to / file.name).write_bytes(change(data) if file.name == name else data)
    return to


def test_errors_of_loading(folder, tmp_path):
    with pytest.raises(ValueError, match=r"nowhere/at/all: no such folder"):
        policy.load_model("nowhere/at/all")
    with pytest.raises(ValueError, match="no such folder"):
        policy.load_tokenizer(tmp_path / "none")
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        policy.load_model(tmp_path)
    cut = broken(folder, tmp_path / "cut", "model.safetensors", lambda data: data[:-100])
    with pytest.raises(ValueError, match=r"cut: the model cannot be loaded: "):
        policy.load_model(cut)

    def deeper(data):
        return json.dumps(json.loads(data) | {"num_hidden_layers": 3}).encode()

    with pytest.raises(ValueError, match=r"weights are missing, model\.layers\.2"):
        policy.load_model(broken(folder, tmp_path / "deeper", "config.json", deeper))
    for kind in ("pad", "eos"):
        tiny.tokenizer(**{kind: False}).save_pretrained(tmp_path / kind)
        with pytest.raises(ValueError, match=f"has no {kind} token"):
            policy.load_tokenizer(tmp_path / kind)


@pytest.mark.parametrize("build", [tiny.llama, tiny.gpt2])
def test_lora_on_the_last_layers(build):
    dtype = torch.bfloat16
    model = policy.lora(build(0, dtype), 2, 4, last_layers=1)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    per_layer = 7 if build is tiny.llama else 4
    assert len(trained) == 2 * per_layer
    assert all(".1." in name and "lora" in name for name in trained)
    assert {p.dtype for p in trained.values()} == {torch.float32}
    both = policy.lora(build(0, dtype), 2, 4)
    assert sum(p.requires_grad for p in both.parameters()) == 4 * per_layer
    with pytest.raises(ValueError, match=r"last_layers in \[0, 2\]"):
        policy.lora(build(0, dtype), 2, 4, last_layers=3)


def test_adapters_off_is_the_base_and_nests():
    model, base = tiny.with_lora(tiny.llama(0)), tiny.llama(0)
    x = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        on = model(x).logits
        off = policy.AdaptersOff(model)
        with off, off:
            assert torch.equal(model(x).logits, base(x).logits)
        assert torch.equal(model(x).logits, on)
        with model.disable_adapter():
            with off:
                pass
            assert torch.equal(model(x).logits, base(x).logits)
    assert not torch.equal(on, base(x).logits)
    with pytest.raises(ValueError, match="switching adapters off"):
        policy.AdaptersOff(base)


def test_save_merges_a_copy(tmp_path):
    model = tiny.with_lora(tiny.llama(0))
    x = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        before = model(x).logits
        policy.save(model, tiny.tokenizer(), tmp_path / "out")
        policy.save(model, tiny.tokenizer(), tmp_path / "out")
        assert torch.equal(model(x).logits, before)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float64)
        torch.testing.assert_close(loaded(x).logits, before)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="something else"):
        policy.save(model, tiny.tokenizer(), tmp_path / "other")


def test_the_head_gets_a_contiguous_input():
    """Of a strided slice a frozen bf16 head makes a batched product, 60 times slower on CPU."""
    model = tiny.llama(0)
    seen = []
    model.lm_head.register_forward_hook(lambda _, args, out: seen.append(args[0].is_contiguous()))
    ids, mask = tiny.prompts([3, 5])
    logits = policy.last_logits(model, ids, mask, policy.positions(mask), 2)
    assert seen == [True]
    assert logits.shape == (2, 2, tiny.V)
    assert not model.lm_head._forward_pre_hooks


PROMPTS = tiny.prompts([3, 2])
LLAMA = tiny.llama(0)
BAD = {
    "coefficient": ({"mixture_coef": 1.5}, r"mixture_coef of side 1 must be in \[0, 1\], got 1.5"),
    "count": ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
    "context": ({"max_new_tokens": 62}, "prompt has 3 tokens, with max_new_tokens = 62"),
    "no ref": ({"ref": None}, "ref must be a model when the policy is not a PEFT model"),
    "coef without ref": ({"with_ref": False}, "must be 0 with with_ref=False"),
    "vocabulary": ({"ref": tiny.llama(0, vocab_size=60)}, "vocabulary, got 53 and 60"),
    "eos": ({"eos_token_id": [2, 53]}, r"eos_token_id must be in \[0, 53\)"),
    "no eos": ({"eos_token_id": []}, "eos_token_id must be"),
    "pad": ({"pad_token_id": -1}, "pad_token_id must be"),
    "seed": ({"seed": torch.tensor([1, 2, 3])}, r"seed must be an int or int64 \(2,\)"),
    "temperature": ({"temperature": -1.0}, "temperature must be"),
    "top_p": ({"top_p": 0.0}, "top_p must be"),
    "ids": ({"input_ids": PROMPTS[0] + 50}, r"input_ids must be in \[0, 53\), got"),
    "dtype": ({"input_ids": PROMPTS[0].int()}, "input_ids must be int64"),
    "dims": ({"input_ids": PROMPTS[0][0]}, "input_ids must be int64"),
    "nothing": ({"input_ids": PROMPTS[0][:0]}, "not empty"),
    "mask shape": ({"attention_mask": PROMPTS[1][:, 1:]}, "attention_mask must be"),
    "mask dtype": ({"attention_mask": PROMPTS[1].float()}, "attention_mask must be"),
    "empty prompt": ({"attention_mask": torch.tensor([[1, 1, 1], [0, 0, 0]])}, "prompt 1 is empty"),
    "right padding": ({"attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]])}, "prompt 0 must be"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_of_a_rollout(name):
    change, message = BAD[name]
    good = {
        "policy": LLAMA,
        "ref": tiny.llama(1),
        "input_ids": PROMPTS[0],
        "attention_mask": PROMPTS[1],
        "mixture_coef": 0.5,
        "max_new_tokens": 2,
        "seed": 0,
    }
    rollout.generate_pair(**good)
    with pytest.raises(ValueError, match=message) as error:
        rollout.generate_pair(**good | change)
    assert "\n" not in str(error.value)


def test_bad_sides_and_models_without_special_tokens():
    settings = {"max_new_tokens": 2, "seed": 0, "with_ref": False}
    with pytest.raises(ValueError, match="at least one Side"):
        rollout.generate([], None, *PROMPTS, **settings)
    with pytest.raises(ValueError, match="n_samples of side 0 must be at least 1"):
        rollout.generate([Side(LLAMA, n_samples=0)], None, *PROMPTS, **settings)
    bare = tiny.llama(0)
    for config in (bare.config, bare.generation_config):
        config.eos_token_id = config.pad_token_id = None
    with pytest.raises(ValueError, match=r"eos_token_id must be .* the model names none"):
        rollout.generate([Side(bare)], None, *PROMPTS, **settings)
    with pytest.raises(ValueError, match="pad_token_id must be"):
        rollout.generate([Side(bare)], None, *PROMPTS, eos_token_id=2, **settings)
    meta = {"input_ids": PROMPTS[0].to("meta"), "attention_mask": PROMPTS[1]}
    with pytest.raises(ValueError, match=r"attention_mask must be .* on meta"):
        rollout.generate([Side(LLAMA)], None, **meta, **settings)


def test_bad_completions_and_pairs():
    tokens, mask = torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 3, dtype=torch.bool)
    y = Completion(tokens, mask, ref_logprobs=torch.zeros(2, 3))
    with pytest.raises(ValueError, match="tokens must be int64"):
        Completion(tokens.int(), mask)
    with pytest.raises(ValueError, match=r"mask must be bool \(2, 3\)"):
        Completion(tokens, mask.long())
    with pytest.raises(ValueError, match=r"ref_logprobs must be \(2, 3\)"):
        Completion(tokens, mask, ref_logprobs=torch.zeros(2, 2))
    with pytest.raises(ValueError, match="one row each"):
        Pair(*PROMPTS, y, y.rows(slice(0, 1)))


# ---- DoRA, and both passes in one batch


@pytest.mark.parametrize("build", [tiny.llama, tiny.gpt2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dora_with_its_adapters_off_is_the_base(build, dtype):
    base = build(0, dtype)
    model = policy.lora(build(0, dtype), 2, 4, dora=True).eval()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert any("magnitude" in name for name in trained)
    assert {p.dtype for p in trained.values()} <= {torch.float32, dtype} - {torch.bfloat16}
    x = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(0.3 * torch.randn_like(parameter))
        on = model(x).logits
        with policy.AdaptersOff(model):
            assert torch.equal(model(x).logits, base(x).logits)
        assert not torch.allclose(on, base(x).logits, rtol=0.1)
        assert torch.equal(model(x).logits, on)


def test_dora_is_a_setting_that_needs_adapters():
    assert configs.from_dict({"dora": True, "lora_r": 2}, "test").dora
    with pytest.raises(ValueError, match="dora needs adapters, got lora_r 0; set lora_r"):
        configs.from_dict({"dora": True}, "test")


def dora(seed=0):
    model = policy.lora(tiny.llama(seed), 2, 4, dora=True).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


# how many forward passes each takes
SCORED = {
    "lora": (lambda: tiny.with_lora(tiny.llama(0)), 1),
    "lora, some layers": (lambda: tiny.with_lora(tiny.gpt2(0), last_layers=1), 1),
    "lora, training": (lambda: tiny.with_lora(tiny.gpt2(0)).train(), 1),
    "dora": (dora, 2),
    "no adapters": (lambda: tiny.llama(0), 2),
}


@pytest.mark.parametrize("head", ["fused", "logits"])
@pytest.mark.parametrize("name", SCORED)
def test_policy_and_reference_in_one_batch_where_peft_allows(name, head, one_thread):
    build, passes = SCORED[name]
    model = build()
    ref = tiny.llama(1) if name == "no adapters" else None
    ids, mask = tiny.prompts([3, 6, 2])
    settings = {"mixture_coef": 0.3, "max_new_tokens": 7, "seed": 1, "eos_token_id": [2, 30, 31]}
    pair = rollout.generate_pair(model, ref, ids, mask, **settings)
    training = [module.training for module in model.modules()]
    calls = []
    for one in filter(None, (model, ref)):
        one.register_forward_hook(lambda *_: calls.append(1))
    both = losses.score(model, ref, pair, pair.y_other, head=head)
    assert len(calls) == passes
    torch.testing.assert_close(both[0], pair.y_other.policy_logprobs, check_dtype=False)
    torch.testing.assert_close(both[1], pair.y_other.ref_logprobs, check_dtype=False)
    assert (both[0] - both[1]).abs().max() > 0.1
    assert not any(x.requires_grad for x in both)
    assert [module.training for module in model.modules()] == training


def test_merged_adapters_and_a_second_adapter_take_a_pass_each(one_thread):
    merged, two = tiny.with_lora(tiny.llama(0)), tiny.with_lora(tiny.llama(0))
    assert policy.mixed_names(two, 2) == ["default", "default", "__base__", "__base__"]
    merged.merge_adapter()
    two.add_adapter("other", two.peft_config["default"])
    two.base_model.set_adapter(["default", "other"])
    for model in (merged, two, tiny.llama(0)):
        assert policy.mixed_names(model, 2) is None


def test_a_score_needs_a_reference():
    ids, mask = PROMPTS
    with_one = Completion(torch.full((2, 3), 4), torch.ones(2, 3, dtype=torch.bool))
    pair = Pair(ids, mask, with_one, with_one)
    with pytest.raises(ValueError, match="ref must be a model when the policy is not a PEFT"):
        losses.score(tiny.llama(0), None, pair, with_one)
