"""``nlhf evaluate``: models and completions, end to end."""

import json
import weakref

import pytest
import torch

from nlhf import cli, policy, preference
from nlhf.commands import evaluate as command
from tests import tiny


def shares(prompts, first, second):
    """The answer with the larger share of even words wins more often."""

    def even(text):
        words = text.split()
        return sum(int(w[1:]) % 2 == 0 for w in words) / max(len(words), 1)

    return [0.5 + 0.4 * (even(a) - even(b)) for a, b in zip(first, second, strict=True)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two tiny models and prompts."""
    path = tmp_path_factory.mktemp("arena")
    for seed, name in enumerate(("one", "two")):
        tiny.llama(seed, torch.float32).save_pretrained(path / name)
        tiny.tokenizer().save_pretrained(path / name)
    rows = [{"prompt": f"w{i} w{i + 1}"} for i in range(12)]
    write(path / "prompts.jsonl", rows)
    return path


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def completions(path, word: str, count: int = 12):
    prompts = [f"w{i} w{i + 1}" for i in range(count)]
    return write(path, [{"prompt": prompt, "completion": word} for prompt in prompts])


def run(*arguments) -> None:
    judge = "tests.test_evaluate:shares"
    more = ["--preference", judge, "--device", "cpu", "--max-new-tokens", "5", "--batch-size", "5"]
    cli.main(["evaluate", *more, *map(str, arguments)])


def read(output) -> dict:
    return json.loads((output / "evaluation.json").read_text())


def test_models_and_completions_meet_and_can_meet_again(folder, tmp_path, capsys, monkeypatch):
    completions(tmp_path / "even" / "completions.jsonl", "w2 w4")
    output = tmp_path / "out"
    models = [folder / "one", folder / "two"]
    alive, load = [], policy.load_model

    def watched(*args, **kwargs):
        assert not [ref for ref in alive if ref() is not None]
        model = load(*args, **kwargs)
        alive.append(weakref.ref(model))
        return model

    monkeypatch.setattr(policy, "load_model", watched)
    prompts = ["--prompts", folder / "prompts.jsonl"]
    run(*models, tmp_path / "even", *prompts, "--output", output)
    assert len(alive) == 2
    found = read(output)
    assert found["names"] == ["one", "two", "even"]
    assert found["prompts"] == 12
    # nothing has more even words than all of them
    assert min(found["wins"][2][:2]) > 0.5
    assert found["equilibrium"]["weights"][2] > 0.9
    assert found["equilibrium"]["exploitability"][2] == 0
    printed = capsys.readouterr().out
    assert (output / "report.md").read_text() in printed
    assert (output / "heatmap.png").read_bytes()[1:4] == b"PNG"

    # the same from what was written, with no model at all
    monkeypatch.setattr(policy, "load_model", None)
    files = [output / "completions" / f"{name}.jsonl" for name in found["names"]]
    run(*files, "--output", tmp_path / "again")
    again = read(tmp_path / "again")
    for key in found.keys() - {"settings", "contestants"}:
        assert again[key] == found[key], key
    run(*files[:2], "--samples", 3, "--output", tmp_path / "few")
    assert read(tmp_path / "few")["prompts"] == 3


def test_a_saved_preference_is_asked_once_a_pair(folder, tmp_path, monkeypatch):
    trunk = tiny.llama(dtype=torch.float32)
    model = preference.PairwiseModel(trunk, tiny.tokenizer(), template="{prompt} {first} {second}")
    torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(1))
    model.save_pretrained(tmp_path / "preference")
    asked, inner = [], preference.PairwiseModel.forward

    def counted(self, prompts, first, second):
        asked.append((prompts, first, second))
        return inner(self, prompts, first, second)

    monkeypatch.setattr(preference.PairwiseModel, "forward", counted)
    files = [completions(tmp_path / f"{word}.jsonl", word) for word in ("w2", "w3")]
    run(*files, "--preference", tmp_path / "preference", "--output", tmp_path / "out")
    ((prompts, first, second),) = asked
    found = read(tmp_path / "out")
    assert found["position_bias"] is None
    expected = model(prompts, first, second).double().mean().item()
    assert found["wins"][0][1] == expected != 0.5
    assert (first[0], second[0]) == ("w2", "w3")


def test_draws_repeat_and_differ_between_contestants(folder, tmp_path):
    twins = [f"a={folder / 'one'}", f"b={folder / 'one'}", "--prompts", folder / "prompts.jsonl"]
    for name in ("x", "y"):
        run(*twins, "--output", tmp_path / name)
    texts = {
        (run_name, name): (tmp_path / run_name / "completions" / f"{name}.jsonl").read_text()
        for run_name in "xy"
        for name in "ab"
    }
    assert texts["x", "a"] == texts["y", "a"]
    assert texts["x", "b"] == texts["y", "b"]
    assert texts["x", "a"] != texts["x", "b"]
    run(*twins, "--seed", 1, "--output", tmp_path / "z")
    assert (tmp_path / "z" / "completions" / "a.jsonl").read_text() != texts["x", "a"]


def test_adapters_answer_like_the_model_that_they_are_merged_into(folder, tmp_path):
    base = policy.load_model(folder / "one", torch.float32)
    adapted = tiny.with_lora(base)
    adapted.save_pretrained(tmp_path / "a" / "adapters")
    policy.save(adapted, tiny.tokenizer(), tmp_path / "b" / "model")
    prompts = ["--prompts", folder / "prompts.jsonl", "--output", tmp_path / "out"]
    # a folder with model/ in it is a run of nlhf train
    run(f"same={tmp_path / 'a' / 'adapters'}", tmp_path / "b", *prompts)
    first = (tmp_path / "out" / "completions" / "same.jsonl").read_text()
    run(f"same={tmp_path / 'b'}", folder / "two", *prompts[:3], tmp_path / "merged")
    assert (tmp_path / "merged" / "completions" / "same.jsonl").read_text() == first
    run(f"same={folder / 'one'}", folder / "two", *prompts[:3], tmp_path / "base")
    assert (tmp_path / "base" / "completions" / "same.jsonl").read_text() != first


def test_conversations_are_rendered_for_the_model_and_plain_for_the_preference(folder, tmp_path):
    path = tmp_path / "chat"
    tiny.llama(dtype=torch.float32).save_pretrained(path)
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}w1 {{ m.content }} {% endfor %}"
    tokenizer.save_pretrained(path)
    asked = [[{"role": "user", "content": f"w{i}"}] for i in range(6)]
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": prompt} for prompt in asked])
    reply = [{"role": "assistant", "content": "w2"}]
    rows = [{"prompt": prompt, "completion": reply} for prompt in asked]
    write(tmp_path / "others" / "completions.jsonl", rows)
    run(path, tmp_path / "others", "--prompts", prompts, "--output", tmp_path / "out")
    written = (tmp_path / "out" / "completions" / "chat.jsonl").read_text().splitlines()
    assert [json.loads(line)["prompt"] for line in written] == asked
    # the rendered prompts as plain ones, with the seeds of the same name
    plain = write(tmp_path / "p.jsonl", [{"prompt": f"w1 w{i} "} for i in range(6)])
    run(path, folder / "two", "--prompts", plain, "--output", tmp_path / "plain")
    same = (tmp_path / "plain" / "completions" / "chat.jsonl").read_text().splitlines()
    texts = [[json.loads(line)["completion"] for line in lines] for lines in (written, same)]
    assert texts[0] == texts[1]


def test_repeated_prompts_have_answers_of_their_own(tmp_path):
    rows = [{"prompt": "w1", "completion": word} for word in ("w2", "w3", "")]
    write(tmp_path / "a.jsonl", rows)
    write(tmp_path / "b.jsonl", rows[::-1])
    run(tmp_path / "a.jsonl", tmp_path / "b.jsonl", "--output", tmp_path / "out")
    found = read(tmp_path / "out")
    # w2 against nothing, w3 against itself, nothing against w2
    assert found["prompts"] == 3
    assert found["wins"][0][1] == 0.5
    assert found["half_widths"][0][1] == pytest.approx(1.96 * 0.4 / 3**0.5, rel=1e-6)


# ---- who takes part


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["runs/a/model", "runs/b/model"], ["a-model", "b-model"]),
        (["runs/a/model", "c"], ["model", "c"]),
        (["x=runs/a/model", "runs/b/model"], ["x", "model"]),
        (["model=runs/a/model", "runs/b/model"], ["model", "b-model"]),
        (["x=runs/a/model", "y=runs/a/model"], ["x", "y"]),
        (["e/completions/p.jsonl", "f/completions.jsonl"], ["p", "f"]),
        (["e/completions/p.jsonl", "g/p.jsonl"], ["completions-p", "g-p"]),
        (["someone/model", "other/model"], ["someone-model", "other-model"]),
        (["human=trl-lib/tldr#validation", "trl-lib/tldr#test"], ["human", "tldr-test"]),
        (["lr=0.1/model", "z"], ["model", "z"]),
    ],
)
def test_names_are_the_ends_of_paths(tmp_path, monkeypatch, paths, names):
    monkeypatch.chdir(tmp_path)
    for model in ("runs/a/model", "runs/b/model", "c", "lr=0.1/model", "z"):
        (tmp_path / model).mkdir(parents=True)
        (tmp_path / model / "config.json").write_text("{}")
    write(tmp_path / "e" / "completions" / "p.jsonl", [])
    write(tmp_path / "f" / "completions.jsonl", [])
    write(tmp_path / "g" / "p.jsonl", [])
    found = command.resolve(paths)
    assert [contestant.name for contestant in found] == names


def bad(capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error.strip().splitlines()[-1]


BAD = [
    (["one"], "needs two contestants at least, got"),
    (["one", "one"], "two contestants have the name"),
    (["x=one", "x=two"], "two contestants have the name 'x'; give names"),
    (["a/b=one", "two"], "a name must be a word without a slash"),
    (["one", "onn"], "do you mean"),
    (["one", "empty"], "holds neither a model"),
    (["one", "prompts.jsonl"], "lacks the column completion"),
    (["one", "words.txt"], "completions must be in a file that ends in"),
    (["one", "two"], "--prompts must be given"),
    (["even.jsonl", "odd.jsonl"], "even, odd have no prompts in common"),
    (["even.jsonl", "half.jsonl"], "half.jsonl: lacks 6 of the 12 prompts; the first of them is"),
    (["one", "odd.jsonl", "--prompts", "prompts.jsonl"], "odd.jsonl: lacks all 12 prompts"),
    (["one", "two", "--prompts", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
    (["one", "two", "--preference", ""], "--preference must be given"),
    (["one", "two", "--preference", "./nowhere"], "nowhere: holds no preference model"),
    (["one", "two", "--preference", "tests.test_evaluate:nobody"], "nobody"),
    (["one", "two", "--samples", "0"], "samples must be at least 1, got 0"),
    (["one", "two", "--max-new-tokens", "0"], "max_new_tokens must be at least 1"),
    (["one", "two", "--temperature", "nan"], "temperature must be above 0"),
    (["one", "two", "--seed", str(2**63)], "seed must be a 64-bit integer"),
    (["one", "two", "--device", "cuda:99"], "cuda:99"),
    (["one", "two", "--dtype", "int8"], "dtype must be one of"),
    (["one", "two", "--output", "words.txt"], "words.txt is not empty"),
    (["one", "broken", "--prompts", "prompts.jsonl"], "broken"),
]


@pytest.mark.parametrize(("wrong", "message"), BAD, ids=[" ".join(w)[:60] for w, _ in BAD])
def test_bad_input_ends_in_one_line_and_status_2(
    folder, tmp_path, monkeypatch, capsys, wrong, message
):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for name in ("one", "two", "prompts.jsonl"):
        (tmp_path / "here" / name).symlink_to(folder / name)
    (tmp_path / "here" / "empty").mkdir()
    (tmp_path / "here" / "words.txt").write_text("words")
    completions(tmp_path / "here" / "even.jsonl", "w2")
    completions(tmp_path / "here" / "half.jsonl", "w2", 6)
    write(tmp_path / "here" / "odd.jsonl", [{"prompt": "w49", "completion": "w3"}])
    (tmp_path / "here" / "broken").mkdir()
    (tmp_path / "here" / "broken" / "config.json").write_text("{")
    if "onn" in wrong:
        wrong = ["one", "./onn"]
    line = bad(capsys, *wrong)
    assert message in line
    assert not (tmp_path / "here" / "evaluation" / "evaluation.json").exists()


def test_a_name_that_is_nowhere_is_answered_with_the_nearest_and_leaves_nothing(
    folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-model").symlink_to(folder / "one")
    completions(tmp_path / "a.jsonl", "w2")

    def not_on_the_hub(path, *args, **kwargs):
        raise ValueError(f"{path}: the model cannot be loaded: not found")

    monkeypatch.setattr(policy, "load_model", not_on_the_hub)
    line = bad(capsys, "a.jsonl", "my-modle", "--output", "out")
    assert line.endswith("my-modle: the model cannot be loaded: not found; do you mean my-model?")
    assert not (tmp_path / "out").exists()


def test_what_is_in_the_output_folder_stays(folder, tmp_path, capsys):
    for name, word in (("a", "w2"), ("b", "w3")):
        completions(tmp_path / f"{name}.jsonl", word)
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl", "--output", tmp_path / "out"]
    run(*files)
    before = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert "is not empty: choose another --output" in bad(capsys, *files)
    assert {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()} == before
