"""Recipes on invented rows of their data sets' schemas: read, built, and run with tiny models."""

import dataclasses
import json

import datasets
import pytest
import torch

from nlhf import cli, config, data, preference
from nlhf.commands import preference as command
from nlhf.config import Config, FitConfig
from tests import tiny

STRING = datasets.Value("string")
MESSAGES = datasets.List({"content": STRING, "role": STRING})
SCORE = datasets.Value("float64")


def said(*texts: str) -> list[dict]:
    roles = ("user", "assistant")
    return [{"content": text, "role": roles[i % 2]} for i, text in enumerate(texts)]


def reply(text: str) -> list[dict]:
    return [{"content": text, "role": "assistant"}]


POST = "SUBREDDIT: r/cats\n\nTITLE: w{0} w3\n\nPOST: w{0} w5 w6 {{braces}}\n\nTL;DR:"

# the features of each data set of the hub that a recipe names, its splits, and a row by number
HUB = {
    "trl-lib/tldr": (
        {"prompt": STRING, "completion": STRING},
        ("train", "validation", "test"),
        lambda i: {"prompt": POST.format(i), "completion": f" w{i} w9"},
    ),
    "trl-lib/tldr-preference": (
        {"prompt": STRING, "chosen": STRING, "rejected": STRING},
        ("train", "validation"),
        lambda i: {"prompt": POST.format(i), "chosen": f" w{i} w4", "rejected": " w7 w8 w9"},
    ),
    "trl-lib/hh-rlhf-helpful-base": (
        {"prompt": MESSAGES, "chosen": MESSAGES, "rejected": MESSAGES},
        ("train", "test"),
        lambda i: {
            "prompt": said(f"w{i} w2", "w3 w4", "w5?") if i % 2 else said(f"w{i}?"),
            "chosen": reply(f"w{i} w6"),
            "rejected": reply("w7" * (i % 3)),
        },
    ),
    "HuggingFaceH4/ultrafeedback_binarized": (
        {
            "prompt": STRING,
            "prompt_id": STRING,
            "chosen": MESSAGES,
            "rejected": MESSAGES,
            "messages": MESSAGES,
            "score_chosen": SCORE,
            "score_rejected": SCORE,
        },
        ("train_prefs", "train_sft", "test_prefs", "test_sft", "train_gen", "test_gen"),
        lambda i: {
            "prompt": f"w{i} w2?",
            "prompt_id": f"{i:064x}",
            "chosen": said(f"w{i} w2?", f"w{i} w6"),
            "rejected": said(f"w{i} w2?", f"w{i} w7 w8"),
            "messages": said(f"w{i} w2?", f"w{i} w6"),
            "score_chosen": 8.5,
            "score_rejected": 3.0,
        },
    ),
}
NAMES = ("dialogue", "question-answering", "tldr")
CHAT = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"


def table(name: str, first: int = 0) -> datasets.Dataset:
    features, _, row = HUB[name]
    rows = [row(i) for i in range(first, first + 10)]
    return datasets.Dataset.from_list(rows, features=datasets.Features(features))


@pytest.fixture
def hub(monkeypatch):
    """`load_dataset` without a network; the calls it got."""
    calls = []

    def load_dataset(name, *, split):
        calls.append((name, split))
        splits = HUB[name][1]
        if split not in splits:
            raise ValueError(f"Unknown split {split!r}")
        return table(name, 10 * splits.index(split))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipes") / "model"
    tiny.llama(dtype=torch.float32, max_position_embeddings=1024).save_pretrained(path)
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(path)
    return str(path)


def test_every_recipe_is_a_configuration_and_has_its_preference():
    assert {*NAMES, "quickstart"} <= set(config.built_in(Config))
    assert set(config.built_in(FitConfig)) == {f"{name}-preference" for name in NAMES}
    for name in NAMES:
        fit = config.load(f"{name}-preference", kind=FitConfig)
        assert config.load(name).preference == fit.output
        assert fit.trunk
        assert fit.held_out


