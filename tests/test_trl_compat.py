"""The Nash-MD trainer with TRL's interface: what it draws, its loss, and what a Trainer owes."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig

import nlhf_kernels as nk
from nlhf import losses, rollout, trl_compat
from nlhf.trl_compat import GeometricMixtureWrapper, NashMDConfig, NashMDTrainer, rewards
from tests import tiny

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parent.parent
CHAT = (
    "{% for m in messages %}{{ m.content }} {% endfor %}{% if add_generation_prompt %}w9{% endif %}"
)


def prefer_even(prompts, first, second):
    """P is larger for the text with more even words, and never 0 or 1."""

    def even(text):
        return sum(int(word[1:]) % 2 == 0 for word in text.split())

    return torch.tensor([even(a) - even(b) for a, b in zip(first, second, strict=True)]).sigmoid()


def prompts(count: int) -> list[dict]:
    return [{"prompt": f"w{i} w{i + 1} w{i + 2}"[: 3 + 3 * (i % 3)].strip()} for i in range(count)]


def settings(folder, **changes) -> NashMDConfig:
    values = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "max_new_tokens": 5,
        "max_steps": 2,
        "logging_steps": 1,
        "learning_rate": 0.01,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return NashMDConfig(**values | changes)


def trainer(folder, *, model=None, data=None, opinion=None, tokenizer=None, more=None, **changes):
    """A trainer of a tiny model; ``more`` goes to the constructor, ``changes`` to its settings."""
    rows = prompts(16) if data is None else data
    return NashMDTrainer(
        model=tiny.llama() if model is None else model,
        args=settings(folder, **changes),
        train_dataset=rows,
        eval_dataset=rows[:6],
        processing_class=tokenizer or tiny.tokenizer(),
        **(opinion or {"judge": prefer_even}),
        **(more or {}),
    )


def weights(found: NashMDTrainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in found.model.parameters()])


def classifier(seed: int = 0, words: int = tiny.V):
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(seed)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    config = LlamaConfig(vocab_size=words, num_attention_heads=2, num_labels=1, **sizes)
    return LlamaForSequenceClassification(config).eval()


def log_mixture(policy, ref, ids, mask, coef, temperature):
    """(B, L, V) the definition: both models over the whole prefix, in float64."""
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    with torch.no_grad():
        pi, mu = policy(**inputs).logits, ref(**inputs).logits
    return (((1 - coef) * pi + coef * mu) / temperature).log_softmax(-1)


# ---- what is drawn


def test_the_draws_are_of_the_policy_and_of_its_true_mixture_with_the_base(tmp_path, monkeypatch):
    base, policy = tiny.llama(), tiny.with_lora(tiny.llama())
    found = trainer(tmp_path, model=policy, mixture_coef=0.3, temperature=0.7)
    drawn = []
    original = rollout.generate_pair
    monkeypatch.setattr(
        rollout, "generate_pair", lambda *a, **k: drawn.append(original(*a, **k)) or drawn[-1]
    )
    found.compute_loss(found.model, {"prompt": [row["prompt"] for row in prompts(16)]})
    pair = drawn[0]
    for y, coef in ((pair.y, 0.0), (pair.y_other, 0.3)):
        ids = torch.cat([pair.input_ids, y.tokens], 1)
        mask = torch.cat([pair.attention_mask, y.mask.long()], 1)
        exact = log_mixture(policy, base, ids, mask, coef, 0.7)
        L = pair.input_ids.shape[1]
        exact = exact[:, L - 1 : -1].gather(-1, y.tokens[..., None])[..., 0]
        torch.testing.assert_close(y.sampling_logprobs[y.mask], exact[y.mask], rtol=0, atol=1e-9)
    # on the tokens of y' the mixture is something else than the policy
    apart = pair.y_other.sampling_logprobs - pair.y_other.policy_logprobs
    assert apart.abs().max() > 0.05


def test_a_reference_of_its_own_is_mixed_in_and_a_copy_is_made_without_one(tmp_path):
    own, policy = tiny.llama(seed=1), tiny.llama()
    found = trainer(tmp_path, model=policy, more={"ref_model": own})
    assert found.ref_model is own
    found = trainer(tmp_path, model=policy)
    assert found.ref_model is not policy
    assert not any(p.requires_grad for p in found.ref_model.parameters())
    before = found.ref_model.lm_head.weight.clone()
    found.train()
    assert torch.equal(found.ref_model.lm_head.weight, before)
    assert not torch.equal(found.model.lm_head.weight, before)


def test_the_draws_follow_the_place_in_the_step_and_not_the_batch(tmp_path):
    found = trainer(tmp_path)
    texts = [row["prompt"] for row in prompts(4)]

    def drawn(batches):
        found._micro = 0
        rows = []
        for batch in batches:
            x = found._encode({"prompt": batch})
            outputs = found._generate_completions(found.model, x)
            y, _ = found._process_completions(*outputs, x)
            kept = zip(y["input_ids"], y["attention_mask"], strict=True)
            rows += [ids[mask != 0].tolist() for ids, mask in kept]
        return rows

    whole = drawn([texts])
    found._train_batch_size = 2
    assert drawn([texts[:2], texts[2:]]) == whole
    found.state.global_step = 1
    assert drawn([texts[:2], texts[2:]]) != whole


# ---- the loss


@pytest.mark.parametrize("kl", ["reward_to_go", "sequence", "token"])
def test_the_loss_and_its_gradient_are_those_of_the_op(tmp_path, kl):
    found = trainer(tmp_path, kl=kl, beta=0.2)
    generator = torch.Generator().manual_seed(0)
    logits, ref = (torch.randn(3, 4, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    logits.requires_grad_()
    tokens = torch.randint(7, (3, 4), generator=generator)
    mask = torch.arange(4) < torch.tensor([4, 1, 3])[:, None]
    p = torch.rand(3, generator=generator)
    logprobs = nk.token_logprobs(logits, tokens, mask=mask).logprobs
    ref_logprobs = nk.token_logprobs(ref, tokens, mask=mask).logprobs
    loss, score, ratio = found._compute_losses(logprobs, ref_logprobs, p)
    op = nk.pairwise_pg_loss(logits, tokens, mask, p, tau=0.2, ref_logprobs=ref_logprobs, kl=kl)
    torch.testing.assert_close(loss, op.loss)
    got = torch.autograd.grad(loss, logits, retain_graph=True)
    torch.testing.assert_close(got, torch.autograd.grad(op.loss, logits))
    torch.testing.assert_close(score, (p - 0.5) * logprobs.sum(1))
    torch.testing.assert_close(ratio, op.kl.sum(1))


@pytest.mark.parametrize("kl", ["reward_to_go", "token"])
@pytest.mark.parametrize("lora", [False, True])
def test_a_step_is_that_of_the_library_and_token_that_of_trl(tmp_path, monkeypatch, kl, lora):
    policy = tiny.with_lora(tiny.llama()) if lora else tiny.llama()
    ref = None if lora else tiny.llama(seed=1)
    found = trainer(
        tmp_path, model=policy, more={"ref_model": ref}, kl=kl, temperature=0.7, beta=0.3
    )
    drawn = []
    original = rollout.generate_pair
    monkeypatch.setattr(
        rollout, "generate_pair", lambda *a, **k: drawn.append(original(*a, **k)) or drawn[-1]
    )
    texts = [row["prompt"] for row in prompts(4)]
    trained = [p for p in policy.parameters() if p.requires_grad]
    got = torch.autograd.grad(found.compute_loss(policy, {"prompt": texts}), trained)
    pair = drawn[0]
    decoded = [
        tiny.tokenizer().batch_decode(
            [t[m].tolist() for t, m in zip(y.tokens, y.mask, strict=True)], skip_special_tokens=True
        )
        for y in (pair.y, pair.y_other)
    ]
    p = prefer_even(texts, *decoded)
    if kl == "reward_to_go":
        result = losses.nash_md_pg(policy, ref, pair, p, tau=0.3, temperature=0.7)
        want = torch.autograd.grad(result.loss, trained)
    else:
        # TRL's: at temperature 1, and each token pays for its own log-ratio alone
        logps = losses.response_logits(policy, pair, pair.y).log_softmax(-1)
        refs = losses.ref_logits(policy, ref, pair, pair.y).log_softmax(-1)
        y, m = pair.y.tokens[..., None], pair.y.mask
        logps, refs = (x.gather(-1, y)[..., 0].masked_fill(~m, 0) for x in (logps, refs))
        kl_loss = ((logps - refs).detach() * logps).sum(1)
        loss = (0.3 * kl_loss - (p - 0.5) * logps.sum(1)).mean()
        want = torch.autograd.grad(loss, trained)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("count", [8, 7])
def test_micro_batches_add_up_to_the_batch(tmp_path, count):
    """Seven prompts: the last micro-batch is smaller, and each prompt still counts the same."""
    ends = []
    for size, steps in ((8, 1), (2, 4)):
        found = trainer(
            tmp_path,
            data=prompts(count),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            max_steps=2,
            # Adam would divide what rounding leaves by its own size
            optim="sgd",
            learning_rate=0.3,
        )
        found.train()
        ends.append((weights(found), [row.get("loss") for row in found.state.log_history]))
    torch.testing.assert_close(ends[0][0], ends[1][0], rtol=0, atol=1e-12)
    assert ends[0][1][0] == pytest.approx(ends[1][1][0], abs=1e-6)


def test_training_raises_the_preference(tmp_path):
    found = trainer(
        tmp_path,
        model=tiny.llama(dtype=torch.float32),
        per_device_train_batch_size=16,
        max_steps=20,
        learning_rate=0.02,
        lr_scheduler_type="constant",
        beta=0.01,
        # y' comes from the reference, so P says how far the policy has come
        mixture_coef=1.0,
    )
    found.train()
    won = [row["rewards/probabilities"] for row in found.state.log_history[:-1]]
    assert sum(won[-3:]) / 3 > sum(won[:3]) / 3 + 0.15


# ---- what a Trainer owes


def test_the_metrics_are_trls_by_name_and_right(tmp_path):
    found = trainer(tmp_path, opinion={"reward_funcs": classifier()}, max_steps=1, beta=0.3)
    found.train()
    row = found.state.log_history[0]
    names = "loss/kl objective/entropy loss/score rewards/probabilities rewards/accuracies"
    names += " rewards/margins logps/chosen logps/rejected val/model_contain_eos_token"
    names += " val/ref_contain_eos_token rewards/chosen rewards/rejected beta mixture_coef"
    names += " loss grad_norm learning_rate"
    assert set(names.split()) <= set(row)
    assert (row["beta"], row["mixture_coef"]) == (0.3, 0.5)
    assert row["objective/entropy"] == -row["logps/chosen"] > 0
    assert row["loss/kl"] == pytest.approx(row["logps/chosen"] - row["logps/rejected"], abs=1e-6)
    # before the first update the policy is the reference, and nothing but the score is left
    assert row["loss"] == pytest.approx(-row["loss/score"], abs=1e-5)


def test_evaluate_reports_the_loss_and_how_often_the_policy_wins(tmp_path):
    seen = []

    def count(prediction):
        tokens, others = prediction.predictions
        assert len(tokens) == len(others) == len(prediction.label_ids)
        assert ((tokens == -100) | (tokens >= 0)).all()
        seen.append(prediction.label_ids)
        return {"share": float((prediction.label_ids > 0.5).mean())}

    found = trainer(tmp_path, more={"compute_metrics": count})
    first, again = found.evaluate(), found.evaluate()
    assert first["eval_loss"] == again["eval_loss"]
    assert first["eval_rewards/probabilities"] == pytest.approx(seen[0].mean(), abs=1e-6)
    assert len(seen[0]) == 6
    assert 0 <= first["eval_share"] <= 1
    # it leaves no trace in the next step, nor in its metrics
    assert not found.stats
    found.train()
    plain = trainer(tmp_path, eval_strategy="steps", eval_steps=1)
    plain.train()
    assert torch.equal(weights(found), weights(plain))
    assert "eval_rewards/probabilities" in plain.state.log_history[1]


def test_one_value_an_epoch(tmp_path):
    found = trainer(
        tmp_path,
        data=prompts(8),
        mixture_coef=[0.1, 0.9],
        beta=[0.5, 0.2, 0.1],
        max_steps=-1,
        num_train_epochs=3,
    )
    found.train()
    rows = found.state.log_history[:-1]
    assert [row["mixture_coef"] for row in rows] == [0.1, 0.1, 0.9, 0.9, 0.9, 0.9]
    assert [row["beta"] for row in rows] == [0.5, 0.5, 0.2, 0.2, 0.1, 0.1]


@pytest.mark.parametrize("lora", [False, True])
def test_a_run_that_is_resumed_ends_where_it_would_have(tmp_path, lora):
    from peft import LoraConfig

    def run(name, steps, resume=None):
        adapters = LoraConfig(r=2, task_type="CAUSAL_LM") if lora else None
        found = trainer(
            tmp_path / name,
            model=tiny.llama(dtype=torch.float32),
            more={"peft_config": adapters},
            max_steps=steps,
            lr_scheduler_type="constant",
            save_strategy="steps",
            save_steps=2,
        )
        found.train(resume_from_checkpoint=resume)
        return weights(found)

    whole = run("whole", 4)
    run("half", 2)
    assert torch.equal(run("half", 4, str(tmp_path / "half" / "checkpoint-2")), whole)
    card = (tmp_path / "half" / "README.md").read_text()
    assert "nash-md" in card
    assert "munos2024nash" in card


def test_what_is_saved_loads(tmp_path):
    from transformers import AutoModelForCausalLM

    found = trainer(tmp_path, max_steps=1)
    found.train()
    found.save_model(str(tmp_path / "saved"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float64)
    for name, x in loaded.state_dict().items():
        assert torch.equal(x, found.model.state_dict()[name]), name
    assert (tmp_path / "saved" / "tokenizer.json").exists()


@pytest.mark.parametrize("lora", [False, True])
def test_mixed_precision_with_checkpointing_as_trl_has_it_by_default(tmp_path, lora):
    from peft import LoraConfig

    # wide enough for the linear layers that decoding replaces
    wide = {"hidden_size": 256, "intermediate_size": 512}
    found = NashMDTrainer(
        model=tiny.llama(dtype=torch.float32, **wide),
        args=NashMDConfig(
            output_dir=str(tmp_path),
            use_cpu=True,
            max_new_tokens=4,
            max_steps=1,
            logging_steps=1,
            per_device_train_batch_size=4,
            learning_rate=0.01,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=prompts(4),
        processing_class=tiny.tokenizer(),
        judge=prefer_even,
        peft_config=LoraConfig(r=2, task_type="CAUSAL_LM") if lora else None,
    )
    assert found.args.bf16
    assert found.args.gradient_checkpointing
    before = weights(found)
    found.train()
    assert not torch.equal(weights(found), before)
    row = found.state.log_history[0]
    # the rollout and the loss see one policy, up to the rounding of bfloat16
    assert abs(row["loss/kl"]) < 0.3


def test_a_stream_of_data(tmp_path):
    from datasets import Dataset

    found = trainer(tmp_path, data=prompts(8))
    stream = Dataset.from_list(prompts(8)).to_iterable_dataset()
    streamed = NashMDTrainer(
        tiny.llama(),
        None,
        None,
        settings(tmp_path),
        train_dataset=stream,
        processing_class=tiny.tokenizer(),
        judge=prefer_even,
    )
    found.train()
    streamed.train()
    assert len(streamed.state.log_history) == len(found.state.log_history)


# ---- prompts


def test_a_prompt_gets_the_bos_token_or_the_chat_template_and_loses_its_beginning(tmp_path):
    words = tiny.tokenizer()
    words.chat_template = CHAT
    found = trainer(tmp_path, tokenizer=words, max_length=9, max_new_tokens=5)
    chat = [{"role": "user", "content": "w1 w2"}]
    x = found._encode({"prompt": ["w1 w2", "w1 w2 w3 w4 w5 w6"]})
    assert x["input_ids"].tolist() == [[0, 1, 4, 5], [6, 7, 8, 9]]
    assert x["attention_mask"].tolist() == [[0, 1, 1, 1], [1, 1, 1, 1]]
    assert found._encode({"prompt": [chat]})["input_ids"].tolist() == [[1, 4, 5, 12]]
    kwargs = {"chat_template_kwargs": [{"add_generation_prompt": False}]}
    with pytest.raises(TypeError, match="add_generation_prompt"):
        found._encode({"prompt": [chat], **kwargs})
    words.chat_template = CHAT.replace("add_generation_prompt", "extra")
    x = found._encode({"prompt": [chat], "chat_template_kwargs": [{"extra": True}]})
    assert x["input_ids"].tolist() == [[1, 4, 5, 12]]
    assert found._encode({"prompt": [chat]})["input_ids"].tolist() == [[1, 4, 5]]
    words.chat_template = CHAT
    trainer(tmp_path, data=[{"prompt": chat}] * 8, tokenizer=words, max_steps=1).train()


def test_no_room_for_a_prompt_is_said(tmp_path):
    with pytest.warns(UserWarning, match="leaves no room"):
        args = settings(tmp_path, max_length=5)
    found = trainer(tmp_path)
    found.args = args
    assert found._encode({"prompt": ["w1 w2 w3"]})["input_ids"].shape == (1, 4)


# ---- who prefers


def test_judges_of_three_kinds(tmp_path):
    asked = []

    class Ranks:
        def judge(self, prompts, completions, shuffle_order=False):
            asked.append((prompts, completions, shuffle_order))
            return [0, 1, -1]

    class Scores:
        def judge(self, prompts, completions, return_scores=False):
            assert return_scores
            return [1.0, 0.25, 0.0]

    texts = (["p", "q", "r"], ["a", "b", "c"], ["d", "e", "f"])
    assert rewards.as_preference(Ranks())(*texts).tolist() == [1, 0, 0.5]
    assert asked == [(texts[0], [["a", "d"], ["b", "e"], ["c", "f"]], True)]
    assert rewards.as_preference(Scores())(*texts).tolist() == [1, 0.25, 0]
    found = rewards.as_preference(lambda p, a, b: torch.full((3,), 0.25))
    assert found(*texts).tolist() == [0.25] * 3
    for wrong in ([0, 2, 1], [0.5, 0.5], [1.5, 0.5, 0.5], [float("nan")] * 3, [None] * 3):
        judge = types.SimpleNamespace(judge=lambda p, c, wrong=wrong: wrong)
        with pytest.raises(ValueError, match="judge: "):
            rewards.as_preference(judge)(*texts)
    with pytest.raises(ValueError, match="judge: must have"):
        rewards.as_preference("pair-rm")


def test_a_judge_need_not_be_transitive(tmp_path):
    """P itself is used, which no difference of two rewards could be."""

    def beats(prompts, first, second):
        return torch.tensor([0.9, 0.2, 0.5, 1.0])

    found = trainer(tmp_path, opinion={"preference": beats}, max_steps=1)
    found.train()
    row = found.state.log_history[0]
    assert row["rewards/probabilities"] == pytest.approx(0.65, abs=1e-6)
    assert "rewards/chosen" not in row


def scored(found, responses, prompt="w1 w2"):
    """The rewards that the trainer gives these responses, lists of ids."""
    x = found._encode({"prompt": [prompt] * len(responses)})
    L, T = x["input_ids"].shape[1], max(map(len, responses))
    rows = torch.tensor([[*ids, *[0] * (T - len(ids))] for ids in responses])
    output = torch.cat([x["input_ids"], rows], 1)
    y, y_other = found._process_completions(output, output, x)
    return found._compute_rewards(y, y_other, L)[0]


def test_a_reward_model_reads_the_prompt_and_the_whole_response(tmp_path):
    model = classifier()
    found = trainer(tmp_path, opinion={"reward_funcs": [model]}, reward_weights=[2.0])
    got = scored(found, [[7, 2], [8, 9, 10]])
    for score, ids in zip(got, ([1, 4, 5, 7, 2], [1, 4, 5, 8, 9, 10]), strict=True):
        want = model(input_ids=torch.tensor([ids])).logits[0, 0]
        torch.testing.assert_close(score, 2 * want, rtol=1e-5, atol=1e-6)


def test_the_end_is_looked_for_in_the_response_alone(tmp_path):
    base = trainer(tmp_path, opinion={"reward_funcs": classifier()})
    fined = trainer(tmp_path, opinion={"reward_funcs": classifier()}, missing_eos_penalty=3.0)
    # an end of sequence in the prompt, as a chat template writes it
    responses, prompt = [[7, 2], [8, 9]], "w1 </s> w2"
    apart = scored(base, responses, prompt) - scored(fined, responses, prompt)
    torch.testing.assert_close(apart, torch.tensor([0.0, 3.0]))


def test_a_reward_model_with_another_tokenizer(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {w: i for i, w in enumerate(["[PAD]", "[UNK]", "w1", "w2", "w4", "w5"])}
    inner = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    other = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", chat_template=CHAT + "w5"
    )
    model = classifier(words=6)
    with pytest.raises(ValueError, match="reward_processing_classes"):
        trainer(tmp_path, opinion={"reward_funcs": model})
    more = {"reward_processing_classes": [other]}
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = CHAT
    chosen = {"opinion": {"reward_funcs": model}, "more": more, "tokenizer": tokenizer}
    found = trainer(tmp_path, **chosen)
    for prompt, ids in (("w1 w2 ", [2, 3, 4]), ([{"role": "user", "content": "w1"}], [2, 4, 5])):
        # 7 is w4 here, and 2 the end
        want = model(input_ids=torch.tensor([ids])).logits[0, 0]
        got = scored(found, [[7, 2]], prompt)[0]
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    found.train()


def test_a_reward_function_gets_the_columns(tmp_path):
    seen = []

    def longest(prompts, completions, completion_ids, answer, **_):
        seen.append((prompts, completions, completion_ids, answer))
        return [float(len(ids)) for ids in completion_ids]

    data = [{"prompt": f"w{i}", "answer": i} for i in range(4)]
    found = trainer(
        tmp_path,
        data=data,
        opinion={"reward_model": longest},
        max_steps=1,
        per_device_train_batch_size=2,
    )
    found.train()
    assert len(seen) == 2
    said, texts, ids, answers = seen[0]
    assert said == [f"w{i}" for i in answers]
    assert [len(text.split()) for text in texts] == [sum(i != 2 for i in row) for row in ids]
    row = found.state.log_history[0]
    mean = sum(len(i) for i in ids) / 2
    assert row["rewards/chosen"] == pytest.approx(mean)
    with pytest.raises(ValueError, match="2 finite numbers"):
        rewards.call_reward(lambda **_: [1.0], ["a", "b"], ["c", "d"], [[1], [2]])


# ---- what is refused


BAD = [
    ({"use_vllm": True}, "use_vllm"),
    ({"repetition_penalty": 1.2}, "repetition_penalty"),
    ({"loss_type": "ipo"}, "loss_type"),
    ({"cache_implementation": "static"}, "cache_implementation"),
    ({"mixture_coef": 1.5}, r"mixture_coef must be in \[0, 1\], got 1.5"),
    ({"mixture_coef": []}, "mixture_coef must be a number"),
    ({"beta": [0.1, -1.0]}, "beta must be at least 0"),
    ({"temperature": 0.0}, "temperature must be above 0"),
    ({"missing_eos_penalty": -1.0}, "missing_eos_penalty"),
    ({"kl": "exact"}, "kl must be one of"),
    ({"max_new_tokens": 0}, "max_new_tokens"),
]


@pytest.mark.parametrize(("wrong", "message"), BAD, ids=[next(iter(w)) for w, _ in BAD])
def test_a_setting_that_is_not_served_is_named(tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        settings(tmp_path, **wrong)


def test_wrong_arguments_are_named(tmp_path):
    model, data, words = tiny.llama(), prompts(4), tiny.tokenizer()
    right = {"model": model, "args": settings(tmp_path), "train_dataset": data}
    right |= {"processing_class": words, "judge": prefer_even}
    cases = [
        ({"args": None}, "args must be given"),
        ({"judge": None}, "one reward function"),
        ({"reward_funcs": classifier()}, "one reward function"),
        ({"judge": None, "reward_funcs": [len, len]}, "one reward function"),
        ({"judge": None, "reward_funcs": 3}, "must be a model"),
        ({"ref_model": model}, "a model of its own"),
        ({"ref_model": tiny.llama(vocab_size=40)}, "one vocabulary"),
        ({"args": settings(tmp_path, missing_eos_penalty=1.0)}, "missing_eos_penalty"),
        ({"args": settings(tmp_path, generation_kwargs={"num_beams": 4})}, "num_beams = 4"),
        ({"args": settings(tmp_path, model_init_kwargs={"revision": "x"})}, "model_init_kwargs"),
        ({"processing_class": tiny.tokenizer(eos=False)}, "no eos token"),
    ]
    for wrong, message in cases:
        with pytest.raises(ValueError, match=message):
            NashMDTrainer(**right | wrong)
    found = NashMDTrainer(**right | {"train_dataset": [{"question": "w1"}] * 4})
    with pytest.raises(ValueError, match="column prompt, got question"):
        found.train()


# ---- the wrapper


def wrapper(lora: bool, **generation):
    model = tiny.with_lora(tiny.llama()) if lora else tiny.llama()
    # what TRL's trainer hands over, adapters inside
    ref = model.get_base_model() if lora else tiny.llama(seed=1)
    config = GenerationConfig(**{"do_sample": True, "top_k": 0, "pad_token_id": 0} | generation)
    base = tiny.llama() if lora else ref
    return GeometricMixtureWrapper(model, ref, config, mixture_coef=0.3), base


@pytest.mark.parametrize("lora", [False, True])
def test_the_wrapper_returns_the_log_softmax_of_the_mixture(lora):
    mixture, base = wrapper(lora)
    ids, mask = tiny.prompts([3, 5])
    want = log_mixture(mixture.model, base, ids, mask, 0.3, 1.0)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    got = mixture(ids, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(got[mask != 0], want[mask != 0], rtol=0, atol=1e-12)
    assert mixture.config is mixture.model.config
    assert mixture.device == torch.device("cpu")
    assert mixture.dtype == torch.float64
    inputs = mixture.prepare_inputs_for_generation(ids, attention_mask=mask, use_cache=True)
    assert {"input_ids", "attention_mask"} <= set(inputs)
    assert not inputs["use_cache"]
    with pytest.raises(ValueError, match="two models"):
        mixture(ids, past_key_values=mixture)
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        mixture.nothing_of_the_kind()


def test_the_wrapper_generates_from_the_mixture():
    mixture, base = wrapper(True, max_new_tokens=1, eos_token_id=2, num_return_sequences=4000)
    ids, mask = tiny.prompts([3])
    torch.manual_seed(0)
    drawn = mixture.generate(input_ids=ids, attention_mask=mask)
    assert drawn.shape == (4000, 4)
    assert (drawn[:, :3] == ids).all()
    want = log_mixture(mixture.model, base, ids, mask, 0.3, 1.0)[0, -1].exp()
    got = torch.bincount(drawn[:, 3], minlength=tiny.V) / 4000
    policy = mixture.model(ids).logits[0, -1].softmax(-1)
    # the mean distance of 4,000 draws is about 0.09
    assert (got - want).abs().sum() < 0.15
    assert (policy - want).abs().sum() > 0.3


def test_the_wrapper_follows_torchs_generator_its_configuration_and_arguments():
    mixture, base = wrapper(False, max_new_tokens=6, eos_token_id=2)
    ids, mask = tiny.prompts([3, 5])
    torch.manual_seed(5)
    first, second = mixture.generate(ids), mixture.generate(ids)
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    assert torch.equal(mixture.generate(ids, mask), first)
    # the most probable token of each prefix
    greedy = mixture.generate(ids, mask, do_sample=False, max_new_tokens=2)
    assert greedy.shape == (2, 7)
    exact = log_mixture(mixture.model, base, ids, mask, 0.3, 1.0)[:, -1].argmax(-1)
    assert torch.equal(greedy[:, 5], exact)
    other = GenerationConfig(max_new_tokens=1, do_sample=True)
    assert mixture.generate(ids, mask, generation_config=other).shape == (2, 6)
    assert torch.equal(mixture.generate(ids, mask, seed=3), mixture.generate(ids, mask, seed=3))
    for wrong in ({"num_beams": 2}, {"stop_strings": ["x"]}, {"return_dict_in_generate": True}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            mixture.generate(ids, mask, **wrong)
    with pytest.raises(ValueError, match="no argument 'temprature'"):
        mixture.generate(ids, mask, temprature=1.0)


# ---- the patch without its host, and the examples


def fake_trl(monkeypatch, version):
    host = types.ModuleType("trl.experimental.nash_md")

    class Trainer:
        def __init__(self, reward_funcs=None):
            self.reward_funcs = reward_funcs

        def _generate_completions(self): ...
        def _compute_rewards(self): ...
        def _compute_logprobs(self): ...

        mixture_coef = property(lambda self: None)

    host.NashMDTrainer = Trainer
    top = types.ModuleType("trl")
    top.__version__ = version
    for name, module in (("trl", top), (host.__name__, host)):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "trl.experimental", types.ModuleType("trl.experimental"))
    return Trainer


def test_the_patch_says_which_trl_it_knows(monkeypatch):
    cls = fake_trl(monkeypatch, "1.14.0")
    before = dict(vars(cls))
    with pytest.warns(UserWarning, match=r"tested with TRL 1\.9\.0 to 1\.13\.0, and this is 1\.14"):
        trl_compat.patch_nash_md()
    assert "beta" in vars(cls)
    trl_compat.patch_nash_md()
    trl_compat.unpatch_nash_md()
    trl_compat.unpatch_nash_md()
    assert {k: v for k, v in vars(cls).items() if k != "__doc__"} == {
        k: v for k, v in before.items() if k != "__doc__"
    }
    for name in ("trl", "trl.experimental.nash_md"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"1\.9\.0 to 1\.13\.0.*nlhf\.trl_compat\.NashMDTrainer"):
        trl_compat.patch_nash_md()


@pytest.fixture
def without_trl(tmp_path) -> dict[str, str]:
    """The environment of a process for which TRL cannot be imported."""
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "trl.py").write_text("raise ImportError('no TRL here')\n")
    return os.environ | {"PYTHONPATH": f"{tmp_path / 'hidden'}{os.pathsep}{ROOT}"}


def test_the_example_of_a_script_with_one_import_changed(tmp_path, without_trl):
    script = [sys.executable, "examples/trl_nash_md.py", "--output_dir", str(tmp_path)]
    run = {"cwd": ROOT, "env": without_trl, "capture_output": True, "text": True}
    done = subprocess.run(script, check=True, **run)
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["eval_rewards/probabilities"] > 0
    assert (tmp_path / "model.safetensors").exists()


def test_the_example_of_the_patch_needs_trl_and_says_so(tmp_path, without_trl):
    script = [sys.executable, "examples/trl_patch_nash_md.py", "--output_dir", str(tmp_path)]
    run = {"cwd": ROOT, "env": without_trl, "capture_output": True, "text": True}
    done = subprocess.run(script, check=False, **run)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert "TRL 1.9.0 to 1.13.0" in done.stderr
