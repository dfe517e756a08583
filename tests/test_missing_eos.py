"""The penalty for responses that do not end, read from their own tokens."""

import pytest
import torch

from nlhf import config, learner, parts
from nlhf.rollout import Completion, Pair
from tests.test_algorithms import reward
from tests.test_train import folder, settings  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread")

# the last tokens: ends, does not, ends with the other token, an end in the middle, none at all
TOKENS = torch.tensor([[5, 2, 0], [5, 6, 7], [9, 9, 30], [5, 2, 6], [2, 2, 2]])
MASK = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 1, 1], [1, 1, 1], [0, 0, 0]]).bool()
ENDED = torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0])


def made(folder, tmp_path, penalty, **changes):  # noqa: F811
    changes = {"missing_eos_penalty": penalty, "eval_prompts": "", "lora_r": 0} | changes
    pieces = parts.build(settings(folder, tmp_path / "run", **changes))
    pieces.policy.generation_config.eos_token_id = [2, 30]
    return learner.Learner(pieces)


def pair():
    """Prompts full of the tokens that end, which must not matter."""
    y = Completion(TOKENS, MASK)
    prompts = torch.full((5, 4), 2)
    return Pair(prompts, torch.ones_like(prompts), y, y.rows(torch.arange(4, -1, -1)))


def test_what_ended_is_read_from_the_responses_own_tokens(folder, tmp_path):  # noqa: F811
    learns = made(folder, tmp_path, 0.0)
    assert torch.equal(learns.ended(pair().y), ENDED)


def test_one_player_gets_what_the_other_pays(folder, tmp_path):  # noqa: F811
    learns = made(folder, tmp_path, 0.3)
    both = pair()
    swapped = Pair(both.input_ids, both.attention_mask, both.y_other, both.y)
    wins = torch.tensor([0.1, 0.9, 0.5, 0.7, 0.2])
    found, other = learns.penalised(wins, None, both, [])
    assert other is None
    torch.testing.assert_close(found, wins + 0.3 * (ENDED - ENDED.flip(0)))
    # P(y > y') + P(y' > y) = 1, whatever the penalty
    back, _ = learns.penalised(1 - wins, None, swapped, [])
    torch.testing.assert_close(found + back, torch.ones(5))
    assert made(folder, tmp_path, 0.0).penalised(wins, None, both, [])[0] is wins


def test_judged_pairs_pay_against_the_responses_of_the_opponent(folder, tmp_path):  # noqa: F811
    changes = {"algorithm": "egpo", "tau": 0.1, "opponent_samples": 2}
    learns = made(folder, tmp_path, 0.25, **changes)
    both = pair()
    against = both.y.rows(torch.tensor([0, 0, 0, 1, 1, 1, 2, 3, 4, 4]))
    wins, other = torch.full((5,), 0.5), torch.full((5,), 0.6)
    found = learns.penalised(wins, other, both, [against])
    share = torch.tensor([1.0, 0.5, 0.0, 0.5, 0.0])
    torch.testing.assert_close(found[0], wins + 0.25 * (ENDED - share))
    torch.testing.assert_close(found[1], other + 0.25 * (ENDED.flip(0) - share))
    # a loss of pairs takes probabilities
    far = made(folder, tmp_path, 10.0, **changes).penalised(wins, other, both, [against])
    assert far[0].tolist() == [0.5, 0.0, 1.0, 0.0, 0.5]
    torch.testing.assert_close(far[1], torch.tensor([0.0, 0.0, 1.0, 0.0, 1.0]))


def test_a_reward_pays_too(folder, tmp_path):  # noqa: F811
    judge = {"algorithm": "rlhf", "preference": "tests.test_algorithms:JUDGE"}
    learns = made(folder, tmp_path, 2.0, **judge)
    both = pair()
    wins = learns.prefer(learns.parts.prompts[:5], both, [])
    texts = [learns.parts.decode(x) for x in (both.y, both.y_other)]
    ends = (ENDED, ENDED.flip(0))
    paid = [reward([], x) - 2 * (1 - e) for x, e in zip(texts, ends, strict=True)]
    found, _ = learns.penalised(*wins, both, [])
    torch.testing.assert_close(found - 0.5, paid[0] - paid[1])


@pytest.mark.parametrize("name", ["nash_md_pg", "online_ipo", "rlhf"])
def test_training_learns_to_end(folder, tmp_path, name, monkeypatch):  # noqa: F811
    """Everything else in the preference is a constant, and few responses end at first."""
    monkeypatch.setattr("tests.test_train.prefer_even", indifferent)
    monkeypatch.setattr("nlhf.learner.as_reward", lambda _: nothing)
    changes = {"algorithm": name, "max_new_tokens": 3, "batch_size": 32, "learning_rate": 0.01}
    found = {}
    for penalty in (0.0, 0.5):
        learns = made(folder, tmp_path, penalty, steps=25, tau=0.02, **changes)
        steps = [learns.step(step) for step in range(25)]
        found[penalty] = [sum(s["ended"] for s in part) / 5 for part in (steps[:5], steps[-5:])]
        assert all(step["preference"] == pytest.approx(0.5) for step in steps)
    assert found[0.5][1] > found[0.5][0] + 0.3
    assert found[0.5][1] > found[0.0][1] + 0.3


def indifferent(prompts, first, second):
    return torch.full((len(first),), 0.5)


def nothing(prompts, responses):
    return torch.zeros(len(responses))


def test_the_penalty_is_at_least_0():
    with pytest.raises(ValueError, match="missing_eos_penalty must be at least 0 and finite, got"):
        config.from_dict({"missing_eos_penalty": -1.0}, "test")
