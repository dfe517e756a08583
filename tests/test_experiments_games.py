"""Sequence games, and exact log-probabilities of small transformers over them."""

import itertools
import math

import pytest
import torch

from nlhf import rollout
from nlhf.experiments import games, training


@pytest.fixture(autouse=True)
def one_thread():
    with training.one_thread():
        yield


@pytest.fixture(scope="module")
def small():
    """Three words, at most two of them: 13 responses."""
    return games.make("mixed", words=3, length=2)


@pytest.fixture(scope="module")
def models(small):
    return [training.transformer(small, seed, "tiny", std=0.4) for seed in (0, 1)]


@pytest.mark.parametrize("name", games.GAMES)
@pytest.mark.parametrize(("words", "length"), [(2, 1), (3, 3), (5, 2)])
def test_every_game_is_antisymmetric_and_depends_on_its_prompt(name, words, length):
    game = games.make(name, words=words, length=length)
    S = sum(words**t for t in range(length + 1))
    assert game.matrices.shape == (words, S, S)
    assert game.matrices.dtype == torch.float64
    assert ((game.matrices >= 0) & (game.matrices <= 1)).all()
    assert (game.matrices + game.matrices.mT - 1).abs().max() < 1e-15
    assert (game.matrices.diagonal(dim1=1, dim2=2) == 0.5).all()
    for i, j in itertools.combinations(range(words), 2):
        # dice of one throw have one rule alone
        assert (name, length) == ("dice", 1) or (game.matrices[i] != game.matrices[j]).any()


@pytest.mark.parametrize("name", games.GAMES)
def test_the_callable_is_the_matrix_on_all_pairs(name):
    game = games.make(name, words=3, length=2)
    assert len(set(game.responses)) == len(game.responses) == 13
    for prompt in game.prompts:
        pairs = list(itertools.product(game.responses, repeat=2))
        first, second = zip(*pairs, strict=True)
        answers = game([prompt] * len(pairs), list(first), list(second))
        assert answers.dtype == torch.float32
        assert torch.equal(answers.view(13, 13), game.matrix(prompt).float())


def by_hand(first, second, number):
    """P(number of one's throws > the other's), ties halved, by listing all the throws."""
    faces = [[games.FACES[w] for w in words] for words in (first, second)]
    outcomes = list(itertools.product(*(itertools.product(*dice) for dice in faces)))
    points = [(number(a) > number(b)) + (number(a) == number(b)) / 2 for a, b in outcomes]
    return sum(points) / len(points)


def test_dice_beat_each_other_in_a_cycle_with_five_ninths():
    game = games.make("dice", length=1)
    for matrix in game.matrices:
        for i in range(3):
            assert matrix[1 + i, 1 + (i + 1) % 3] == pytest.approx(5 / 9, abs=1e-15)


@pytest.mark.parametrize(
    ("rule", "number"),
    [
        ("mean", lambda t: sum(t) / len(t)),
        ("highest", max),
        ("sum", sum),
        ("last", lambda t: t[-1]),
        ("lowest", min),
    ],
)
def test_dice_are_what_listing_all_throws_gives(rule, number):
    game = games.make("dice")
    matrix = game.matrices[games.RULES.index(rule)]
    for first, second in [((0,), (1, 2)), ((3, 0), (4, 4)), ((0, 1, 2), (2, 3)), ((1, 1, 1), (2,))]:
        i, j = game.sequences.index(first), game.sequences.index(second)
        assert matrix[i, j] == pytest.approx(by_hand(first, second, number), abs=1e-14)
    # nothing throws 1 to 9: a die of 2, 4 and 9 has 1, 3 and 8 numbers below it, and one equal each
    assert matrix[1, 0] == pytest.approx((1.5 + 3.5 + 8.5) / 27, abs=1e-15)


def test_the_population_is_cyclic_though_no_annotator_is():
    game = games.make("population")
    first, second = game.matrices[0], game.matrices[1]
    for i in range(3):
        assert first[1 + i, 1 + (i + 1) % 3] == pytest.approx(2 / 3)
    # types 1 and 3 prefer the first word to the second, types 1 and 2 the second to the third
    assert second[1, 2] == pytest.approx(0.4 + 0.3)
    assert second[2, 3] == pytest.approx(0.6)
    # the mean of (2, 4, 9) and half of (1, 6, 8): 5/3, 14/3 and 26/3, against nothing's 5
    assert first[game.sequences.index((0, 1)), 0] == pytest.approx(1 / 3)
    # of (2, 4, 9) and (1, 6, 8): (5, 14, 26) against (4, 16, 25)
    i, j = game.sequences.index((0, 1)), game.sequences.index((1, 0))
    assert first[i, j] == pytest.approx(2 / 3)


def test_the_reward_game_is_transitive_and_the_population_is_not():
    def cycles(matrix):
        beats = (matrix > 0.5 + 1e-12).double()
        return (beats @ beats @ beats).trace().item()

    assert all(cycles(m) == 0 for m in games.make("reward", words=3).matrices)
    assert all(cycles(m) > 0 for m in games.make("population", words=3).matrices)
    logits = games.make("reward", words=3).matrices[1].logit()
    # Bradley-Terry: log-odds add up
    assert torch.allclose(logits[2, 5] + logits[5, 9], logits[2, 9], atol=1e-10)


def test_mixed_is_the_share_that_it_says():
    parts = [games.make(name, words=3, length=2) for name in ("mixed", "population", "reward")]
    mixed, population, reward = (game.matrices for game in parts)
    for prompt, share in enumerate((0.25, 0.5, 0.75)):
        wanted = share * population[prompt] + (1 - share) * reward[prompt]
        assert torch.allclose(mixed[prompt], wanted, atol=1e-15)


