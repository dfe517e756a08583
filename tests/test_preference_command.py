"""``nlhf preference``: what it saves is what --preference reads, and it has learned."""

import dataclasses
import json

import pytest
import torch

from nlhf import cli, config, preference
from nlhf.commands import preference as command
from nlhf.config import FitConfig
from tests import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny trunk, and pairs in which the word w7 wins."""
    path = tmp_path_factory.mktemp("fit")
    tiny.llama(dtype=torch.float32).save_pretrained(path / "trunk")
    tiny.tokenizer().save_pretrained(path / "trunk")
    for name, first in (("train", 10), ("held_out", 30)):
        rows = [
            {"prompt": f"w{i} w1", "chosen": f"w{j} w7", "rejected": f"w{j} w8"}
            for i in range(first, first + 8)
            for j in range(first, first + 4)
        ]
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def flags(folder, output, **changes) -> list[str]:
    values = {
        "trunk": folder / "trunk",
        "pairs": folder / "train.jsonl",
        "held_out": folder / "held_out.jsonl",
        "output": output,
        "template": "{prompt} w3 {first} w4 {second} w5",
        "epochs": 4,
        "batch_size": 8,
        "learning_rate": 0.01,
        "device": "cpu",
    }
    pairs = [("--" + k.replace("_", "-"), str(v)) for k, v in (values | changes).items()]
    return ["preference", *(x for pair in pairs for x in pair)]


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("pairwise", []),
        ("reward", []),
        ("pairwise", ["--freeze-trunk", "--n-layers", "1"]),
        ("reward", ["--freeze-trunk", "--pooling", "mean", "--l2", "0.01"]),
    ],
)
def test_it_learns_the_pairs_and_says_so(folder, tmp_path, capsys, kind, more):
    template = {"reward": "{prompt} w3 {response}"}.get(kind, "{prompt} w3 {first} w4 {second} w5")
    cli.main([*flags(folder, tmp_path / "out", kind=kind, template=template), *more])
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "out" / "fit.json").read_text())
    assert result["pairs"] == result["held_out"]["pairs"] == 32
    assert result["held_out"]["accuracy_0"] > 0.9
    assert f"| accuracy |  | {result['held_out']['accuracy_0']:.4f} |" in printed
    assert f"{result['held_out']['calibration_error']:.4f}" in printed
    model = preference.as_preference(tmp_path / "out")
    assert type(model.preference) is preference.KINDS[kind]
    assert model(["w50 w1"], ["w2 w7"], ["w2 w8"])[0] > 0.5
    # what was asked for is kept, and can be asked for again
    again = config.load(str(tmp_path / "out" / "config.yaml"), kind=FitConfig)
    assert again.kind == kind
    assert again.template == template
    layers = model.preference.trunk.config.num_hidden_layers
    assert layers == (1 if "--n-layers" in more else 2)


def test_without_held_out_pairs_nothing_is_measured(folder, tmp_path, capsys):
    cli.main(flags(folder, tmp_path / "out", held_out="", limit=3, epochs=1))
    assert "held_out" not in json.loads((tmp_path / "out" / "fit.json").read_text())
    assert "| pairs | 3 |  |" in capsys.readouterr().out


def test_our_own_template_is_used_where_none_is_given(folder, tmp_path):
    chosen = FitConfig(
        trunk=str(folder / "trunk"), pairs=str(folder / "train.jsonl"), limit=2, device="cpu"
    )
    for kind, model in preference.KINDS.items():
        output = str(tmp_path / kind)
        command.fit(dataclasses.replace(chosen, kind=kind, output=output))
        saved = preference.load_preference(output).settings["template"]
        own = {"pairwise": preference.PairwiseModel.TEMPLATE, "reward": "{prompt}\n{response}"}
        assert saved == own[kind], model


def test_long_pairs_are_refused_cut_or_left_out(folder, tmp_path, capsys):
    long = {"prompt": "w1 " * 70 + "w2", "chosen": "w7", "rejected": "w8"}
    huge = {"prompt": "w1", "chosen": "w7 " * 70, "rejected": "w8"}
    short = {"prompt": "w1", "chosen": "w7", "rejected": "w8"}
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (long, huge, short)))
    base = flags(folder, tmp_path / "out", pairs=path, held_out=path, epochs=1)
    assert "context 64" in bad(capsys, *base)
    assert "shorten the responses" in bad(capsys, *base, "--truncate")
    assert "no pair fits max_length = 2" in bad(capsys, *base, "--skip-long", "--max-length", "2")
    cli.main([*base, "--truncate", "--skip-long"])
    assert "| pairs too long, left out | 1 | 1 |" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "fit.json").read_text())["pairs"] == 2


def test_a_hub_name_is_fetched_once_and_only_what_is_needed(folder, tmp_path, monkeypatch):
    import huggingface_hub

    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(folder / "trunk")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    cli.main(flags(folder, tmp_path / "out", trunk="someone/model", epochs=1, limit=2))
    ((name, patterns),) = asked
    assert name == "someone/model"
    assert not any(pattern.endswith((".bin", ".pt")) for pattern in patterns)
    assert (tmp_path / "out" / "trunk" / "model.safetensors").exists()


def bad(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main(list(arguments))
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    return lines[-1]


BAD = [
    (["--kind", "pairwize"], "kind must be one of 'pairwise', 'reward', got 'pairwize'; do you"),
    (["--epochs", "0"], "epochs must be at least 1"),
    (["--learning-rate", "0"], "learning_rate must be above 0"),
    (["--learning-rate", "nan"], "learning_rate must be above 0"),
    (["--template", "{prompt}"], "template must contain"),
    (["--pairs", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
    (["--trunk", "./nowhere"], "nowhere: holds no model"),
    (["--trunk", ""], "trunk must be given"),
    (["--n-layers", "3"], "n_layers must be 1 to 2"),
    (["--device", "cuda:99"], "cuda:99"),
    (["--trnk", "x"], "unrecognized arguments"),
    (["--config", "quickstart"], "cannot read quickstart"),
]


@pytest.mark.parametrize(("wrong", "message"), BAD, ids=[" ".join(w) for w, _ in BAD])
def test_bad_input_ends_in_one_line_and_status_2(folder, tmp_path, capsys, wrong, message):
    assert message in bad(capsys, *flags(folder, tmp_path / "out"), *wrong)
    assert not (tmp_path / "out").exists()


def test_a_file_of_another_command_is_refused(folder, tmp_path, capsys):
    path = tmp_path / "a.yaml"
    path.write_text("tau: 0.1\n")
    line = bad(capsys, *flags(folder, tmp_path / "out"), "--config", str(path))
    assert "unknown field 'tau'" in line


def test_nothing_is_written_over(folder, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    assert "is not empty" in bad(capsys, *flags(folder, tmp_path / "out"))
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years of work"


def test_every_field_has_its_help_and_survives_a_file(tmp_path):
    chosen = config.load("tldr-preference", {"seed": 7}, FitConfig)
    config.save(chosen, tmp_path / "c.yaml")
    assert config.load(str(tmp_path / "c.yaml"), kind=FitConfig) == chosen
    assert set(config.field_help(FitConfig)) == set(vars(chosen))
