"""Bad input, tried by the thousand: a right answer, or a ``ValueError`` in one line.

``NLHF_FUZZ`` multiplies the numbers of examples and draws others each time.
"""

import contextlib
import dataclasses
import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from nlhf import config, data, http, policy, preference, tabular
from nlhf.commands import models
from nlhf.commands.settings import SolveConfig
from tests import tiny
from tests.wild import ENCODINGS, KINDS, damage, numbers, refused, tried, words

pytestmark = pytest.mark.usefixtures("one_thread")

# ---- data files

texts = st.one_of(st.text(max_size=8), st.sampled_from(["", " ", "a b", "\ud800", "\0", "é\u2028"]))
json_values = st.recursive(
    st.one_of(st.none(), texts, numbers),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3)),
    max_leaves=6,
)
messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.one_of(st.sampled_from(["user", "assistant"]), json_values)},
        optional={"content": st.one_of(texts, json_values)},
    ),
    max_size=3,
)
cells = st.one_of(texts, messages, json_values)
COLUMNS = ("prompt", "chosen", "rejected", "probability", "completion")
rows = st.one_of(
    st.fixed_dictionaries({}, optional=dict.fromkeys(COLUMNS, cells)),
    st.fixed_dictionaries(dict.fromkeys(COLUMNS[:3], texts), optional={"probability": numbers}),
    json_values,
)
READERS = (data.read_prompts, data.read_preferences, data.read_completions)


@st.composite
def json_lines(draw) -> bytes:
    lines = [
        draw(st.one_of(st.just(""), st.just("   "), rows.map(lambda row: json.dumps(row))))
        for _ in range(draw(st.integers(0, 4)))
    ]
    text = draw(st.sampled_from(["\n", "\r\n", "\n\n"])).join(lines)
    return draw(damage(text.encode(draw(st.sampled_from(ENCODINGS)), "replace")))


def check_rows(path: Path) -> None:
    """Every reader: what it gives is what it promises, what it refuses is named with its place."""
    for read in READERS:
        found = []
        if not refused(lambda read=read, found=found: found.append(read(path)), str(path)):
            whole = found[0]
            if isinstance(whole, data.Preferences):
                assert all(0 <= p <= 1 for p in whole.probability)
                whole = whole.texts()
            prompts = whole if isinstance(whole, list) else whole[0]
            assert all(data.plain_text(prompt).strip() for prompt in prompts)
            json.dumps(whole, ensure_ascii=False).encode()


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_lines_of_json_are_read_or_named(tmp_path, suffix):
    path = tmp_path / f"d{suffix}"

    @tried(60)
    @given(json_lines(), st.data())
    def right(content, more):
        if suffix.endswith(".gz"):
            content = more.draw(damage(gzip.compress(content)))
        path.write_bytes(content)
        check_rows(path)

    right()


