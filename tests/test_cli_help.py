"""The command line teaches: one line a command, groups of flags, examples that can be copied."""

import dataclasses
import re
import shlex
from pathlib import Path

import pytest

from nlhf import cli, config
from nlhf.commands import common, settings
from nlhf.config import Config, FitConfig

ROOT = Path(__file__).parent.parent
NAMES = [command.__name__.rpartition(".")[2] for command in cli.COMMANDS]
KINDS = {
    "train": Config,
    "preference": FitConfig,
    "generate": settings.GenerateConfig,
    "evaluate": settings.EvaluateConfig,
    "solve": settings.SolveConfig,
    "reproduce": settings.ReproduceConfig,
}


def help_of(capsys, *words: str) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main([*words, "--help"])
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_every_command_stands_on_a_line_with_what_it_does(capsys):
    text = help_of(capsys)
    wanted = "train preference generate evaluate solve reproduce algorithms info"
    assert wanted.split() == NAMES
    for name in NAMES:
        assert re.search(rf"^    {name} +\w.*$", text, flags=re.M), name
    # the old name works, and is not taught
    assert "fit-preference" not in text


@pytest.mark.parametrize("name", NAMES)
def test_a_command_has_a_description_examples_and_says_where_more_is(name, capsys):
    text = help_of(capsys, name)
    description = " ".join(text.split("\n\n")[1].split())
    assert len(re.findall(r"[.](?: |$)", description)) >= 2
    assert text.count("\n  nlhf ") >= 2
    documents = re.findall(r"(?:docs/)?[\w-]+\.md", text.splitlines()[-1])
    assert text.splitlines()[-1].startswith("more: ")
    assert documents
    assert all((ROOT / document).is_file() for document in documents)


@pytest.mark.parametrize("name", KINDS)
def test_every_flag_of_a_command_is_in_a_group_with_its_help(name, capsys):
    text = help_of(capsys, name)
    kind = KINDS[name]
    fields = dataclasses.fields(kind)
    assert "group" in fields[0].metadata
    titles = [f.metadata["group"] for f in fields if "group" in f.metadata]
    assert len(set(titles)) == len(titles)
    heads = [text.index(f"\n{title}:\n") for title in titles]
    assert heads == sorted(heads)
    joined = " ".join(text.split())
    for field in fields:
        words = " ".join(config.field_help(kind)[field.name].split())
        assert "--" + field.name.replace("_", "-") in text, field.name
        # argparse breaks lines at hyphens too
        assert words[:30].split("-")[0] in joined, field.name


def examples(name: str) -> list[str]:
    module = next(c for c in cli.COMMANDS if c.__name__.endswith(f".{name}"))
    lines = module.EXAMPLES.replace("\\\n", " ").splitlines()
    return [part for line in lines for part in re.split(r"&&|\|", line)]


@pytest.mark.parametrize("name", NAMES)
def test_examples_are_commands_of_this_version(name):
    found = 0
    for text in examples(name):
        words = [w for w in shlex.split(text) if not re.fullmatch(r"[A-Z_]+=\w+", w)]
        if words[0] != "nlhf":
            continue
        arguments = cli._parse(words[1:])
        found += arguments.command == name
        kind = KINDS.get(arguments.command)
        # a file of the user's cannot be read here, a built-in one can
        if kind and (not arguments.config or arguments.config in config.built_in(kind)):
            common.settings(arguments, kind)
    assert found >= 2


@pytest.mark.parametrize("name", KINDS)
def test_flags_win_over_the_file_and_the_file_over_defaults(name, tmp_path):
    kind = KINDS[name]
    values = {
        f.name: f.default + 1 if f.type is int else f"{f.default}x"
        for f in dataclasses.fields(kind)
        if f.name in ("seed", "output")
    }
    path = tmp_path / "mine.yaml"
    path.write_text("".join(f"{key}: {value}\n" for key, value in values.items()))
    positional = {"evaluate": ["a", "b"], "solve": ["dice"], "reproduce": ["cost"]}.get(name, [])
    words = [name, *positional, "--config", str(path)]
    read = common.settings(cli._parse(words), kind)
    assert {key: getattr(read, key) for key in values} == values
    won = common.settings(cli._parse([*words, "--output", "mine.svg"]), kind)
    assert won == dataclasses.replace(read, output="mine.svg")
    others = [f.name for f in dataclasses.fields(kind) if f.name not in values]
    assert all(getattr(read, key) == getattr(kind(), key) for key in others)


def refused(capsys, *words: str) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main(list(words))
    assert stop.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_what_is_mistyped_is_answered_with_the_nearest(tmp_path, capsys):
    assert "unknown command 'trian'; do you mean train?" in refused(capsys, "trian")
    assert "unknown command 'xyz'; nlhf --help lists them" in refused(capsys, "xyz")
    assert "--mixture-ceof 1; do you mean --mixture-coef?" in refused(
        capsys, "generate", "--mixture-ceof", "1"
    )
    (tmp_path / "c.yaml").write_text("iteration: 3")
    line = refused(capsys, "solve", "dice", "--config", str(tmp_path / "c.yaml"))
    assert "unknown field 'iteration'; do you mean iterations?" in line


def test_the_old_name_of_preference_works_and_says_what_it_is_called_now(tmp_path, capsys):
    with pytest.raises(SystemExit):
        cli.main(["fit-preference", "--output", str(tmp_path)])
    first, second = capsys.readouterr().err.strip().splitlines()
    assert first == "nlhf fit-preference is deprecated: it is now called nlhf preference"
    assert second == "nlhf: config: trunk must be given"


def test_info_needs_nothing_and_says_what_runs(capsys):
    import torch

    from nlhf_kernels import registry

    cli.main(["info"])
    text = capsys.readouterr().out
    for name in ("torch", "triton", "transformers", "peft"):
        assert re.search(rf"^{name} +\d", text, flags=re.M), name
    for name in ("flash_attn", "bitsandbytes", "deepspeed", "wandb", "trackio", "tensorboard"):
        assert re.search(rf"^{name} +(\d|not installed)", text, flags=re.M), name
    assert f"{torch.get_num_threads()} of torch" in text
    assert re.search(r"^attention +float32", text, flags=re.M)
    for op in registry.OPS:
        assert re.search(rf"^{op} +eager +cpu +yes$", text, flags=re.M), op
        assert f"{op} on cpu uses " in text
        # and one call of each did run there
        assert re.search(rf"^{op} +{registry.resolve(op, 'cpu')} +\d+$", text, flags=re.M), op
