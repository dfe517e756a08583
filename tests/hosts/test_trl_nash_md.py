"""The trainer against TRL's own: the patch, and the interface and loss that it took over."""

import dataclasses
import importlib
import inspect
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from nlhf import rollout, trl_compat
from tests import tiny, trl_tiny
from tests.trl_tiny import classifier, log_mixture, prefer_even, prompts

ROOT = Path(__file__).parents[2]
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
with warnings.catch_warnings():
    # TRL's own, of names that others have deprecated
    warnings.simplefilter("ignore")
    HOST = importlib.import_module("trl.experimental.nash_md")

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # TRL uses names that later versions of transformers deprecate
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
]


@pytest.fixture
def patched():
    trl_compat.patch_nash_md()
    yield HOST.NashMDTrainer
    trl_compat.unpatch_nash_md()


def settings(folder, cls=None, **changes):
    return trl_tiny.settings(folder, cls or HOST.NashMDConfig, **changes)


def trainer(folder, *, cls=None, model=None, more=None, opinion=None, **changes):
    from datasets import Dataset

    config = trl_compat.NashMDConfig if cls is trl_compat.NashMDTrainer else HOST.NashMDConfig
    return (cls or HOST.NashMDTrainer)(
        model=tiny.llama() if model is None else model,
        args=settings(folder, config, **changes),
        train_dataset=Dataset.from_list(prompts(8)),
        processing_class=tiny.tokenizer(),
        **({"judge": prefer_even} if opinion is None else opinion),
        **(more or {}),
    )


