"""Win rates, cycles and the equilibrium over models: by hand and by brute force."""

import itertools
import json
import math

import pytest
import torch

from nlhf import arena, evaluate, preference
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
