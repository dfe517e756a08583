"""The reward that a Bradley-Terry preference is made of."""

from collections.abc import Callable

from torch import Tensor

from nlhf.preference import Checked, JoinPrompt

Reward = Callable[[list[str], list[str]], Tensor]


def as_reward(preference: Callable) -> Reward:
    """r(prompts, responses) -> (B,) of a reward model, or of anything with a method ``reward``.

    Raises:
        ValueError: the preference is not made of a reward.
    """
    inner = preference.preference if isinstance(preference, Checked) else preference
    if isinstance(inner, JoinPrompt):
        joined, reward = inner, as_reward(inner.preference)

        def of_text(prompts: list[str], responses: list[str]) -> Tensor:
            texts = [p + y for p, y in zip(prompts, responses, strict=True)]
            return reward([joined.instruction] * len(prompts), texts)

        return of_text
    if not callable(getattr(inner, "reward", None)):
        raise ValueError(
            f"reward: {getattr(inner, '__name__', type(inner).__name__)} is a preference without a "
            "reward(prompts, responses); give a RewardModel (nlhf fit-preference --kind reward)"
        )
    return inner.reward
