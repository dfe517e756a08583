"""Games over short token sequences: every response is listed, every preference known exactly.

Legend: V words, T the longest response, X prompts, S = 1 + V + ... + V^T responses.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nlhf.names import nearest

WORDS = ("ash", "birch", "cedar", "dogwood", "elm")
END = "</s>"
# the dice of Munos et al. 2023, C.1, which beat each other in a cycle, and two more of mean 5
FACES = ((2, 4, 9), (1, 6, 8), (3, 5, 7), (2, 6, 7), (3, 4, 8))
# what each of three types of annotators gives a word: C.2, and the first word's turned around
SCORES = ((2, 4, 9), (1, 6, 8), (3, 5, 7), (9, 2, 4), (4, 9, 2))
RULES = ("mean", "highest", "sum", "last", "lowest")


@dataclass(frozen=True, eq=False)
class SequenceGame:
    """A preference over all sequences of at most ``length`` words, the empty one among them.

    A response ends with the end token, or is cut at ``length`` words, as a rollout with
    ``max_new_tokens = length`` is. ``matrices`` (X, S, S) float64: P(row > column | prompt);
    ``demonstrations`` (X, S) float64: log-probabilities of what a reference is fitted to, neither
    uniform nor deterministic. Called on texts, a game is a ``Preference``: the true one.
    """

    name: str
    words: tuple[str, ...]
    length: int
    prompts: list[str]
    matrices: Tensor
    demonstrations: Tensor

    @functools.cached_property
    def sequences(self) -> list[tuple[int, ...]]:
        """The S responses as indices of words: by length, then in the order of counting."""
        return sequences(len(self.words), self.length)

    @functools.cached_property
    def responses(self) -> list[str]:
        """The S responses as texts."""
        return [" ".join(self.words[w] for w in words) for words in self.sequences]

    @functools.cached_property
    def _places(self) -> tuple[dict[str, int], dict[str, int]]:
        prompts = {prompt: i for i, prompt in enumerate(self.prompts)}
        return prompts, {response: i for i, response in enumerate(self.responses)}

    def matrix(self, prompt: str) -> Tensor:
        """(S, S) float64: P(row > column | prompt)."""
        return self.matrices[self._index(0, prompt)]

    def __call__(self, prompts: list[str], first: list[str], second: list[str]) -> Tensor:
        """P(first > second | prompt): (B,) float32; ValueError for a text that is not listed."""
        x = [self._index(0, prompt) for prompt in prompts]
        y, z = ([self._index(1, text) for text in texts] for texts in (first, second))
        return self.matrices[x, y, z].float()

    def _index(self, kind: int, text: str) -> int:
        place = self._places[kind].get(text)
        if place is None:
            what = ("a prompt", "a response")[kind]
            raise ValueError(f"game {self.name}: {text!r} is not {what} of this game")
        return place

    def tokenizer(self):
        """Word level: word i is token i, and one more token ends and pads; no token is unknown."""
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        ids = {word: i for i, word in enumerate((*self.words, END))}
        inner = Tokenizer(models.WordLevel(ids, unk_token=END))
        inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        return PreTrainedTokenizerFast(
            tokenizer_object=inner, eos_token=END, pad_token=END, padding_side="left"
        )


def sequences(words: int, length: int) -> list[tuple[int, ...]]:
    """All tuples of at most ``length`` of ``words`` indices: by length, then by counting."""
    lengths = range(length + 1)
    return [s for t in lengths for s in itertools.product(range(words), repeat=t)]


def make(name: str, *, words: int = 5, length: int = 3) -> SequenceGame:
    """A game by name, with one prompt a word.

    Args:
        name: one of ``GAMES``; what each of them is stands in its function.
        words: V, from 2 to 5.
        length: T, from 1 to 5; there are (V^(T+1) - 1) / (V - 1) responses.

    Raises:
        ValueError: an unknown name, or a size out of range.
    """
    if name not in GAMES:
        hint = nearest(name, GAMES) or f"; there are {', '.join(GAMES)}"
        raise ValueError(f"game: no game is called {name!r}{hint}")
    for what, value, low in (("words", words, 2), ("length", length, 1)):
        if not isinstance(value, int) or not low <= value <= 5:
            raise ValueError(f"game {name}: {what} must be from {low} to 5, got {value!r}")
    listed = sequences(words, length)
    matrices = torch.stack([GAMES[name](listed, prompt) for prompt in range(words)])
    demonstrations = torch.stack([_demonstrations(listed, prompt) for prompt in range(words)])
    chosen = WORDS[:words]
    return SequenceGame(name, chosen, length, list(chosen), matrices, demonstrations)


# ---- the preferences: (S, S) from the sequences and the index of the prompt


def dice(listed: Sequence[tuple[int, ...]], prompt: int) -> Tensor:
    """Each word is a die, a response throws its dice, and the higher number wins; ties are halved.

    The non-transitive dice of Munos et al. 2023, C.1, and two more. The prompt is the rule that
    makes one number of the throws: their mean, the highest, the sum, the last or the lowest. No
    die at all throws 1 to 9 fairly. One die against one is the paper's case: each of the first
    three beats the next with 5/9.
    """
    # twelve or sixty times a mean is whole, so equal numbers are equal
    unit = math.lcm(*range(1, max(map(len, listed)) + 1))
    number: Callable = {
        "mean": lambda throws: sum(throws) * unit // len(throws),
        "highest": lambda throws: max(throws) * unit,
        "sum": lambda throws: sum(throws) * unit,
        "last": lambda throws: throws[-1] * unit,
        "lowest": lambda throws: min(throws) * unit,
    }[RULES[prompt]]
    longest = max(map(len, listed))
    # of a common number of throws, so that whole numbers are counted and nothing is rounded
    total = 3 ** max(longest, 2)
    counts = torch.zeros(len(listed), 9 * longest * unit + 1, dtype=torch.float64)
    for row, words in enumerate(listed):
        throws = itertools.product(*(FACES[w] for w in words)) if words else zip(range(1, 10))
        values = torch.tensor([number(throw) for throw in throws])
        counts[row] = torch.bincount(values, minlength=counts.shape[1]) * (total // len(values))
    # the columns that nothing throws cost time alone
    counts = counts[:, counts.any(0)]
    below = counts.cumsum(1) - counts
    return _antisymmetric(counts @ below.T / total**2)


def population(listed: Sequence[tuple[int, ...]], prompt: int) -> Tensor:
    """Each annotator is transitive and the population is not (Munos et al. 2023, C.2).

    Three types of annotators give a word one of its three ``SCORES`` each, a response the mean of
    its words, each word with half of the weight of the one before it, and nothing 5. A type prefers
    the higher score. The first prompt is read by a third of each type, as in the paper:
    responses of one word beat each other with 2/3 in cycles. The next three have a type each that
    reads them more than the others do (0.4, 0.3 and 0.3), the fifth one that reads it less (0.2,
    0.4 and 0.4).
    """
    scores = torch.full((len(listed), 3), 5.0, dtype=torch.float64)
    for row, words in enumerate(listed):
        if words:
            weights = torch.tensor([0.5**t for t in range(len(words))], dtype=torch.float64)
            given = torch.tensor([SCORES[w] for w in words], dtype=torch.float64)
            scores[row] = weights @ given / weights.sum()
    shares = [(1 / 3, 1 / 3, 1 / 3), (0.4, 0.3, 0.3), (0.3, 0.4, 0.3), (0.3, 0.3, 0.4)]
    readers = torch.tensor([*shares, (0.2, 0.4, 0.4)][prompt], dtype=torch.float64)
    # scores that are equal by hand may differ in the last bit
    wins = (scores[:, None] - scores[None] > 1e-9).double() @ readers
    return _antisymmetric(wins)


def reward(listed: Sequence[tuple[int, ...]], prompt: int) -> Tensor:
    """A transitive preference: Bradley-Terry on a score of words and pairs of words.

    The first word is paired with the prompt. Scores are standard normal for a word, and half as
    large for a pair, drawn once.
    """
    score = _ngram_scores(listed, prompt, seed=7, word=1.0, pair=0.5)
    return _antisymmetric(torch.sigmoid(score[:, None] - score[None]))


def mixed(listed: Sequence[tuple[int, ...]], prompt: int) -> Tensor:
    """Annotators of ``reward``, and a share of ``population`` that grows with the prompt.

    The share is 1/(V + 1) for the first prompt and V/(V + 1) for the last.
    """
    V = sum(len(words) == 1 for words in listed)
    cyclic = (prompt + 1) / (V + 1)
    return cyclic * population(listed, prompt) + (1 - cyclic) * reward(listed, prompt)


def _antisymmetric(wins: Tensor) -> Tensor:
    """P from W(i, j), the probability that i wins outright: what remains is halved."""
    return (1 + wins - wins.T) / 2


def _demonstrations(listed: Sequence[tuple[int, ...]], prompt: int) -> Tensor:
    scores = _ngram_scores(listed, prompt, seed=11, word=0.5, pair=0.5)
    # as likely to end as to take any one of the words, lest long responses be all there is
    lengths = torch.tensor([len(words) for words in listed])
    V = sum(len(words) == 1 for words in listed)
    return torch.log_softmax(scores - lengths * math.log(V), -1)


def _ngram_scores(listed, prompt: int, seed: int, word: float, pair: float) -> Tensor:
    """(S,) sum over a response of a score a word and one a pair of neighbours."""
    generator = torch.Generator().manual_seed(seed)
    n = len(WORDS)
    one = word * torch.randn(n, generator=generator, dtype=torch.float64)
    two = pair * torch.randn(n, n, generator=generator, dtype=torch.float64)
    totals = []
    for words in listed:
        neighbours = itertools.pairwise((prompt, *words))
        totals.append(sum(one[w] for w in words) + sum(two[a, b] for a, b in neighbours))
    return torch.tensor(totals, dtype=torch.float64)


GAMES: dict[str, Callable] = {
    "dice": dice,
    "population": population,
    "reward": reward,
    "mixed": mixed,
}
