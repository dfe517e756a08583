"""Preferences that are learned from votes on a game, as the tables that they amount to.

Legend: X prompts, S responses, N votes.
"""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nlhf.data import Preferences
from nlhf.experiments import training
from nlhf.experiments.games import END, SequenceGame
from nlhf.preference import PairwiseModel, PreferenceModel, RewardModel
from nlhf.preference_fit import fit

KINDS = ("pairwise", "reward")


@dataclass(frozen=True, eq=False)
class RewardTable:
    """A reward of every response, (X, S); as a preference, Bradley-Terry's of it."""

    game: SequenceGame
    rewards: Tensor

    def reward(self, prompts: list[str], responses: list[str]) -> Tensor:
        """(B,) float32."""
        rows = [self.game.prompts.index(prompt) for prompt in prompts]
        columns = [self.game.responses.index(response) for response in responses]
        return self.rewards[rows, columns].float()

    def __call__(self, prompts: list[str], first: list[str], second: list[str]) -> Tensor:
        return torch.sigmoid(self.reward(prompts, first) - self.reward(prompts, second))


def votes(game: SequenceGame, ref: nn.Module, count: int, seed: int) -> Preferences:
    """Pairs of responses of the reference, each with one vote that is drawn from the preference."""
    generator = torch.Generator().manual_seed(seed)
    policy = training.policy_logprobs(ref, game).exp()
    prompts = torch.randint(len(policy), (count,), generator=generator)
    pairs = torch.multinomial(policy[prompts], 2, replacement=True, generator=generator)
    wins = torch.rand(count, generator=generator) < game.matrices[prompts, pairs[:, 0], pairs[:, 1]]
    pairs = torch.where(wins[:, None], pairs, pairs.flip(1))
    chosen, rejected = ([game.responses[i] for i in column] for column in pairs.T.tolist())
    return Preferences([game.prompts[x] for x in prompts.tolist()], chosen, rejected, [1.0] * count)


def model(
    game: SequenceGame, kind: str, data: Preferences, *, size: str, seed: int, epochs: int = 5
) -> PreferenceModel:
    """A model of either kind of ``KINDS`` on a small trunk, fitted to the votes."""
    trunk, tokenizer = training.transformer(game, seed, size), game.tokenizer()
    if kind == "pairwise":
        template = f"{{prompt}} {END} {{first}} {END} {{second}} {END}"
        made = PairwiseModel(trunk, tokenizer, template=template)
    else:
        made = RewardModel(trunk, tokenizer, template=f"{{prompt}} {END} {{response}} {END}")
    fit(made, data, epochs=epochs, batch_size=128, lr=5e-3, seed=seed)
    return made


def table(game: SequenceGame, learned) -> SequenceGame | RewardTable:
    """What a fitted model says of every pair: the same preference, without the model's cost."""
    S = len(game.responses)
    if isinstance(learned, RewardModel):
        rows = [learned.reward([prompt] * S, game.responses) for prompt in game.prompts]
        return RewardTable(game, torch.stack(rows).double())
    first, second = torch.triu_indices(S, S, 1)
    one, other = ([game.responses[i] for i in side.tolist()] for side in (first, second))
    matrices = torch.full_like(game.matrices, 0.5)
    for x, prompt in enumerate(game.prompts):
        wins = learned([prompt] * len(one), one, other).double()
        matrices[x, first, second] = wins
        matrices[x, second, first] = 1 - wins
    return dataclasses.replace(game, name=f"{game.name}, learned", matrices=matrices)


def matrices(opinion: SequenceGame | RewardTable) -> Tensor:
    """(X, S, S) float64: P(row > column | prompt)."""
    if isinstance(opinion, SequenceGame):
        return opinion.matrices
    return torch.sigmoid(opinion.rewards[:, :, None] - opinion.rewards[:, None])


def win_rate(preference: Tensor, log_policy: Tensor, log_other: Tensor) -> Tensor:
    """(X,) exact P(policy > other) per prompt from (X, S, S) and two (X, S)."""
    return torch.einsum("xi,xij,xj->x", log_policy.exp(), preference, log_other.exp())


def error(preference: Tensor, truth: Tensor, log_policy: Tensor, log_other: Tensor) -> Tensor:
    """(X,) exact mean of |P - P*| over pairs of a response of each policy."""
    return win_rate((preference - truth).abs(), log_policy, log_other)


def cyclic(preference: Tensor, log_policy: Tensor) -> Tensor:
    """(X,) probability that three responses of the policy beat each other in a cycle, exactly."""
    beats = (preference > 0.5).double() * log_policy.exp()[:, None, :]
    # around a cycle from any of its three
    return torch.einsum("xij,xjk,xki->x", beats, beats, beats) * 2
