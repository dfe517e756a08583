"""The reward that a Bradley-Terry preference is made of."""

from collections.abc import Callable

import torch
from torch import Tensor

from nlhf.preference import Checked, JoinPrompt, Unusable

Reward = Callable[[list[str], list[str]], Tensor]


def as_reward(preference: Callable) -> Reward:
    """r(prompts, responses) -> (B,) float32 of a reward model, or of anything with ``reward``.

    Raises:
        ValueError: the preference is not made of a reward; later, its answer is not B numbers, or
            (``Unusable``) they are not finite.
    """
    found = _reward(preference.preference if isinstance(preference, Checked) else preference)

    def checked(prompts: list[str], responses: list[str]) -> Tensor:
        answer = torch.as_tensor(found(prompts, responses)).detach().to("cpu", torch.float32)
        if answer.shape != (len(responses),):
            got = tuple(answer.shape)
            raise ValueError(f"reward: must return ({len(responses)},) numbers, got {got}")
        wrong = (~answer.isfinite()).nonzero()[:, 0]
        if len(wrong):
            i = int(wrong[0])
            raise Unusable(f"reward: must be a finite number, got {answer[i].item()} at index {i}")
        return answer

    return checked


def _reward(preference: Callable) -> Callable:
    if isinstance(preference, JoinPrompt):
        inner = _reward(preference.preference)

        def of_text(prompts: list[str], responses: list[str]) -> Tensor:
            texts = [p + y for p, y in zip(prompts, responses, strict=True)]
            return inner([preference.instruction] * len(prompts), texts)

        return of_text
    if not callable(getattr(preference, "reward", None)):
        name = getattr(preference, "__name__", type(preference).__name__)
        raise ValueError(
            f"reward: {name} is a preference without a reward(prompts, responses); give a "
            "RewardModel (nlhf preference --kind reward)"
        )
    return preference.reward
