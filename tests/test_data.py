"""Readers of prompts and preferences: formats, soft labels, and one clear line for bad input."""

import gzip
import json
from pathlib import Path

import pytest

from nlhf import data

MESSAGES = [{"role": "user", "content": "hi"}]
GOOD = [{"role": "assistant", "content": "yes"}]
BAD = [{"role": "assistant", "content": "no"}]


def write(path: Path, rows: list) -> Path:
    text = "".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    elif path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet

        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["d.jsonl", "d.jsonl.gz", "d.parquet"])
def test_every_file_format(tmp_path, name):
    rows = [
        {"prompt": "a", "chosen": "b", "rejected": "c", "probability": 0.75},
        {"prompt": "d", "chosen": "é", "rejected": "", "probability": None},
    ]
    path = write(tmp_path / name, rows)
    assert data.read_prompts(path) == ["a", "d"]
    pairs = data.read_preferences(str(path))
    assert pairs == data.Preferences(["a", "d"], ["b", "é"], ["c", ""], [0.75, 1.0])
    assert len(data.read_preferences(path, limit=1)) == 1
    assert pairs.select([1]).chosen == ["é"]


@pytest.mark.parametrize("name", ["d.jsonl", "d.parquet"])
def test_conversational(tmp_path, name):
    path = write(tmp_path / name, [{"prompt": MESSAGES, "chosen": GOOD, "rejected": BAD}])
    assert data.read_prompts(path) == [MESSAGES]
    pairs = data.read_preferences(path)
    assert pairs.texts() == (["hi"], ["yes"], ["no"])
    assert data.plain_text(MESSAGES + GOOD) == "user: hi\nassistant: yes"


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt", "rest"),
    [
        (MESSAGES + GOOD, MESSAGES + BAD, MESSAGES, (GOOD, BAD)),
        (MESSAGES + GOOD, MESSAGES + GOOD, MESSAGES, (GOOD, GOOD)),
        ("The sky is blue.", "The sky is bleak.", "The sky is", (" blue.", " bleak.")),
        ("The sky is", "The sky isle", "The sky", (" is", " isle")),
    ],
)
def test_implicit_prompt(tmp_path, chosen, rejected, prompt, rest):
    path = write(tmp_path / "d.jsonl", [{"chosen": chosen, "rejected": rejected}])
    pairs = data.read_preferences(path)
    assert (pairs.prompt[0], (pairs.chosen[0], pairs.rejected[0])) == (prompt, rest)


PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "no rows"),
        (["{]\n"], "line 1: is not JSON"),
        ([PAIR, "[1]\n"], "line 2: must be a JSON object, got list"),
        ([{"prompt": "a", "text": "b"}], "lacks the column chosen, rejected; it has prompt, text"),
        ([PAIR | {"prompt": "  "}], "prompt must not be empty"),
        ([PAIR | {"prompt": []}], "prompt must not be empty"),
        ([PAIR | {"prompt": 3}], "prompt must be a string or a list of messages, got int"),
        ([PAIR | {"prompt": MESSAGES}], "all be strings or all messages"),
        ([PAIR | {"chosen": GOOD}], "both be strings or both messages"),
        ([PAIR | {"chosen": [{"role": "user"}]}], "must have a role and a content"),
        ([PAIR | {"probability": 1.5}], r"probability must be a number in \[0, 1\], got 1.5"),
        ([PAIR | {"probability": float("nan")}], "probability must be"),
        ([PAIR | {"probability": True}], "probability must be"),
        ([PAIR | {"probability": "1"}], "probability must be"),
        ([{"chosen": "x y", "rejected": "z y"}], "share no beginning"),
    ],
)
def test_bad_rows(tmp_path, rows, words):
    path = write(tmp_path / "d.jsonl", rows)
    with pytest.raises(ValueError, match=words) as caught:
        data.read_preferences(path)
    assert "\n" not in str(caught.value)
    assert "d.jsonl" in str(caught.value)


def test_bad_files(tmp_path):
    (tmp_path / "x.jsonl.gz").write_bytes(b"not gzip")
    (tmp_path / "y.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "a"}\n' * 99)[:-12])
    (tmp_path / "z.parquet").write_bytes(b"not parquet")
    (tmp_path / "u.jsonl").write_bytes(b'{"prompt": "\xff"}\n')
    (tmp_path / "t.txt").write_text("a")
    cases = {
        "x.jsonl.gz": "cannot be read",
        "y.jsonl.gz": "cannot be read",
        "z.parquet": "cannot be read as parquet",
        "u.jsonl": "not UTF-8",
        "t.txt": "must end in",
        "none.jsonl": "no such file",
        "": "is a folder",
    }
    for name, words in cases.items():
        with pytest.raises(ValueError, match=words):
            data.read_prompts(tmp_path / name)
    with pytest.raises(ValueError, match="lacks the column prompt; it has text"):
        data.read_prompts(write(tmp_path / "v.jsonl", [{"text": "a"}]))
    with pytest.raises(ValueError, match="limit"):
        data.read_prompts(tmp_path / "v.jsonl", limit=0)
    with pytest.raises(ValueError, match="one length"):
        data.Preferences(["a"], [], [], [])


def test_hub_name(monkeypatch):
    import datasets

    def load_dataset(name, split):
        if name == "gone/set":
            raise datasets.exceptions.DatasetNotFoundError("no such set\non the hub")
        return datasets.Dataset.from_list([{"prompt": f"{name} {split}"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert data.read_prompts("some/set", split="test") == ["some/set test"]
    with pytest.raises(ValueError, match=r"gone/set: no such file, .*: no such set$"):
        data.read_prompts("gone/set")


def test_render_prompt():
    class Tokenizer:
        chat_template = "x"

        def apply_chat_template(self, messages, **options):
            return messages[-1]["role"], options

    assert data.render_prompt("as it is", None) == "as it is"
    role, options = data.render_prompt(MESSAGES, Tokenizer())
    assert (role, options["add_generation_prompt"]) == ("user", True)
    role, options = data.render_prompt(MESSAGES + GOOD, Tokenizer())
    assert (options["add_generation_prompt"], options["continue_final_message"]) == (False, True)
    with pytest.raises(ValueError, match="no chat template"):
        data.render_prompt(MESSAGES, object())


def test_replace_folder(tmp_path):
    target = tmp_path / "folder"
    with pytest.raises(FileNotFoundError), data.replace_folder(target) as new:
        (new / "a" / "b").write_text("the body fails")
    assert list(tmp_path.iterdir()) == []
    for text in ("one", "two"):
        with data.replace_folder(target, marker="a") as new:
            (new / "a").write_text(text)
    assert (target / "a").read_text() == "two"
    with pytest.raises(ValueError, match="something else"), data.replace_folder(target):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_real_pairs(real_pairs):
    pairs = data.read_preferences(real_pairs)
    assert len(pairs) > 900
    assert len(set(pairs.prompt)) == 48
    assert all(0 <= p <= 1 for p in pairs.probability)


BROKEN = (
    r'{"prompt": "a\ud800"}',
    r'{"prompt": [{"role": "user", "content": "a\ud800"}]}',
    "[" * 100_000,
)


@pytest.mark.parametrize("line", BROKEN)
def test_json_that_no_tokenizer_or_parser_takes(tmp_path, line):
    (tmp_path / "x.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match=r"x\.jsonl, line 1: "):
        data.read_prompts(tmp_path / "x.jsonl")
