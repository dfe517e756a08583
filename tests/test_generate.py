"""``nlhf generate``: its responses, their log-probabilities, and that nlhf evaluate reads them."""

import json
import logging

import pytest
import torch

from nlhf import cli, data
from tests import tiny


def shares(prompts, first, second):
    """The answer with more words wins more often."""
    pairs = zip(first, second, strict=True)
    return [0.5 + 0.4 * (len(a) - len(b)) / (len(a) + len(b) + 1) for a, b in pairs]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two tiny models, LoRA adapters on the first, and prompts."""
    path = tmp_path_factory.mktemp("generate")
    for seed, name in enumerate(("one", "two")):
        tiny.llama(seed, torch.float32).save_pretrained(path / name)
        tiny.tokenizer().save_pretrained(path / name)
    adapted = tiny.with_lora(tiny.llama(0, torch.float32))
    adapted.peft_config["default"].base_model_name_or_path = str(path / "one")
    adapted.save_pretrained(path / "adapters")
    rows = [{"prompt": f"w{i} w{i + 1}" + " w9" * (i % 3)} for i in range(7)]
    (path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    pass


def run(*arguments) -> None:
    cli.main(["generate", "--device", "cpu", "--max-new-tokens", "5", *map(str, arguments)])


def read(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def logprobs(model, prompt: str, completion: str, finished: bool) -> torch.Tensor:
    """(T, V) of every token of the completion, from one forward pass; and its ids."""
    encode = tiny.tokenizer()
    head = encode(prompt)["input_ids"]
    tail = encode(completion)["input_ids"] + [2] * finished
    with torch.no_grad():
        logits = model(torch.tensor([head + tail])).logits[0, len(head) - 1 : -1]
    return logits, torch.tensor(tail)[:, None]


def test_what_is_written_are_responses_and_what_they_are_worth(folder, tmp_path, capsys):
    run("--model", folder / "one", "--ref", folder / "two", "--mixture-coef", 0.3, "--n-samples", 8,
        "--temperature", 0.8, "--prompts", folder / "prompts.jsonl", "--output",
        tmp_path / "out.jsonl")  # fmt: skip
    assert "give it to nlhf evaluate" in capsys.readouterr().out
    rows = read(tmp_path / "out.jsonl")
    prompts = data.read_prompts(folder / "prompts.jsonl")
    assert [row["prompt"] for row in rows] == [p for p in prompts for _ in range(8)]
    policy, ref = tiny.llama(0, torch.float32), tiny.llama(1, torch.float32)
    assert any(row["finished"] for row in rows) != all(row["finished"] for row in rows)
    checked = 0
    for row in rows:
        assert 1 <= row["tokens"] <= 5
        a, ids = logprobs(policy, row["prompt"], row["completion"], row["finished"])
        if len(ids) != row["tokens"]:
            # special tokens in a response are no text
            continue
        b, _ = logprobs(ref, row["prompt"], row["completion"], row["finished"])
        wanted = {
            "policy_logprob": a / 0.8,
            "ref_logprob": b / 0.8,
            "sampling_logprob": (0.7 * a + 0.3 * b) / 0.8,
        }
        for name, scores in wanted.items():
            total = scores.log_softmax(-1).gather(-1, ids).sum().item()
            assert row[name] == pytest.approx(total, abs=1e-4), name
        checked += 1
    assert checked > len(rows) / 2


def test_draws_depend_on_the_seed_and_not_on_the_batch(folder, tmp_path):
    base = ["--model", folder / "one", "--prompts", folder / "prompts.jsonl"]
    for name, more in {
        "a": ["--batch-size", 7],
        "b": ["--batch-size", 2],
        "c": ["--seed", 1],
        "d": ["--limit", 3],
        "e": ["--temperature", 0],
    }.items():
        run(*base, *more, "--output", tmp_path / f"{name}.jsonl")
    said = {n: [row["completion"] for row in read(tmp_path / f"{n}.jsonl")] for n in "abcde"}
    assert said["a"] == said["b"]
    assert said["a"] != said["c"]
    assert said["d"] == said["a"][:3]
    rows = read(tmp_path / "e.jsonl")
    assert all(row["sampling_logprob"] == 0 for row in rows)
    assert all("ref_logprob" not in row for row in rows)


def test_a_prompt_as_text_is_answered_on_stdout(folder, capsys):
    run("--model", folder / "one", "--prompt", "w1 w2", "--n-samples", 3)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["prompt"] for row in rows] == ["w1 w2"] * 3
    assert len({row["completion"] for row in rows}) > 1


def test_the_base_of_adapters_is_their_reference(folder, capsys):
    base = ["--model", folder / "adapters", "--prompt", "w1 w2"]
    run(*base, "--mixture-coef", 1, "--temperature", 0)
    mixed = json.loads(capsys.readouterr().out)
    run("--model", folder / "one", "--prompt", "w1 w2", "--temperature", 0)
    assert mixed["completion"] == json.loads(capsys.readouterr().out)["completion"]
    run(*base)
    row = json.loads(capsys.readouterr().out)
    assert row["ref_logprob"] != pytest.approx(row["policy_logprob"], abs=1e-3)


def test_nlhf_evaluate_reads_it(folder, tmp_path, capsys):
    prompts = ["--prompts", folder / "prompts.jsonl"]
    run("--model", folder / "one", *prompts, "--n-samples", 2, "--output", tmp_path / "mine")
    run("--model", folder / "two", *prompts, "--n-samples", 2, "--output", tmp_path / "two.jsonl")
    cli.main(["evaluate", str(tmp_path / "mine"), str(tmp_path / "two.jsonl"), "--preference",
              "tests.test_generate:shares", "--output", str(tmp_path / "evaluation")])  # fmt: skip
    found = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())
    assert found["names"] == ["mine", "two"]
    # both samples of every prompt
    assert found["prompts"] == 14


TEMPLATE = (
    "{% for m in messages %}w40 {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}w41{% endif %}"
)


@pytest.fixture(scope="module")
def chat(folder):
    """The first model with a chat template."""
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = TEMPLATE
    tiny.llama(0, torch.float32).save_pretrained(folder / "chat")
    tokenizer.save_pretrained(folder / "chat")
    return folder / "chat"


def test_chat_templates(chat, folder, tmp_path, capsys, caplog):
    base = ["--temperature", 0, "--n-samples", 1]
    messages = [{"role": "user", "content": "w1 w2"}]
    (tmp_path / "messages.jsonl").write_text(json.dumps({"prompt": messages}) + "\n")
    (tmp_path / "text.jsonl").write_text(json.dumps({"prompt": "w1 w2"}) + "\n")

    def said(*arguments) -> str:
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="nlhf"):
            run(*arguments, *base)
        return json.loads(capsys.readouterr().out)["completion"]

    note = "the tokenizer has a chat template"
    plain = said("--model", folder / "one", "--prompt", "w40 w1 w2 w41")
    assert note not in caplog.text
    # messages go through the template by themselves
    assert said("--model", chat, "--prompts", tmp_path / "messages.jsonl") == plain
    assert note not in caplog.text
    # a string does when it is said to, and else there is a note
    wrapped = said("--model", chat, "--prompts", tmp_path / "text.jsonl", "--apply-chat-template")
    assert wrapped == plain
    assert note not in caplog.text
    raw = said("--model", chat, "--prompts", tmp_path / "text.jsonl")
    assert raw == said("--model", folder / "one", "--prompt", "w1 w2")
    assert raw != plain
    said("--model", chat, "--prompts", tmp_path / "text.jsonl")
    assert caplog.text.count(note) == 1


def test_training_wraps_strings_too(chat, tmp_path, caplog):
    from nlhf import config, parts

    prompts = tmp_path / "p.jsonl"
    prompts.write_text(json.dumps({"prompt": "w1 w2"}) + "\n")
    values = {
        "model": str(chat),
        "prompts": str(prompts),
        "eval_prompts": str(prompts),
        "preference": "tests.test_generate:shares",
        "device": "cpu",
    }
    with caplog.at_level(logging.INFO, logger="nlhf"):
        plain = parts.build(config.from_dict(values, "test"))
        assert caplog.text.count("the tokenizer has a chat template") == 1
        wrapped = parts.build(config.from_dict(values | {"apply_chat_template": True}, "test"))
    assert caplog.text.count("the tokenizer has a chat template") == 1
    words = tiny.tokenizer().convert_tokens_to_ids
    assert plain.encode(plain.prompts)[0].tolist() == [words(["w1", "w2"])]
    for prompts in (wrapped.prompts, wrapped.eval_prompts):
        assert wrapped.encode(prompts)[0].tolist() == [words(["w40", "w1", "w2", "w41"])]
    # a preference sees no markup either way
    assert parts.plain(wrapped.prompts) == parts.plain(plain.prompts) == ["w1 w2"]


BAD = [
    ([], "--model must be given"),
    (["--model", "one"], "give either --prompt, a text, or --prompts"),
    (["--model", "one", "--prompt", "w1", "--prompts", "prompts.jsonl"], "give either --prompt"),
    (["--model", "./onn", "--prompt", "w1"], "do you mean one?"),
    (["--model", "prompts.jsonl", "--prompt", "w1"], "prompts.jsonl: no such file or folder"),
    (["--model", "empty", "--prompt", "w1"], "empty: holds no model"),
    (["--model", "one", "--prompts", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
    (["--model", "one", "--prompt", "w1", "--mixture-coef", "0.5"], "--ref must be given"),
    (["--model", "one", "--prompt", "w1", "--mixture-coef", "2"], "mixture_coef must be in [0, 1]"),
    (["--model", "one", "--prompt", "w1", "--top-p", "0"], "top_p must be in (0, 1]"),
    (["--model", "one", "--prompt", "w1", "--temperature", "-1"], "temperature must be at least 0"),
    (["--model", "one", "--prompt", "w1", "--n-samples", "0"], "n_samples must be at least 1"),
    (["--model", "one", "--prompt", "w1", "--device", "cuda:99"], "cuda:99"),
    (["--model", "one", "--prompt", "w1", "--output", "prompts.jsonl"], "prompts.jsonl exists"),
    (["--model", "one", "--prompt", "w1", "--output", "one"], "one is not empty"),
]


@pytest.mark.parametrize(("wrong", "message"), BAD, ids=[" ".join(w)[:60] for w, _ in BAD])
def test_bad_input_ends_in_one_line_and_status_2(folder, monkeypatch, capsys, wrong, message):
    (folder / "empty").mkdir(exist_ok=True)
    monkeypatch.chdir(folder)
    before = (folder / "prompts.jsonl").read_text()
    with pytest.raises(SystemExit) as stop:
        run(*wrong)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
    assert (folder / "prompts.jsonl").read_text() == before


def test_what_fails_leaves_nothing_behind(folder, tmp_path, capsys):
    base = ["--model", folder / "one", "--output", tmp_path / "new" / "out"]
    for more in (["--prompts", "nowhere.jsonl"], ["--prompt", "w1 " * 70]):
        with pytest.raises(SystemExit):
            run(*base, *more)
        assert not list(tmp_path.rglob("*.jsonl*"))
    capsys.readouterr()
    # and the folder can be used once the input is good
    run(*base, "--prompt", "w1")
    assert read(tmp_path / "new" / "out" / "completions.jsonl")
