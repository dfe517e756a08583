"""The loop end to end on a tiny model: it learns, resumes to the bit, saves what it reports."""

import itertools
import json
import shutil

import pytest
import torch

from nlhf import cli, config, evaluate, learner, memory, parts, train
from tests import tiny
from tests.test_decoding import Emulated

WORDS = [f"w{i}" for i in range(50)]


def prefer_even(prompts, first, second):
    """A judge for the tests: the answer with the larger share of even words wins more often."""

    def even(text):
        words = text.split()
        return sum(int(w[1:]) % 2 == 0 for w in words) / max(len(words), 1)

    shares = [(even(y), even(z)) for y, z in zip(first, second, strict=True)]
    return torch.tensor([8 * (a - b) for a, b in shares]).sigmoid()


def broken_judge(prompts, first, second):
    return torch.full((len(first),), 1.5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved tiny model with its tokenizer, and prompts."""
    path = tmp_path_factory.mktemp("tiny")
    model = tiny.llama(dtype=torch.float32)
    model.save_pretrained(path / "model")
    tiny.tokenizer().save_pretrained(path / "model")
    for name, start in (("train", 0), ("held_out", 30)):
        rows = [{"prompt": " ".join(WORDS[start + i : start + i + 3])} for i in range(12)]
        rows += [{"prompt": f"{a} {b}"} for a in WORDS[start:][:8] for b in WORDS[20:26]]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (path / f"{name}.jsonl").write_text(text)
    return path


def settings(folder, output, **changes) -> config.Config:
    values = {
        "model": str(folder / "model"),
        "prompts": str(folder / "train.jsonl"),
        "eval_prompts": str(folder / "held_out.jsonl"),
        "preference": "tests.test_train:prefer_even",
        "output": str(output),
        "max_new_tokens": 6,
        "steps": 6,
        "batch_size": 8,
        "learning_rate": 0.02,
        "warmup_steps": 1,
        "lora_r": 4,
        "lora_alpha": 8,
        "eval_every": 3,
        "checkpoint_every": 2,
        "device": "cpu",
    }
    return config.from_dict(values | changes, "test")


def metrics(output) -> list[dict]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    # what depends on the machine, and on what a judge was asked before
    timed = ("seconds_", "tokens_per_second", "judge_")
    return [{k: v for k, v in row.items() if not k.startswith(timed)} for row in rows]


def weights(output) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(output / "model" / "model.safetensors")


@pytest.mark.parametrize("lora_r", [4, 0])
def test_preference_rises_and_what_is_saved_loads(folder, tmp_path, lora_r):
    chosen = settings(
        folder,
        tmp_path / "run",
        steps=40,
        batch_size=64,
        tau=0.02,
        learning_rate=0.01,
        lora_r=lora_r,
        eval_every=0,
    )
    result = train.run(chosen)
    mean, half = result["win_judge"]
    assert mean - half > 0.55
    assert result["kl"][0] > 0.1

    from transformers import AutoModelForCausalLM

    loaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "run" / "model", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    before = tiny.llama(dtype=torch.float32).state_dict()
    assert any((loaded.state_dict()[k] != before[k]).any() for k in before)
    for name in ("report.md", "report.json", "curves.png", "config.yaml"):
        assert (tmp_path / "run" / name).stat().st_size > 0


@pytest.mark.parametrize("lora_r", [4, 0])
def test_resumed_equals_uninterrupted_to_the_bit(folder, tmp_path, lora_r, monkeypatch):
    whole = settings(folder, tmp_path / "whole", lora_r=lora_r)
    train.run(whole)

    class Killed(Exception):
        pass

    step = learner.Learner.step

    def dies(self, number):
        if number == 5:
            raise Killed
        return step(self, number)

    cut = settings(folder, tmp_path / "cut", lora_r=lora_r)
    with monkeypatch.context() as patch:
        patch.setattr(learner.Learner, "step", dies)
        with pytest.raises(Killed):
            train.run(cut)
    # killed in step 6 with the last checkpoint after step 4: step 5 is run again
    assert len(metrics(tmp_path / "cut")) == 5
    train.run(cut, resume=True)
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")
    a, b = weights(tmp_path / "cut"), weights(tmp_path / "whole")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("lora_r", [4, 0])
def test_checkpointing_changes_no_bit_of_a_run_and_may_start_in_its_middle(
    folder, tmp_path, lora_r, monkeypatch
):
    plain = settings(folder, tmp_path / "plain", lora_r=lora_r)
    train.run(plain)
    calls = counted(monkeypatch)
    lean = settings(folder, tmp_path / "lean", lora_r=lora_r, gradient_checkpointing=True)
    train.run(lean)
    assert calls == [True] * lean.steps
    # as somebody does whose run is out of memory
    shutil.copytree(tmp_path / "plain", tmp_path / "mixed")
    for made_later in ("checkpoints/step-000006", "model"):
        shutil.rmtree(tmp_path / "mixed" / made_later)
    mixed = settings(folder, tmp_path / "mixed", lora_r=lora_r, gradient_checkpointing=True)
    train.run(mixed, resume=True)
    assert len(calls) == lean.steps + 2
    wanted = weights(tmp_path / "plain")
    for name in ("lean", "mixed"):
        assert metrics(tmp_path / name) == metrics(tmp_path / "plain")
        found = weights(tmp_path / name)
        assert all(torch.equal(found[k], wanted[k]) for k in wanted)


def counted(monkeypatch) -> list[bool]:
    """Whether each update recomputes."""
    calls, inner = [], memory.recomputing

    def recomputing(model, enabled):
        calls.append(enabled)
        return inner(model, enabled)

    monkeypatch.setattr(memory, "recomputing", recomputing)
    return calls


def test_micro_batches_give_the_same_step(folder, tmp_path):
    norms = []
    for size in (0, 3):
        chosen = settings(folder, tmp_path / str(size), micro_batch_size=size, eval_prompts="")
        pieces = parts.build(chosen)
        norms.append(learner.Learner(pieces).step(0))
    for name in ("grad_norm", "kl", "entropy", "preference"):
        assert norms[0][name] == pytest.approx(norms[1][name], rel=1e-5)


def test_every_epoch_takes_each_prompt_once_and_no_id_twice():
    ids = [i for step in range(12) for i in learner.prompt_ids(3, step, 8, 24)]
    assert len(set(ids)) == len(ids)
    for epoch in range(4):
        taken = ids[24 * epoch : 24 * (epoch + 1)]
        assert sorted(i % 24 for i in taken) == list(range(24))
    assert ids[:24] != [i % 24 for i in ids[24:48]]


def test_learning_rate_rises_then_falls_to_a_tenth():
    rates = [learner.rate(step, 4, 20) for step in range(20)]
    assert rates[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert rates[4] == 1
    assert rates[-1] == pytest.approx(0.1)
    assert all(a > b for a, b in itertools.pairwise(rates[4:]))


def test_distinct_counts_by_hand():
    texts = ["a b a b", "a b c"]
    # bigrams: ab ba ab, ab bc
    assert evaluate.distinct(texts, 2) == pytest.approx(3 / 5)
    # trigrams: aba bab, abc
    assert evaluate.distinct(texts, 3) == 1
    mean, half = evaluate.estimate(torch.tensor([0.0, 1.0, 0.0, 1.0]))
    assert mean == 0.5
    assert half == pytest.approx(1.96 * (1 / 3) ** 0.5 / 2)


def test_perplexity_is_that_of_the_reference_at_temperature_one(folder, tmp_path):
    pieces = parts.build(settings(folder, tmp_path / "x", temperature=0.7, report_samples=4))
    ref = tiny.llama(dtype=torch.float32)
    import dataclasses

    pieces = dataclasses.replace(pieces, ref=ref)
    result = evaluate.report(pieces, tiny.llama(dtype=torch.float32))
    # the trained policy is the reference itself here
    assert result["kl"][0] == pytest.approx(0, abs=1e-5)
    draw = parts.seeds(pieces.config.seed, evaluate.REPORT, [0, 1, 2, 3], pieces.device)
    pair = pieces.generate_pair(pieces.eval_prompts[:4], draw, policy=ref, mixture_coef=1.0)
    total, count = 0.0, 0
    for row in range(4):
        prompt = pair.input_ids[row][pair.attention_mask[row] != 0]
        answer = pair.y.tokens[row][pair.y.mask[row]]
        with torch.no_grad():
            logits = ref(torch.cat([prompt, answer])[None]).logits[0, len(prompt) - 1 : -1]
        total -= logits.log_softmax(-1).gather(-1, answer[:, None]).sum().item()
        count += len(answer)
    perplexity = torch.tensor(total / count).exp().item()
    assert result["trained"]["perplexity"] == pytest.approx(perplexity, rel=1e-4)


# ---- bad input


def run_cli(capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", *arguments])
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines
    return lines[-1]


def flags(chosen: config.Config) -> list[str]:
    names = ("model", "prompts", "eval_prompts", "preference", "output", "steps", "lora_r")
    pairs = [("--" + n.replace("_", "-"), str(getattr(chosen, n))) for n in names]
    return [*(x for pair in pairs for x in pair), "--max-new-tokens", "4", "--batch-size", "4"]


BAD = [
    (["--mixture-coef", "1.5"], "mixture_coef must be in [0, 1], got 1.5"),
    (["--tau", "-1"], "tau must be at least 0"),
    (["--temperature", "nan"], "temperature must be above 0"),
    (["--kl", "exactly"], "kl must be one of"),
    (["--gradient-checkpointing=yes"], "gradient-checkpointing: ignored explicit argument 'yes'"),
    (["--steps", "many"], "--steps: invalid int value"),
    (["--tua", "1"], "unrecognized arguments"),
    (["--config", "nowhere.yaml"], "cannot read nowhere.yaml"),
    (["--model", "./nowhere"], "./nowhere"),
    (["--prompts", "nowhere.jsonl"], "nowhere.jsonl"),
    (["--preference", "./nowhere"], "preference nowhere: holds no preference model"),
    (["--preference", "tests.test_train:nobody"], "nobody"),
    (["--preference", "tests.test_train:broken_judge"], "1.5"),
    (["--device", "cuda:99"], "cuda:99"),
    (["--max-new-tokens", "99"], "context"),
    (["--lora-layers", "7"], "last_layers"),
]


@pytest.mark.parametrize(("wrong", "message"), BAD, ids=[" ".join(w) for w, _ in BAD])
def test_bad_input_ends_in_one_line_and_status_2(folder, tmp_path, capsys, wrong, message):
    line = run_cli(capsys, *flags(settings(folder, tmp_path / "run", steps=1)), *wrong)
    assert message in line
    assert not (tmp_path / "run" / "model").exists()


def test_bad_files_are_named(folder, tmp_path, capsys):
    base = flags(settings(folder, tmp_path / "run", steps=1))
    (tmp_path / "a.jsonl").write_text('{"question": "w1"}\n')
    assert "question" in run_cli(capsys, *base, "--prompts", str(tmp_path / "a.jsonl"))
    (tmp_path / "b.jsonl").write_text('{"prompt": ""}\n')
    assert "empty" in run_cli(capsys, *base, "--prompts", str(tmp_path / "b.jsonl"))
    (tmp_path / "c.yaml").write_text("tau: [1")
    assert "not YAML" in run_cli(capsys, *base, "--config", str(tmp_path / "c.yaml"))
    (tmp_path / "d.yaml").write_text("taux: 1")
    assert "do you mean tau?" in run_cli(capsys, *base, "--config", str(tmp_path / "d.yaml"))

    other = tmp_path / "other"
    tiny.llama(dtype=torch.float32, tie_word_embeddings=False).save_pretrained(other)
    for name, missing in (("pad", {"pad": False}), ("eos", {"eos": False})):
        tiny.tokenizer(**missing).save_pretrained(other)
        line = run_cli(capsys, *base, "--model", str(other))
        assert f"no {name} token" in line


def test_two_vocabularies_are_refused(folder, tmp_path, capsys):
    from transformers import LlamaConfig, LlamaForCausalLM

    small = LlamaConfig(
        vocab_size=40,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    LlamaForCausalLM(small).save_pretrained(tmp_path / "small")
    base = flags(settings(folder, tmp_path / "run", steps=1))
    line = run_cli(capsys, *base, "--ref", str(tmp_path / "small"))
    assert "53" in line
    assert "40" in line


def test_a_run_is_never_written_over(folder, tmp_path, capsys):
    chosen = settings(folder, tmp_path / "run", steps=2)
    train.run(chosen)
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    assert "already holds a run" in run_cli(capsys, *flags(chosen))
    line = run_cli(capsys, *flags(chosen), "--resume", "--tau", "0.3")
    assert "tau" in line or "max_new_tokens" in line
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "thesis.txt").write_text("years of work")
    assert "holds no run" in run_cli(capsys, *flags(settings(folder, tmp_path / "else")))
    assert before == {p: p.read_bytes() for p in before}


def test_a_run_that_failed_before_its_first_step_can_be_started_again(folder, tmp_path):
    wrong = settings(folder, tmp_path / "run", steps=1, preference="tests.test_train:broken_judge")
    with pytest.raises(ValueError, match=r"1\.5"):
        train.run(wrong)
    right = settings(folder, tmp_path / "run", steps=1, eval_prompts="")
    train.run(right)
    assert config.load(str(tmp_path / "run" / "config.yaml")) == right
    assert len(metrics(tmp_path / "run")) == 1


def test_a_config_of_the_user_is_not_written_over(folder, tmp_path):
    (tmp_path / "run").mkdir()
    mine = "# my notes\nsteps: 1\n"
    (tmp_path / "run" / "config.yaml").write_text(mine)
    with pytest.raises(ValueError, match="is not of a run"):
        train.run(settings(folder, tmp_path / "run", steps=1))
    assert (tmp_path / "run" / "config.yaml").read_text() == mine


def test_a_chat_template_brings_its_own_special_tokens(folder, tmp_path):
    pieces = parts.build(settings(folder, tmp_path / "x"))
    from tokenizers.processors import TemplateProcessing

    begin = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    pieces.tokenizer.backend_tokenizer.post_processor = begin
    ids, mask = pieces.encode(["w1 w2"])
    assert ids[mask != 0].tolist() == [1, 4, 5]
    pieces.tokenizer.chat_template = "{{ bos_token }} {{ messages[0].content }}"
    ids, mask = pieces.encode([[{"role": "user", "content": "w1 w2"}]])
    assert ids[mask != 0].tolist() == [1, 4, 5]
    assert pieces.end_tokens() == [2]


def test_config_round_trip_and_help(tmp_path):
    chosen = config.load("quickstart", {"seed": 7})
    config.save(chosen, tmp_path / "c.yaml")
    assert config.load(str(tmp_path / "c.yaml")) == chosen
    assert set(config.field_help()) == set(vars(chosen))
    for bad in (
        {"seed": 1.5},
        {"lora_r": True},
        {"gradient_checkpointing": 1},
        {"model": 3},
        {"tau": "much"},
    ):
        with pytest.raises(ValueError, match="must be a"):
            config.from_dict(bad, "test")


def test_rollouts_play_back_what_they_recorded_in_a_step_before(folder, tmp_path):
    chosen = settings(folder, tmp_path / "x", steps=4)
    plain, recorded = (learner.Learner(parts.build(chosen)) for _ in range(2))
    recorded.graphs = Emulated(bucket=16)
    for step in range(3):
        one, other = plain.step(step), recorded.step(step)
        assert one["length"] == other["length"]
        assert one["kl"] == pytest.approx(other["kl"], abs=1e-4)
    assert recorded.graphs.log.count("play") > recorded.graphs.log.count("record") > 0
    with pytest.raises(ValueError, match=r"cuda_graphs needs .* on CUDA, got them on cpu"):
        learner.Learner(parts.build(settings(folder, tmp_path / "x", cuda_graphs=True))).step(0)
