"""Every command with flags that nobody would give: it does its work, or ends in one line and 2."""

import contextlib
import io
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nlhf import cli, policy, preference, train
from tests import tiny
from tests.wild import WORDS, tried, words

pytestmark = pytest.mark.usefixtures("one_thread")

ONE = {"model": "model", "max-new-tokens": "2", "batch-size": "2"}
BASE = {
    "train": ["--model", "model", "--prompts", "pairs.jsonl", "--preference", "taste"],
    "preference": ["--trunk", "model", "--pairs", "pairs.jsonl", "--freeze-trunk"],
    "generate": ["--model", "model", "--prompts", "pairs.jsonl", "--max-new-tokens", "2"],
    "evaluate": ["good.jsonl", "model", "--preference", "taste", "--max-new-tokens", "2"],
    "solve": ["dice", "--iterations", "2", "--output", "new.svg", "--solvers", "nash_mp"],
    "reproduce": ["cost"],
    "algorithms": [],
    "info": [],
}
POSITIONAL = ("evaluate", "solve", "reproduce")
# which would only take long
LONG = ("--iterations", "--epochs", "--scale", "--samples", "--n-samples")
PATHS = (
    *(
        "model",
        "taste",
        "good.jsonl",
        "pairs.jsonl",
        "game.csv",
        "empty",
        "words.txt",
        "latin.jsonl",
    ),
    *("cut.jsonl.gz", "no.yaml", "bad.yaml", "judge.yaml", "fifo.jsonl", "a$b$.csv", "$\\x$.csv"),
    *(
        "model/config.json",
        "new",
        "deep/new",
        "new.jsonl",
        "os:getcwd",
        "no:thing",
        "os.path:",
        "a:b",
    ),
)


class Accepted(ValueError):
    """Everything has been read, and the training would begin."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("inputs")
    model, tokenizer = tiny.llama(dtype=torch.float32), tiny.tokenizer()
    policy.save(model, tokenizer, place / "model")
    preference.RewardModel(model, tokenizer).save_pretrained(place / "taste")
    pairs = [{"prompt": f"w{i}", "chosen": "w2 w3", "rejected": "w4"} for i in range(3)]
    good = [{"prompt": row["prompt"], "completion": "w5"} for row in pairs]
    for name, rows in (("pairs", pairs), ("good", good)):
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "latin.jsonl").write_bytes(b'{"prompt": "\xe9"}\n')
    (place / "cut.jsonl.gz").write_bytes(b"\x1f\x8b\x08\x00")
    for name in ("game", "a$b$", "$\\x$"):
        (place / f"{name}.csv").write_text(",a$,b\n$a,.5,.7\nb,.3,.5\n".replace("$a", "a$"))
    (place / "no.yaml").write_text("[1, 2]")
    (place / "bad.yaml").write_text("seed: x")
    (place / "judge.yaml").write_text("url: http://127.0.0.1:9/v1\nmodel: m\nretries: 0\n")
    (place / "words.txt").write_text("words")
    (place / "empty").mkdir()
    return place


def flags_of(command: str) -> list[tuple[str, bool]]:
    """Every flag of the real parser, and whether a value follows it."""
    seen = []

    class Commands:
        def add_parser(self, name, **options):
            options.pop("help", None)
            parser = cli._Parser(prog=name, **options)
            seen.append(parser)
            return parser

    module = next(c for c in cli.COMMANDS if c.__name__.endswith(f".{command}"))
    module.add(Commands())
    return [
        (flag, action.nargs is None)
        for action in seen[0]._actions
        for flag in action.option_strings
        if flag not in ("-h", "--help")
    ]


values = st.one_of(
    st.sampled_from(PATHS), st.sampled_from(WORDS), words, st.integers(-2, 4).map(str)
)


@st.composite
def lines(draw, command: str) -> list[str]:
    flags = flags_of(command)
    given_ = list(BASE[command])
    for _ in range(draw(st.integers(0, 3))):
        if not flags or draw(st.integers(0, 9)) == 0:
            given_.insert(draw(st.integers(0, len(given_))), draw(values))
            continue
        flag, valued = draw(st.sampled_from(flags))
        value = draw(values)
        if flag in LONG and re.fullmatch(r"\s*[0-9_.e+]{2,}\s*|inf", value):
            value = "3"
        given_ += [flag, value] if valued else [flag]
    return [command, *given_]


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(f.relative_to(folder)): f.read_bytes() if f.is_file() else b""
        for f in folder.rglob("*")
    }


@pytest.mark.parametrize("command", BASE)
def test_any_flags_are_right_or_one_line_and_status_2(inputs, tmp_path, monkeypatch, command):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HOME", str(tmp_path))
    place = tmp_path / "place"
    shutil.copytree(inputs, place)
    monkeypatch.chdir(place)
    before = tree(place)

    def stop(*_):
        raise Accepted("all read")

    monkeypatch.setattr(train, "Learner", stop)
    if command == "reproduce":
        from nlhf.experiments import cost

        monkeypatch.setattr(cost, "run", stop)

    @tried(20)
    @given(lines(command))
    def right(words):
        errors = io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace")
        answers = io.TextIOWrapper(io.BytesIO(), "utf-8")
        status = 0
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(answers):
            try:
                cli.main(words)
            except SystemExit as stopped:
                status = stopped.code
        errors.flush()
        said = errors.buffer.getvalue().decode().splitlines()
        after = tree(place)
        if status:
            assert status == 2
            assert sum(line.startswith("nlhf") for line in said) == 1
            assert said[-1].startswith("nlhf")
            assert len(said[-1]) < 2500
            # answers that have been drawn stay when the judge fails
            if "what the models answered is in" not in said[-1]:
                assert after == before
        assert before.items() <= after.items()
        for name in sorted(after.keys() - before.keys(), reverse=True):
            (place / name).rmdir() if (place / name).is_dir() else (place / name).unlink()

    right()