def with_adapters(found, seed: int = 0) -> torch.nn.Module:
    """The policy of a trainer with LoRA, after some training: adapters start at zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, x in found.model.named_parameters():
            if "lora_" in name:
                x.copy_(0.5 * torch.randn(x.shape, generator=generator, dtype=torch.float64))
    return found.model


def lora() -> dict:
    from peft import LoraConfig

    adapters = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj", "down_proj"])
    return {"peft_config": adapters}


def batch(rows: list[list[int]]) -> dict:
    L = max(map(len, rows))
    ids = torch.tensor([[0] * (L - len(row)) + row for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "raw": ["w1"] * len(rows)}


# ---- the interface that was taken over


def test_the_constructor_is_trls_and_more():
    theirs = inspect.signature(HOST.NashMDTrainer.__init__).parameters
    ours = inspect.signature(trl_compat.NashMDTrainer.__init__).parameters
    assert list(ours)[: len(theirs)] == list(theirs)
    for name, parameter in theirs.items():
        assert ours[name].default == parameter.default, name
        assert ours[name].kind == parameter.kind, name
    theirs = inspect.signature(HOST.nash_md_trainer.GeometricMixtureWrapper.__init__).parameters
    ours = inspect.signature(trl_compat.GeometricMixtureWrapper.__init__).parameters
    assert [(p.name, p.default) for p in theirs.values()] == [
        (p.name, p.default) for p in ours.values()
    ]


def test_what_users_override_is_there_with_trls_arguments():
    for name, theirs in vars(HOST.NashMDTrainer).items():
        ours = getattr(trl_compat.NashMDTrainer, name, None)
        if inspect.isfunction(theirs):
            wanted = list(inspect.signature(theirs).parameters)
            got = list(inspect.signature(ours).parameters)
            assert got[: len(wanted)] == wanted, name
        elif not name.startswith("__"):
            assert type(ours) is type(theirs), name
    for name in ("beta", "tokenize_row", "create_model_card"):
        assert hasattr(trl_compat.NashMDTrainer, name)


def test_the_configuration_has_every_field_with_trls_default(tmp_path):
    theirs, ours = (
        cls(output_dir=str(tmp_path), use_cpu=True)
        for cls in (HOST.NashMDConfig, trl_compat.NashMDConfig)
    )
    fields = {f.name: f for f in dataclasses.fields(trl_compat.NashMDConfig)}
    for field in dataclasses.fields(HOST.NashMDConfig):
        found = fields[field.name]
        if field.default_factory is not dataclasses.MISSING:
            assert found.default_factory() == field.default_factory(), field.name
        else:
            assert found.default == field.default, field.name
        values = getattr(theirs, field.name), getattr(ours, field.name)
        # a folder with the time in its name
        assert values[0] == values[1] or field.name == "logging_dir", field.name
    assert set(fields) - {f.name for f in dataclasses.fields(HOST.NashMDConfig)} == {"kl"}


@pytest.mark.parametrize("coef", [0.0, 0.5, 1.0])
def test_the_wrapper_gives_the_logits_of_trls(coef):
    from transformers import GenerationConfig

    ids, mask = tiny.prompts([5, 5])
    pair = tiny.llama(), tiny.llama(seed=1)
    config = GenerationConfig(max_new_tokens=2)
    theirs, ours = (
        cls(*pair, config, mixture_coef=coef, device=torch.device("cpu"))
        for cls in (
            HOST.nash_md_trainer.GeometricMixtureWrapper,
            trl_compat.GeometricMixtureWrapper,
        )
    )
    torch.testing.assert_close(
        ours(ids, attention_mask=mask).logits, theirs(ids, attention_mask=mask).logits
    )
    assert {k for k in vars(theirs) if not k.startswith("_")} <= set(vars(ours))


def test_token_kl_is_trls_loss_and_gradient(tmp_path):
    """The same responses and scores through TRL's methods and through ours."""
    policy, ref = tiny.llama(), tiny.llama(seed=1)
    opinion = {"reward_funcs": classifier()}
    more = {"ref_model": ref}
    theirs = trainer(tmp_path, model=policy, more=more, opinion=opinion, beta=0.3)
    ours = trainer(
        tmp_path,
        cls=trl_compat.NashMDTrainer,
        model=policy,
        more=more,
        opinion=opinion,
        beta=0.3,
        kl="token",
    )
    # of one length: rotary angles are float32, and TRL counts padding as positions
    x = batch([[1, 4, 5, 6], [1, 7, 8, 3], [1, 9, 8, 6]])
    generator = torch.Generator().manual_seed(0)
    answers = torch.randint(3, tiny.V, (2, 3, 6), generator=generator)
    answers[0, 0, 2] = answers[1, 1, 0] = answers[0, 2, 5] = 2
    outputs = [torch.cat([x["input_ids"], tokens], 1) for tokens in answers]
    probability = torch.tensor([0.9, 0.2, 0.4], dtype=torch.float64)
    found, scores = [], []
    for who in (theirs, ours):
        y, y_other = who._process_completions(*outputs, x)
        scores.append(who._compute_rewards(y, y_other, 4))
        logprobs = who._compute_logprobs(policy, y, 4)
        loss, score, kl = who._compute_losses(*logprobs, probability)
        gradient = torch.autograd.grad(loss, list(policy.parameters()), retain_graph=True)
        tokens = [torch.where(d["attention_mask"] != 0, d["input_ids"], 0) for d in (y, y_other)]
        found.append((tokens, *logprobs, loss, score, kl, gradient))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    # a model in float32, which reads the padding on another side
    torch.testing.assert_close(*scores)


# ---- the patch


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_rollout_is_the_exact_mixture_also_under_lora(
    tmp_path, patched, monkeypatch, checkpointing
):
    found = trainer(tmp_path, more=lora(), mixture_coef=0.4, gradient_checkpointing=checkpointing)
    policy, drawn = with_adapters(found), []
    original = rollout.generate_pair
    monkeypatch.setattr(
        rollout, "generate_pair", lambda *a, **k: drawn.append(original(*a, **k)) or drawn[-1]
    )
    x = batch([[1, 4, 5], [1, 7], [1, 9, 8, 6]])
    outputs = found._generate_completions(policy, x)
    for output, y, coef in zip(outputs, (drawn[0].y, drawn[0].y_other), (0.0, 0.4), strict=True):
        # TRL's format: the prompts as they are, the responses up to the longest
        assert torch.equal(output[:, :4], x["input_ids"])
        T = output.shape[1] - 4
        assert torch.equal(output[:, 4:], y.tokens[:, :T])
        assert not y.mask[:, T:].any()
        mask = torch.cat([x["attention_mask"], y.mask[:, :T].long()], 1)
        exact = log_mixture(policy, tiny.llama(), output, mask, coef, 0.9)[:, 3:-1]
        exact = exact.gather(-1, output[:, 4:, None])[..., 0][y.mask[:, :T]]
        got = y.sampling_logprobs[:, :T][y.mask[:, :T]]
        torch.testing.assert_close(got, exact, rtol=0, atol=1e-9)