@pytest.mark.parametrize("name", games.GAMES)
def test_demonstrations_are_neither_uniform_nor_deterministic(name):
    game = games.make(name)
    p = game.demonstrations.exp()
    assert torch.allclose(p.sum(-1), torch.ones(5, dtype=torch.float64))
    entropy = -(p * game.demonstrations).sum(-1)
    assert (entropy < 0.95 * math.log(p.shape[1])).all()
    assert (entropy > 2).all()


def test_the_tokenizer_knows_words_and_the_end_alone(small):
    tokenizer = small.tokenizer()
    assert len(tokenizer) == 4
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == 3
    for words, text in zip(small.sequences, small.responses, strict=True):
        assert tokenizer(text)["input_ids"] == list(words)
        ended = [*words, 3]
        assert tokenizer.decode(ended, skip_special_tokens=True) == text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "dise"}, "do you mean dice?"),
        ({"name": "dice", "words": 6}, "words must be from 2 to 5, got 6"),
        ({"name": "dice", "length": 0}, "length must be from 1 to 5, got 0"),
    ],
)
def test_a_wrong_game_is_named(arguments, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        games.make(**arguments)


def test_a_text_that_is_not_in_the_game_is_named(small):
    with pytest.raises(ValueError, match="'oak' is not a response"):
        small(["ash"], ["oak"], ["ash"])


# ---- exact log-probabilities


@pytest.mark.parametrize("length", [1, 2, 3])
def test_join_and_split_are_inverse(length):
    generator = torch.Generator().manual_seed(length)
    S = len(games.sequences(3, length))
    logits = torch.randn(2, S, generator=generator, dtype=torch.float64)
    logprobs = logits.log_softmax(-1)
    tables = training.split(logprobs, 3, length)
    assert [t.shape for t in tables] == [(2, 3**t, 4) for t in range(length)]
    for table in tables:
        ones = torch.ones(2, table.shape[1], dtype=torch.float64)
        assert torch.allclose(table.exp().sum(-1), ones)
    assert torch.allclose(training.join(tables), logprobs, atol=1e-12)


@pytest.mark.parametrize("coef", [0.0, 0.3, 1.0])
def test_probabilities_of_all_responses_sum_to_one(small, models, coef):
    for prompt in small.prompts:
        p = training.sequence_logprobs(models[0], small, prompt, models[1], coef).exp()
        assert p.dtype == torch.float64
        assert p.sum().item() == pytest.approx(1, abs=1e-12)


def test_log_probabilities_are_those_of_the_model_token_by_token(small, models):
    end = 3
    for x, prompt in enumerate(small.prompts):
        found = training.sequence_logprobs(models[0], small, prompt)
        for words, logprob in zip(small.sequences, found, strict=True):
            tokens = [*words, end][: small.length]
            logits = models[0](torch.tensor([[x, *tokens]])).logits[0, : len(tokens)]
            picked = logits.double().log_softmax(-1)[range(len(tokens)), tokens]
            assert logprob.item() == pytest.approx(picked.sum().item(), abs=1e-5)


@pytest.mark.parametrize("coef", [0.0, 0.4])
def test_frequencies_of_a_rollout_follow_the_exact_probabilities(small, models, coef):
    n, prompt = 4000, small.prompts[1]
    ids = torch.tensor([small.tokenizer()(prompt)["input_ids"]])
    (drawn,) = rollout.generate(
        [rollout.Side(models[0], coef, n)],
        models[1],
        ids,
        torch.ones_like(ids),
        max_new_tokens=small.length,
        eos_token_id=3,
        pad_token_id=3,
        seed=5,
    )
    rows = zip(drawn.tokens.tolist(), drawn.mask.tolist(), strict=True)
    texts = [tuple(t for t, real in zip(*row, strict=True) if real and t != 3) for row in rows]
    counts = torch.tensor([texts.count(words) for words in small.sequences])
    assert counts.sum() == n
    p = training.sequence_logprobs(models[0], small, prompt, models[1], coef).exp()
    statistic = ((counts - n * p) ** 2 / (n * p)).sum().item()
    # 12 degrees of freedom: over 32.9 once in a thousand; the seed is fixed
    assert statistic < 32.9


def test_a_coefficient_needs_a_reference(small, models):
    with pytest.raises(ValueError, match="mixture_coef must be in"):
        training.sequence_logprobs(models[0], small, "ash", None, 0.5)


def test_the_reference_is_close_to_the_demonstrations_and_frozen(small):
    ref = training.reference(small, 0, "tiny")
    logprobs = training.policy_logprobs(ref, small)
    kl = (small.demonstrations.exp() * (small.demonstrations - logprobs)).sum(-1)
    assert kl.max() < 0.05
    assert not any(p.requires_grad for p in ref.parameters())


def test_training_moves_a_copy_towards_what_wins():
    game = games.make("reward", words=3, length=2)
    ref = training.reference(game, 0, "tiny", steps=100)
    before = training.policy_logprobs(ref, game)
    trained = training.train(game, ref, game, steps=40, tau=0.02, learning_rate=0.01)
    assert torch.equal(training.policy_logprobs(ref, game), before)
    after = training.policy_logprobs(trained.model, game).exp()
    wins = torch.einsum("xi,xij,xj->x", after, game.matrices, before.exp())
    assert wins.mean() > 0.6
    assert len(trained.metrics) == 40
