"""The Nash-MD trainer with TRL's interface: what a Trainer owes, and what it refuses."""

from pathlib import Path

import pytest
import torch
from transformers import TrainingArguments

from nlhf.trl_compat import NashMDConfig, NashMDTrainer
from tests import tiny, trl_ranks
from tests.test_distributed import launch
from tests.trl_tiny import classifier, prefer_even, prompts, settings, trainer, weights

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parent.parent


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


def test_models_may_be_given_by_name(tmp_path):
    names = {"policy": tiny.llama(), "ref": tiny.llama(seed=1), "reward": classifier()}
    for name, model in names.items():
        model.save_pretrained(tmp_path / name)
        tiny.tokenizer().save_pretrained(tmp_path / name)
    found = NashMDTrainer(
        str(tmp_path / "policy"),
        str(tmp_path / "ref"),
        args=settings(
            tmp_path / "run",
            reward_model_path=str(tmp_path / "reward"),
            model_init_kwargs={"dtype": "float32"},
        ),
        train_dataset=prompts(8),
        tokenizer=tiny.tokenizer(),
    )
    assert found.model.dtype == torch.float32
    assert torch.equal(found.ref_model.lm_head.weight, names["ref"].lm_head.weight.float())
    found.train()
    assert "rewards/chosen" in found.state.log_history[0]


def test_the_configuration_is_a_command_line(tmp_path):
    from transformers import HfArgumentParser

    line = f"--output_dir {tmp_path} --mixture_coef 0.1 0.2 --beta 0.3 --kl token --use_cpu"
    (args,) = HfArgumentParser(NashMDConfig).parse_args_into_dataclasses(line.split())
    assert (args.mixture_coef, args.beta, args.kl) == ([0.1, 0.2], 0.3, "token")
    assert (args.learning_rate, args.temperature, args.bf16) == (5e-7, 0.9, True)
    assert "geometric mixture" in HfArgumentParser(NashMDConfig).format_help()


def test_what_is_saved_loads(tmp_path):
    from transformers import AutoModelForCausalLM

    found = trainer(tmp_path, max_steps=1)
    found.train()
    found.save_model(str(tmp_path / "saved"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float64)
    for name, x in loaded.state_dict().items():
        assert torch.equal(x, found.model.state_dict()[name]), name
    assert (tmp_path / "saved" / "tokenizer.json").exists()


def test_two_processes_do_what_one_does(tmp_path):
    launch(2, "tests/trl_ranks.py", str(tmp_path))
    together, won = torch.load(tmp_path / "result.pt")
    alone, won_alone = trl_ranks.run(tmp_path / "alone", 4)
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)
    assert won == pytest.approx(won_alone, abs=1e-6)


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
        ({"args": TrainingArguments(str(tmp_path), use_cpu=True)}, "must be a NashMDConfig"),
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