def test_tldr_is_that_of_the_paper():
    policy = config.load("tldr")
    assert (policy.tau, policy.mixture_coef, policy.steps) == (0.008, 0.125, 10_000)
    assert (policy.batch_size, policy.learning_rate, policy.warmup_steps) == (32, 3e-5, 0)
    assert (policy.temperature, policy.top_k, policy.top_p, policy.kl) == (1, 0, 1, "reward_to_go")
    template = config.load("tldr-preference", kind=FitConfig).template
    assert template.format(prompt="a", first="b", second="c") == (
        "You are an expert summary rater. Given a piece of text and two of its possible summaries, "
        "output 1 or 2 to indicate which summary is better. Text - a, Summary 1 - b, Summary 2 - c."
        " Preferred Summary -"
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_files_of_the_same_schema_read_as_the_hub_does(hub, tmp_path, name, suffix):
    prompts = config.load(name).prompts
    pairs = config.load(f"{name}-preference", kind=FitConfig).pairs
    for source, read in ((prompts, data.read_prompts), (pairs, data.read_preferences)):
        rows, path = table(source.partition("#")[0]), tmp_path / f"rows.{suffix}"
        rows.to_parquet(path) if suffix == "parquet" else rows.to_json(path)
        found = read(path)
        assert len(found) == 10
        assert found == read(source)
    assert {split for _, split in hub} <= {"train", "train_prefs"}


@pytest.mark.parametrize("name", NAMES)
def test_a_policy_is_asked_what_the_preference_was_trained_on(hub, name):
    fit = config.load(f"{name}-preference", kind=FitConfig)
    prompts = data.read_prompts(config.load(name).prompts)
    pairs = data.read_preferences(fit.pairs)
    assert prompts == pairs.prompt
    assert all(isinstance(prompt, str) == (name == "tldr") for prompt in prompts)
    assert all(plain.strip() for plain in pairs.texts()[0])
    held_out = data.read_prompts(config.load(name).eval_prompts)
    assert held_out == data.read_preferences(fit.held_out).prompt
    assert not [prompt for prompt in held_out if prompt in prompts]


def test_ultrafeedback_prompts_are_conversations_without_the_answers(hub):
    pairs = data.read_preferences("HuggingFaceH4/ultrafeedback_binarized#test_prefs")
    assert pairs.prompt[0] == [{"role": "user", "content": "w20 w2?"}]
    assert pairs.texts()[1][0] == "w20 w6"
    assert pairs.texts()[2][0] == "w20 w7 w8"


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_runs_from_its_pairs_to_its_report(hub, model, tmp_path, name):
    chosen = config.load(f"{name}-preference", kind=FitConfig)
    # two batches of pairs
    small = {"trunk": model, "output": str(tmp_path / "preference"), "batch_size": 5}
    result = command.fit(dataclasses.replace(chosen, device="cpu", **small))
    assert result["pairs"] == 10
    assert result["held_out"]["pairs"] == 10
    saved = preference.load_preference(tmp_path / "preference")
    assert saved.settings["template"] == chosen.template

    flags = ["train", "--config", name, "--model", model, "--preference", small["output"]]
    flags += ["--output", str(tmp_path / "run"), "--steps", "2", "--batch-size", "4"]
    flags += ["--max-new-tokens", "4", "--micro-batch-size", "2", "--device", "cpu"]
    cli.main(flags)
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [1, 2]
    assert (tmp_path / "run" / "report.md").stat().st_size > 0


def test_models_can_be_compared_with_the_summaries_of_people(hub, model, tmp_path):
    judge = "tests.test_recipes:prefer_the_ninth_word"
    flags = ["--prompts", "trl-lib/tldr#validation", "--preference", judge, "--device", "cpu"]
    flags += ["--max-new-tokens", "3", "--samples", "6", "--output", str(tmp_path / "out")]
    cli.main(["evaluate", f"sft={model}", "human=trl-lib/tldr#validation", *flags])
    lines = (tmp_path / "out" / "completions" / "human.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    # validation begins with row 10
    assert rows == [{"prompt": POST.format(i), "completion": f" w{i} w9"} for i in range(10, 16)]
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["wins"][1][0] > 0.5


def prefer_the_ninth_word(prompts, first, second):
    """A judge for the tests."""
    sides = zip(first, second, strict=True)
    return [0.5 + 0.4 * (("w9" in a.split()) - ("w9" in b.split())) for a, b in sides]


def bad(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main(list(arguments))
    assert stop.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_unknown_names_and_splits_end_in_one_line(hub, capsys, tmp_path):
    assert "do you mean tldr?" in bad(capsys, "train", "--config", "tldrr")
    line = bad(capsys, "train", "--config", "tldr-preference")
    assert "one of: dialogue, question-answering, quickstart, tldr" in line
    line = bad(capsys, "preference", "--config", "dialog-preference")
    assert "do you mean dialogue-preference?" in line
    with pytest.raises(ValueError, match="Unknown split 'trian'"):
        data.read_prompts("trl-lib/tldr#trian")
    with pytest.raises(ValueError, match="#split is for a data set of the hub"):
        data.read_prompts("trl-lib/tldr#")
    (tmp_path / "a.jsonl").write_text('{"prompt": "w1"}\n')
    with pytest.raises(ValueError, match="not for a file"):
        data.read_prompts(f"{tmp_path / 'a.jsonl'}#train")


def test_a_file_may_have_the_mark_of_a_split_in_its_name(tmp_path):
    path = tmp_path / "a#train.jsonl"
    path.write_text('{"prompt": "w1"}\n')
    assert data.read_prompts(path) == ["w1"]


CONVERSATION = {"chosen": said("w1", "w2"), "rejected": said("w1", "w3")}


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        (CONVERSATION, said("w1")),
        (CONVERSATION | {"prompt": None}, said("w1")),
        (CONVERSATION | {"prompt": "w1"}, said("w1")),
        ({"prompt": "w9", "chosen": reply("w2"), "rejected": reply("w3")}, "w9"),
        ({"prompt": "w9", "chosen": "w2", "rejected": None}, "w9"),
        ({"chosen": "w1 w2", "rejected": "w1 w3"}, "w1"),
    ],
)
def test_prompts_of_a_preference_data_set(tmp_path, row, prompt):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row) + "\n")
    assert data.read_prompts(path) == [prompt]
