"""Win rates, cycles and the equilibrium over models: by hand, by brute force, and end to end."""

import itertools
import json
import math
import weakref

import pytest
import torch

from nlhf import arena, cli, evaluate, policy, preference
from nlhf.commands import evaluate as command
from tests import tiny

BEATS = {"rock": "scissors", "paper": "rock", "scissors": "paper"}


def cyclic(prompts, first, second):
    """A judge for the tests: the game that the first words play, with a bonus for standing first.

    What it says depends on the prompt too: a number of words that is even weakens it.
    """
    wins = []
    for prompt, a, b in zip(prompts, first, second, strict=True):
        strength = 0.25 if len(prompt.split()) % 2 == 0 else 0.375
        sign = (BEATS.get(a) == b) - (BEATS.get(b) == a)
        wins.append(0.5 + strength * sign + 0.0625)
    return wins


def shares(prompts, first, second):
    """The answer with the larger share of even words wins more often."""

    def even(text):
        words = text.split()
        return sum(int(w[1:]) % 2 == 0 for w in words) / max(len(words), 1)

    return [0.5 + 0.4 * (even(a) - even(b)) for a, b in zip(first, second, strict=True)]


def hands(count: int, prompts: list[str] | None = None, names=tuple(BEATS)) -> arena.Wins:
    prompts = prompts or [f"p{i}" for i in range(count)]
    return arena.win_matrix(cyclic, prompts, {name: [name] * count for name in names})


def random_wins(K: int, N: int, seed: int = 0) -> arena.Wins:
    generator = torch.Generator().manual_seed(seed)
    level = torch.rand(K, K, 1, generator=generator, dtype=torch.float64)
    x = (0.5 * level + 0.5 * torch.rand(K, K, N, generator=generator, dtype=torch.float64)).numpy()
    wins = torch.full((K, K, N), 0.5, dtype=torch.float64)
    for i, j in itertools.combinations(range(K), 2):
        wins[i, j] = torch.from_numpy(x[i, j])
        wins[j, i] = 1 - wins[i, j]
    return arena.Wins([f"m{i}" for i in range(K)], wins)


# ---- the table


def test_both_orders_are_asked_and_the_bonus_of_the_first_place_cancels():
    wins = hands(4, ["a", "a b", "a", "a b"])
    rock, paper, scissors = wins.per_prompt
    assert rock[1].tolist() == [0.125, 0.25, 0.125, 0.25]
    assert rock[2].tolist() == [0.875, 0.75, 0.875, 0.75]
    assert paper[2].tolist() == [0.125, 0.25, 0.125, 0.25]
    assert scissors[0].tolist() == [0.125, 0.25, 0.125, 0.25]
    assert wins.position_bias == (0.0625, 0)
    assert wins.matrix[0].tolist() == [0.5, 0.1875, 0.8125]
    assert wins.mean == [(0.5, 0)] * 3


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_the_table_is_exactly_antisymmetric(batch_size):
    generator = torch.Generator().manual_seed(0)

    def noise(prompts, first, second):
        assert 0 < len(prompts) <= batch_size
        return torch.rand(len(prompts), generator=generator)

    texts = {name: list(name * 7) for name in "abcde"}
    wins = arena.win_matrix(noise, ["p"] * 7, texts, batch_size=batch_size)
    ones = torch.ones(5, 5, 7, dtype=torch.float64)
    assert torch.equal(wins.per_prompt + wins.per_prompt.transpose(0, 1), ones)
    assert torch.equal(wins.matrix + wins.matrix.T, ones[..., 0])
    assert torch.equal(wins.matrix.diagonal(), torch.full((5,), 0.5, dtype=torch.float64))
    assert torch.equal(wins.half, wins.half.T)


def test_intervals_are_those_of_the_differences_on_the_same_prompts():
    wins = random_wins(4, 9)
    for i, j in itertools.permutations(range(4), 2):
        mean, half = evaluate.estimate(wins.per_prompt[i, j])
        assert wins.matrix[i, j] == pytest.approx(mean, abs=1e-15)
        assert wins.half[i, j] == pytest.approx(half, abs=1e-15)
    for i in range(4):
        rates = torch.stack([wins.per_prompt[i, j] for j in range(4) if j != i]).mean(0)
        assert wins.mean[i] == pytest.approx(evaluate.estimate(rates), abs=1e-14)


def trained(kind) -> preference.PreferenceModel:
    model = kind(tiny.llama(dtype=torch.float32), tiny.tokenizer(), template=TEMPLATES[kind])
    torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(1))
    return model


TEMPLATES = {
    preference.PairwiseModel: "{prompt} {first} w1 {second}",
    preference.RewardModel: "{prompt} {response}",
}


