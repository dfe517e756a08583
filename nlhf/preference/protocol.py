"""What a preference is, and the look at its every answer."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor


class Preference(Protocol):
    """Anything that compares B pairs of texts."""

    def __call__(self, prompts: list[str], first: list[str], second: list[str]) -> Tensor:
        """P(first > second | prompt): (B,) float32 in [0, 1]."""
        ...


class Unusable(ValueError):
    """An answer that is no probability: of this time, not of the settings."""


class Checked:
    """A preference whose every answer is looked at: B finite probabilities, else ValueError.

    ``Unusable``, which is one, for numbers that are no probabilities.
    """

    def __init__(self, preference: Callable) -> None:
        self.preference = preference

    def __call__(self, prompts: list[str], first: list[str], second: list[str]) -> Tensor:
        """As `Preference`; the callable may return a list, an array or a tensor."""
        check_texts(prompts, first, second)
        answer = self.preference(prompts, first, second)
        try:
            p = torch.as_tensor(answer)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"preference: must return {len(first)} numbers: {first_line(error)}"
            ) from error
        p = p.detach().to("cpu", torch.float32)
        if p.shape != (len(first),):
            raise ValueError(f"preference: must return ({len(first)},), got {tuple(p.shape)}")
        # written so that NaN counts as wrong
        wrong = (~((p >= 0) & (p <= 1))).nonzero()[:, 0]
        if len(wrong):
            i = int(wrong[0])
            raise Unusable(
                f"preference: must be a probability in [0, 1], got {p[i].item()} at index {i}"
            )
        return p


def check_texts(prompts: list[str], first: list[str], second: list[str]) -> None:
    """ValueError unless these are three lists of strings, as long as each other."""
    sizes = (len(prompts), len(first), len(second))
    if len(set(sizes)) != 1:
        raise ValueError(f"preference: prompts, first and second must have one length, got {sizes}")
    for name, texts in (("prompts", prompts), ("first", first), ("second", second)):
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise ValueError(
                    f"preference: {name} must be strings, got {type(text).__name__} at index {i}; "
                    "messages become strings through nlhf.data.plain_text"
                )


def first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