def test_parquet_is_read_or_named(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    path = tmp_path / "d.parquet"
    conversation = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    tables = [
        pa.table(
            {"prompt": ["a", "b"] * 40, "chosen": ["c", "d"] * 40, "rejected": ["e", ""] * 40}
        ),
        pa.table({"prompt": [conversation], "completion": [b"\xff"], "probability": [0.5]}),
        pa.table([pa.array(["a"]), pa.array(["b"])], names=["prompt", "prompt"]),
        pa.table({"chosen": [conversation], "rejected": [conversation], "probability": [2]}),
        pa.table({"prompt": pa.array([], pa.string())}),
    ]
    contents = []
    for table in tables:
        parquet.write_table(table, path)
        contents.append(path.read_bytes())

    @tried(60)
    @given(st.sampled_from(contents).flatmap(damage))
    def right(content):
        path.write_bytes(content)
        check_rows(path)

    right()


def test_a_line_is_as_long_as_it_may_be_and_no_longer(tmp_path, monkeypatch):
    path = tmp_path / "d.jsonl"
    text = "x" * 10_000_000
    path.write_text(json.dumps({"prompt": text}) + "\n")
    assert data.read_prompts(path) == [text]
    path.write_text('{"prompt": "a"}\n' * 100_000 + "{}\n")
    assert "line 100001" in refused(lambda: data.read_prompts(path), str(path))
    packed = tmp_path / "d.jsonl.gz"
    packed.write_bytes(gzip.compress(b'{"prompt": "a"}\n' + b"\0" * 2**20))
    # the true limit takes as much memory
    monkeypatch.setattr(data, "_MOST_BYTES", 2**19)
    assert "line 2: is longer than" in refused(lambda: data.read_prompts(packed), str(packed))


@pytest.mark.parametrize("column", ["prompt", "chosen", "probability"])
def test_json_as_deep_as_python_reads_is_read_or_named(tmp_path, column):
    path = tmp_path / "d.jsonl"
    for depth in range(880, 1010):
        deep = "[" * depth + "]" * depth
        row = {"prompt": '"a"', "chosen": f"[{deep}, 1]", "rejected": f"[{deep}, 2]"}
        row[column] = f"[{deep}, 1]"
        path.write_text("{" + ", ".join(f'"{k}": {v}' for k, v in row.items()) + "}")
        for read in READERS[:2]:
            refused(lambda read=read: read(path), f"{path}, line 1")


# ---- games

game_cells = st.one_of(
    st.sampled_from(["0.5", "0", "1", ".5", "nan", "inf", "-0", "1e400", "1_0", "", "a", '"', "é"]),
    st.text(max_size=3),
)


def check_game(path: Path) -> None:
    found = []
    if not refused(lambda: found.append(tabular.read(path, tau=0.1)), str(path)):
        P = found[0].preference
        assert P.isfinite().all()
        assert ((P >= 0) & (P <= 1)).all()


def test_games_of_text_are_read_or_named(tmp_path):
    path = tmp_path / "game.csv"

    @tried(100)
    @given(st.data())
    def right(drawn):
        n = drawn.draw(st.integers(0, 3))
        lines = [",".join(drawn.draw(game_cells) for _ in range(n)) for _ in range(n)]
        encoding = drawn.draw(st.sampled_from(ENCODINGS))
        path.write_bytes(drawn.draw(damage("\n".join(lines).encode(encoding, "replace"))))
        check_game(path)

    right()


def test_games_of_arrays_are_read_or_named(tmp_path):
    path = tmp_path / "game.npy"
    contents = []
    for array in (
        np.full((3, 3), 0.5),
        np.full((2, 2, 2), 0.5, dtype=">f4"),
        np.eye(2, dtype=bool),
        np.array([["a", "b"], ["c", "d"]]),
        np.array([[None, {}], [1, 2]], dtype=object),
        np.zeros((0, 0)),
        np.zeros((2, 2), dtype=[("a", "f8")]),
    ):
        np.save(path, array, allow_pickle=True)
        contents.append(path.read_bytes())
    # a header that promises terabytes, or more than there are integers
    for shape in (b"(999999, 999999)", b"(9999999999, 9999999999)"):
        contents.append(contents[0].replace(b"(3, 3)" + b" " * (len(shape) - 6), shape))

    @tried(100)
    @given(st.sampled_from(contents).flatmap(damage))
    def right(content):
        path.write_bytes(content)
        check_game(path)

    right()


# ---- settings

FILES = [*KINDS.values(), preference.JudgeConfig]


@st.composite
def documents(draw) -> tuple[type, bytes]:
    kind = draw(st.sampled_from(FILES))
    names = [field.name for field in dataclasses.fields(kind)]
    name = st.one_of(st.sampled_from(names), words)
    lines = [f"{draw(name)}: {draw(words)}" for _ in range(draw(st.integers(0, 4)))]
    text = draw(st.sampled_from(["", "", "---\n", "- ", "!!python/object:os.system "]))
    text += "\n".join(lines)
    return kind, draw(damage(text.encode(draw(st.sampled_from(ENCODINGS)), "replace")))


LAUGHS = b"a0: &a0 [x, x]\n" + b"".join(
    b"a%d: &a%d [*a%d, *a%d, *a%d, *a%d]\n" % (i, i, *[i - 1] * 4) for i in range(1, 40)
)


def test_settings_in_yaml_are_read_or_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, again = tmp_path / "c.yaml", tmp_path / "again.yaml"

    @tried(80)
    @given(documents())
    @example((config.Config, LAUGHS))
    @example((config.Config, LAUGHS.replace(b"[", b"{<<: [").replace(b"]", b"]}")))
    @example((config.Config, b"steps: 1\nsteps: 2"))
    @example((config.Config, b"[" * 9999))
    @example((config.Config, b"x: " * 999))
    def right(document):
        kind, content = document
        path.write_bytes(content)
        found = []
        if not refused(lambda: found.append(config.load(str(path), kind=kind)), "config", "judge"):
            config.save(found[0], again)
            assert config.load(str(again), kind=kind) == found[0]

    right()
    assert {p.name for p in tmp_path.iterdir()} <= {"c.yaml", "again.yaml"}


@tried(50)
@given(st.sampled_from(FILES), st.data())
def test_what_is_saved_as_yaml_is_what_is_read(kind, drawn):
    names = [field.name for field in dataclasses.fields(kind) if field.type is str]
    values = {drawn.draw(st.sampled_from(names)): drawn.draw(words)}
    with contextlib.suppress(ValueError):
        given_ = config.from_dict(values, "here", kind)
        text = config.dump(given_)
        assert yaml.safe_load(text) == dataclasses.asdict(given_)


@pytest.mark.parametrize("kind", FILES)
def test_no_number_of_a_configuration_may_be_nan(kind):
    for field in dataclasses.fields(kind):
        # of a game, which says so itself
        if field.type is float and (kind, field.name) != (SolveConfig, "tau"):
            with pytest.raises(ValueError, match=field.name):
                kind(**{field.name: float("nan")})


# ---- servers


@tried(40)
@given(st.one_of(words, words.map(lambda w: f"https://{w}"), words.map(lambda w: f"http://h/{w}")))
def test_urls_are_taken_or_named(url):
    refused(lambda: http.Client(url, name="judge"), "judge")


@tried(40)
@given(st.one_of(words, st.text(alphabet="0123456789 :,MonJanGMT+-", max_size=40)))
def test_any_retry_after_is_seconds(text):
    assert 0 <= http._retry_after(text) < float("inf")


@tried(40)
@given(json_values)
def test_any_answer_of_a_judge_is_a_probability_or_none(value):
    shapes = (
        value,
        {"choices": [value]},
        {"choices": [{"message": {"content": value}}]},
        {"choices": [{"message": {"content": "A"}, "logprobs": {"content": [value]}}]},
    )
    for answer in shapes:
        try:
            p = preference.judge.verdict(answer)
        except http.BadAnswer:
            continue
        assert p is None or 0 <= p <= 1


# ---- folders


@pytest.fixture
def offline(monkeypatch):
    """A damaged path may look like a name of the hub."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("folders")
    model, tokenizer = tiny.llama(dtype=torch.float32), tiny.tokenizer()
    policy.save(model, tokenizer, place / "model")
    adapted = tiny.with_lora(tiny.llama(dtype=torch.float32))
    adapted.peft_config["default"].base_model_name_or_path = str(place / "model")
    adapted.save_pretrained(place / "adapters")
    opinion = preference.RewardModel(tiny.llama(dtype=torch.float32), tokenizer, batch_size=2)
    torch.nn.init.ones_(opinion.head.weight)
    preference.JoinPrompt(opinion, "w1").save_pretrained(place / "preference")
    return {name: place / name for name in ("model", "adapters", "preference")}


def answer_of(name: str, folder: Path) -> torch.Tensor:
    """What a folder gives when it is loaded and run."""
    if name == "preference":
        return preference.load_preference(folder)(["w1"], ["w2 w3"], ["w4"])
    model, tokenizer = models.load(str(folder), torch.float32, torch.device("cpu"))
    ids = tokenizer("w1 w2 w3", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return model(ids.clamp(max=model.config.vocab_size - 1)).logits


def files_of(folder: Path) -> list[str]:
    return sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file())


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", ["preference", "adapters", "model"])
def test_a_damaged_folder_is_named(folders, tmp_path, name):
    whole, broken = folders[name], tmp_path / name
    shutil.copytree(whole, broken)
    right = answer_of(name, whole)
    assert right.isfinite().all()

    @tried(25)
    @given(st.sampled_from(files_of(whole)), st.data())
    def named(file, drawn):
        content = (whole / file).read_bytes()
        # the weights themselves are most of a file, and not where its damage can be seen
        head = len(content)
        if file.endswith("safetensors") and name != "preference":
            head = 8 + int.from_bytes(content[:8], "little")
        changed = drawn.draw(damage(content[:head])) + content[head:]
        (broken / file).write_bytes(changed)
        found = []
        try:
            said = refused(lambda: found.append(answer_of(name, broken)), str(broken), "tokenizer")
        finally:
            (broken / file).write_bytes(content)
        if changed == content or (name == "preference" and not said):
            # as where a space of JSON has become a line's end
            assert torch.equal(found[0], right)
        elif name == "preference" and not file.endswith(preference.CONFIG):
            # every file has its hash
            assert f"{Path(file).name} has changed" in said

    named()