@pytest.mark.parametrize("kind", TEMPLATES)
def test_our_own_models_are_asked_in_one_order(kind):
    model, asked = trained(kind), []

    def counted(prompts, first, second):
        asked.append(len(prompts))
        return model(prompts, first, second)

    prompts = [f"w{i}" for i in range(5)]
    texts = {name: [f"{name} w{i}" for i in range(5)] for name in ("w6", "w7", "w8")}
    for judge in (model, preference.Checked(model), preference.JoinPrompt(model, "w1")):
        assert arena.is_antisymmetric(judge)
    assert not arena.is_antisymmetric(counted)
    own = arena.win_matrix(model, prompts, texts)
    other = arena.win_matrix(counted, prompts, texts)
    assert sum(asked) == 2 * 3 * 5
    assert own.position_bias is None
    assert other.position_bias == (0, 0)
    torch.testing.assert_close(own.per_prompt, other.per_prompt, rtol=0, atol=1e-7)
    assert own.per_prompt[0, 1].std() > 0.001


@pytest.mark.parametrize(
    ("prompts", "texts", "words"),
    [
        (["p"], {"a": ["x"]}, "needs two models"),
        ([], {"a": [], "b": []}, "one prompt at least"),
        (["p"], {"a": ["x"], "b": ["x", "y"]}, "b has 2 completions, for 1 prompts"),
    ],
)
def test_bad_tables(prompts, texts, words):
    with pytest.raises(ValueError, match=words):
        arena.win_matrix(cyclic, prompts, texts)


def test_answers_that_are_no_probabilities_are_refused():
    with pytest.raises(ValueError, match=r"probability in \[0, 1\], got 1\.5"):
        arena.win_matrix(lambda *texts: [1.5], ["p"], {"a": ["x"], "b": ["y"]})


# ---- cycles


@pytest.mark.parametrize("seed", range(5))
def test_triples_are_those_of_brute_force(seed):
    wins = random_wins(7, 5, seed)
    matrix, half = wins.matrix, wins.half
    expected = {}
    for a, b, c in itertools.permutations(range(7), 3):
        if matrix[a, b] > 0.5 and matrix[b, c] > 0.5 and matrix[c, a] > 0.5 and a < min(b, c):
            low = min(matrix[x] - half[x] for x in ((a, b), (b, c), (c, a)))
            expected[a, b, c] = bool(low > 0.5)
    found = arena.intransitive_triples(matrix, half)
    assert {triple.models: triple.certain for triple in found} == expected
    assert len(found) == len(expected) > 0
    for triple in found:
        a, b, c = triple.models
        assert triple.wins == (matrix[a, b], matrix[b, c], matrix[c, a])
    order = [(not triple.certain, -min(triple.wins)) for triple in found]
    assert order == sorted(order)


def test_a_tie_is_no_cycle_and_one_wide_interval_makes_noise():
    matrix = torch.tensor([[0.5, 0.7, 0.3], [0.3, 0.5, 0.6], [0.7, 0.4, 0.5]]).double()
    half = torch.full((3, 3), 0.09)
    (triple,) = arena.intransitive_triples(matrix, half)
    assert triple.models == (0, 1, 2)
    assert triple.certain
    half[1, 2] = 0.11
    assert not arena.intransitive_triples(matrix, half)[0].certain
    half[1, 2] = math.nan
    assert not arena.intransitive_triples(matrix, half)[0].certain
    matrix[1, 2] = matrix[2, 1] = 0.5
    assert arena.intransitive_triples(matrix, half) == []


# ---- the equilibrium


@pytest.mark.parametrize("tau", [0.01, 0.1, 1.0])
def test_the_equilibrium_of_two_models_in_closed_form(tau):
    wins = random_wins(2, 6)
    found = arena.equilibrium(wins, tau=tau, resamples=20)
    p = wins.matrix[0, 1].item()
    # both win or lose p - 1/2 against any mixture of the two
    weight = 1 / (1 + math.exp(-(p - 0.5) / tau))
    assert found.weights == pytest.approx([weight, 1 - weight], rel=1e-9)
    assert found.exploitability == pytest.approx([max(0, 0.5 - p), max(0, p - 0.5)])
    loss = max(0.5 * weight + (1 - weight) * p, weight * (1 - p) + (1 - weight) * 0.5) - 0.5
    assert found.exploitability_mixture == pytest.approx(loss)


def test_hands_are_played_alike():
    found = arena.equilibrium(hands(6, ["a"] * 3 + ["a b"] * 3), resamples=50)
    assert found.weights == pytest.approx([1 / 3] * 3)
    assert found.low == pytest.approx([1 / 3] * 3)
    assert found.exploitability == pytest.approx([0.3125] * 3)
    assert found.exploitability_mixture == pytest.approx(0, abs=1e-12)