def test_one_token_is_distributed_as_the_mixture_and_trls_as_the_policy(tmp_path):
    """Without the patch the mixture of LoRA is the policy, where TRL uses no cache at all."""
    x = batch([[1, 4, 5]] * 4000)

    def frequencies():
        found = trainer(
            tmp_path,
            more=lora(),
            opinion={"reward_funcs": len},
            mixture_coef=0.8,
            max_new_tokens=1,
            gradient_checkpointing=True,
        )
        policy = with_adapters(found)
        torch.manual_seed(0)
        drawn = found._generate_completions(policy, x)[1][:, 3]
        return torch.bincount(drawn, minlength=tiny.V) / 4000, policy

    unpatched, policy = frequencies()
    row = {k: v[:1] for k, v in x.items() if k != "raw"}.values()
    mixture, itself = (
        log_mixture(policy, tiny.llama(), *row, coef, 0.9)[0, -1].exp() for coef in (0.8, 0.0)
    )
    trl_compat.patch_nash_md()
    try:
        with_patch = frequencies()[0]
    finally:
        trl_compat.unpatch_nash_md()
    # the mean distance of 4,000 draws is about 0.09
    assert (with_patch - mixture).abs().sum() < 0.15
    assert (unpatched - itself).abs().sum() < 0.15
    assert (mixture - itself).abs().sum() > 0.4


def test_without_checkpointing_trls_models_share_a_cache_and_those_of_the_patch_do_not(tmp_path):
    x = batch([[1, 4, 5]] * 4000)
    policy, ref = tiny.llama(), tiny.llama(seed=1)

    def frequencies():
        more = {"ref_model": ref}
        found = trainer(
            tmp_path, model=policy, more=more, opinion={"reward_funcs": len}, max_new_tokens=1
        )
        torch.manual_seed(0)
        drawn = found._generate_completions(policy, x)[1][:, 3]
        return torch.bincount(drawn, minlength=tiny.V) / 4000

    unpatched = frequencies()
    trl_compat.patch_nash_md()
    try:
        with_patch = frequencies()
    finally:
        trl_compat.unpatch_nash_md()
    row = {k: v[:1] for k, v in x.items() if k != "raw"}.values()
    mixture = log_mixture(policy, ref, *row, 0.5, 0.9)[0, -1].exp()
    assert (with_patch - mixture).abs().sum() < 0.15
    assert (unpatched - mixture).abs().sum() > 0.4


@pytest.fixture
def one_process(tmp_path):
    store = {"init_method": f"file://{tmp_path / 'store'}", "rank": 0, "world_size": 1}
    torch.distributed.init_process_group("gloo", **store)
    yield
    torch.distributed.destroy_process_group()


def test_lora_in_ddp(tmp_path, one_process):
    x = batch([[1, 4, 5], [1, 7]])
    found = trainer(tmp_path, more=lora(), opinion={"reward_funcs": len})
    policy = with_adapters(found)
    wrapped = torch.nn.parallel.DistributedDataParallel(policy)
    output = torch.cat([x["input_ids"], torch.tensor([[7, 2], [8, 9]])], 1)
    y = found._process_completions(output, output, x)[0]
    with pytest.raises(AttributeError, match="disable_adapter"):
        found._compute_logprobs(wrapped, y, 3)
    wanted = found._compute_logprobs(policy, y, 3)
    trl_compat.patch_nash_md()
    try:
        logprobs = found._compute_logprobs(wrapped, y, 3)
        outputs = found._generate_completions(wrapped, x)
    finally:
        trl_compat.unpatch_nash_md()
    torch.testing.assert_close(logprobs, wanted)
    logprobs[0].sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in policy.parameters())
    assert all(torch.equal(ids[:, :3], x["input_ids"]) for ids in outputs)


@pytest.mark.parametrize("adapters", [False, True])
def test_a_step_with_a_pairwise_judge(tmp_path, patched, monkeypatch, adapters):
    class Judge:
        def judge(self, prompts, completions, shuffle_order=True):
            return [[0.9, 0.2, 1.0, 0.0][i] for i in range(len(prompts))]

    found = trainer(
        tmp_path, opinion={"judge": Judge()}, more=lora() if adapters else None, max_steps=1
    )
    seen = []
    original = type(found)._compute_losses
    monkeypatch.setattr(
        type(found), "_compute_losses", lambda self, *x: seen.append(x[2]) or original(self, *x)
    )
    before = [p.clone() for p in found.model.parameters() if p.requires_grad]
    found.train()
    torch.testing.assert_close(seen[0], torch.tensor([0.9, 0.2, 1.0, 0.0]), rtol=0, atol=1e-7)
    after = [p for p in found.model.parameters() if p.requires_grad]
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    row = found.state.log_history[0]
    assert row["rewards/probabilities"] == pytest.approx(0.525, abs=1e-6)
    assert all(abs(value) < 1e3 for value in row.values())


def test_other_opinions_and_one_value_an_epoch(tmp_path, patched):
    def length(prompts, completions, completion_ids, **_):
        return [float(len(ids)) for ids in completion_ids]

    for opinion in ({"preference": prefer_even}, {"reward_funcs": length}):
        found = trainer(
            tmp_path,
            opinion=opinion,
            mixture_coef=[0.1, 0.9],
            beta=[0.3, 0.2, 0.1],
            max_steps=-1,
            num_train_epochs=3,
        )
        found.train()
        rows = found.state.log_history[:-1]
        assert [row["mixture_coef"] for row in rows] == [0.1, 0.1, 0.9, 0.9, 0.9, 0.9]
        assert [row["beta"] for row in rows] == [0.3, 0.3, 0.2, 0.2, 0.1, 0.1]
    assert 1 <= rows[0]["rewards/chosen"] <= 5


def test_the_end_is_looked_for_in_the_response_alone(tmp_path, patched):
    x = batch([[1, 2, 5], [1, 2, 5]])
    outputs = torch.cat([x["input_ids"], torch.tensor([[7, 2], [8, 9]])], 1)
    scores = []
    for penalty in (None, 3.0):
        found = trainer(
            tmp_path, opinion={"reward_funcs": classifier()}, missing_eos_penalty=penalty
        )
        y, y_other = found._process_completions(outputs, outputs, x)
        scores.append(found._compute_rewards(y, y_other, 3)[0])
    torch.testing.assert_close(scores[0] - scores[1], torch.tensor([0.0, 3.0]))


def test_what_the_rollout_does_not_serve_is_named(tmp_path, patched):
    for changes, message in (
        ({"repetition_penalty": 1.2}, "repetition_penalty = 1.2"),
        ({"generation_kwargs": {"no_repeat_ngram_size": 3}}, "no_repeat_ngram_size = 3"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer(tmp_path, **changes)
    with pytest.raises(ValueError, match="not two"):
        trainer(tmp_path, opinion={"judge": prefer_even, "reward_funcs": len})
    with pytest.raises(ValueError, match="missing_eos_penalty"):
        trainer(tmp_path, missing_eos_penalty=1.0)
    with pytest.raises(ValueError, match="judge: must have"):
        trainer(tmp_path, opinion={"judge": 3})


def test_the_patch_can_be_taken_back(tmp_path):
    before = dict(vars(HOST.NashMDTrainer))
    trl_compat.patch_nash_md()
    trl_compat.patch_nash_md()
    assert HOST.NashMDTrainer._generate_completions is not before["_generate_completions"]
    trl_compat.unpatch_nash_md()
    assert dict(vars(HOST.NashMDTrainer)) == before
    with pytest.raises(TypeError, match="judge"):
        trainer(tmp_path)


def test_the_example_runs(tmp_path):
    script = [sys.executable, "examples/trl_patch_nash_md.py", "--output_dir", str(tmp_path)]
    env = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    run = {"cwd": ROOT, "env": env, "capture_output": True, "text": True}
    done = subprocess.run([*script, "--max_steps", "5"], check=True, **run)
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["step"] == 5
    assert 0 < report["rewards/probabilities"] < 1
    assert (tmp_path / "adapter_model.safetensors").exists()