def test_in_the_table_of_the_paper_the_first_mixture_is_played():
    # Munos et al. 2023, table 1 without its EMA columns; there the column is preferred to the row
    names = ["SFT", "RLHF", "SP", "MD1", "MD2", "MD3", "MD4", "MD5", "MD6", "BR"]
    rows = """
        .500 .990 .983 .982 .989 .987 .985 .982 .965 .943
        .010 .500 .489 .598 .519 .561 .501 .436 .284 .148
        .017 .511 .500 .592 .504 .545 .499 .451 .310 .211
        .018 .402 .408 .500 .425 .470 .369 .362 .238 .163
        .011 .481 .496 .575 .500 .513 .491 .434 .298 .196
        .013 .439 .455 .530 .487 .500 .484 .408 .273 .187
        .015 .499 .501 .631 .509 .516 .500 .428 .265 .161
        .018 .564 .549 .638 .566 .592 .572 .500 .329 .210
        .035 .716 .690 .762 .702 .727 .735 .671 .500 .342
        .057 .852 .789 .837 .804 .813 .839 .790 .658 .500
    """
    table = [[float(x) for x in row.split()] for row in rows.strip().split("\n")]
    wins = arena.Wins(names, torch.tensor(table, dtype=torch.float64).T[..., None])
    found = arena.equilibrium(wins)
    best = names.index("MD1")
    assert found.weights[best] > 0.9
    assert found.exploitability[best] == 0
    assert all(x > 0 for i, x in enumerate(found.exploitability) if i != best)
    assert all(math.isnan(x) for x in (*found.low, *found.high))
    cycles = arena.intransitive_triples(wins.matrix, wins.half)
    named = [tuple(names[i] for i in triple.models) for triple in cycles]
    # .511, .501 and .501
    assert ("RLHF", "SP", "MD4") in named
    assert not any(triple.certain for triple in cycles)


def test_intervals_of_the_weights_are_a_bootstrap_over_prompts():
    wins = random_wins(2, 30)
    found = arena.equilibrium(wins, tau=0.1, resamples=2000)
    generator = torch.Generator().manual_seed(7)
    draws = torch.randint(30, (2000, 30), generator=generator)
    p = wins.per_prompt[0, 1][draws].mean(-1)
    weights = torch.sigmoid((p - 0.5) / 0.1)
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    low, high = weights.quantile(ends).tolist()
    assert found.low[0] == pytest.approx(low, abs=0.02)
    assert found.high[0] == pytest.approx(high, abs=0.02)
    assert found.low[0] < found.weights[0] < found.high[0]
    assert found.high[1] == pytest.approx(1 - found.low[0])
    assert arena.equilibrium(wins, tau=0.1, resamples=2000) == found
    assert arena.equilibrium(wins, tau=0.1, resamples=2000, seed=1) != found


# ---- the report


def test_the_report_says_what_was_found():
    wins = hands(40)
    triples = arena.intransitive_triples(wins.matrix, wins.half)
    text = arena.report(wins, triples, arena.equilibrium(wins, resamples=20))
    assert "| **rock** |  | **0.125 ± 0.000** | **0.875 ± 0.000** |" in text
    assert "- rock > scissors > paper > rock (0.875, 0.875, 0.875): certain at 95 %" in text
    assert "tau = 0.01" in text
    assert "preferred with 0.562 ± 0.000" in text
    assert "| paper | 0.500 ± 0.000 | 0.333 | 0.333 to 0.333 | 0.375 |" in text
    assert "rough" not in text


def test_the_report_admits_noise_and_few_prompts():
    wins = random_wins(3, 4, seed=0)
    centre = wins.per_prompt - wins.matrix[..., None]
    cycle = torch.tensor([[0.5, 0.51, 0.49], [0.49, 0.5, 0.51], [0.51, 0.49, 0.5]]).double()
    wins = arena.Wins(["a|b", "c", "d"], cycle[..., None] + centre)
    triples = arena.intransitive_triples(wins.matrix, wins.half)
    text = arena.report(wins, triples, arena.equilibrium(wins, resamples=20))
    assert "- a\\|b > c > d > a\\|b (0.510, 0.510, 0.510): within noise" in text
    assert "**0.5" not in text
    assert "With 4 prompts these intervals are rough" in text
    assert "antisymmetric by construction" in text


def test_one_prompt_has_no_intervals():
    wins = hands(1)
    triples = arena.intransitive_triples(wins.matrix, wins.half)
    balance = arena.equilibrium(wins)
    text = arena.report(wins, triples, balance)
    assert "nan" not in text
    assert "On 1 prompts" not in text
    assert "within noise" in text
    assert "NaN" not in json.dumps(arena.as_dict(wins, triples, balance))


# ---- end to end


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
    judge = "tests.test_arena:shares"
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
    (["one", "two", "--preference", "tests.test_arena:nobody"], "nobody"),
    (["one", "two", "--samples", "0"], "--samples must be at least 1, got 0"),
    (["one", "two", "--max-new-tokens", "0"], "--max-new-tokens must be at least 1"),
    (["one", "two", "--temperature", "nan"], "--temperature must be above 0"),
    (["one", "two", "--seed", str(2**63)], "--seed must be a 64-bit integer"),
    (["one", "two", "--device", "cuda:99"], "cuda:99"),
    (["one", "two", "--dtype", "int8"], "invalid choice"),
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


def test_what_is_in_the_output_folder_stays(folder, tmp_path, capsys):
    for name, word in (("a", "w2"), ("b", "w3")):
        completions(tmp_path / f"{name}.jsonl", word)
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl", "--output", tmp_path / "out"]
    run(*files)
    before = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert "is not empty: choose another --output" in bad(capsys, *files)
    assert {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()} == before
