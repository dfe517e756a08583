"""Small transformers that play the games: references, trained policies, exact log-probabilities.

Legend: V words, T the longest response, X prompts, S responses; token V ends.
"""

import contextlib
import copy
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nlhf import policy as policies
from nlhf.config import Config
from nlhf.experiments.games import SequenceGame
from nlhf.learner import Learner
from nlhf.parts import Parts
from nlhf.preference import Preference, as_preference
from nlhf.tabular import MatrixGame

# layers, hidden size
SIZES = {"tiny": (1, 16), "small": (2, 32), "medium": (3, 64)}
DEFAULTS = {"steps": 150, "batch_size": 64, "learning_rate": 3e-3, "device": "cpu"}


@dataclass(frozen=True)
class Trained:
    model: nn.Module
    metrics: list[dict]
    seconds: float
    learner: Learner


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """So small a model is slower on more threads, and by far if another process wants the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def transformer(game: SequenceGame, seed: int, size: str = "small", std: float = 0.02) -> nn.Module:
    """A random Llama over the game's tokens; a large ``std`` makes its predictions uneven.

    Raises:
        ValueError: an unknown size.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    if size not in SIZES:
        raise ValueError(f"transformer: size must be one of {', '.join(SIZES)}, got {size!r}")
    layers, hidden = SIZES[size]
    end = len(game.words)
    config = LlamaConfig(
        vocab_size=end + 1,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=32,
        initializer_range=std,
        bos_token_id=None,
        eos_token_id=end,
        # a padding token would have no embedding of its own, and here it may be read
        pad_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


@one_thread()
def reference(
    game: SequenceGame, seed: int = 0, size: str = "small", steps: int = 200
) -> nn.Module:
    """A Llama fitted by maximum likelihood to the game's demonstrations, frozen, in eval mode.

    The likelihood is exact: over all responses to all prompts, each with its probability.
    """
    model = transformer(game, seed, size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    weight = game.demonstrations.exp()
    for _ in range(steps):
        logprobs = join(conditionals(model, game, game.prompts))
        loss = -(weight * logprobs).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.requires_grad_(False)


def pieces(
    game: SequenceGame,
    ref: nn.Module,
    preference: Preference,
    settings: Config,
    policy: nn.Module | None = None,
) -> Parts:
    """What a run on the game is made of: ``policy``, or a copy of ``ref``, in full float32 weights.

    The judge is the game itself, the true preference.
    """
    start = copy.deepcopy(ref if policy is None else policy)
    return Parts(
        config=settings,
        policy=start.requires_grad_(True),
        ref=ref,
        tokenizer=game.tokenizer(),
        prompts=game.prompts,
        eval_prompts=game.prompts,
        preference=as_preference(preference),
        judge=as_preference(game),
        lexicon=None,
        device=torch.device("cpu"),
    )


@one_thread()
def train(
    game: SequenceGame,
    ref: nn.Module,
    preference: Preference,
    *,
    policy: nn.Module | None = None,
    **settings,
) -> Trained:
    """A policy trained on the game from ``ref`` (or ``policy``); ``settings`` are those of Config.

    Raises:
        ValueError: a bad setting, or a gradient that is not finite.
    """
    chosen = Config(**DEFAULTS | {"max_new_tokens": game.length} | settings)
    learner = Learner(pieces(game, ref, preference, chosen, policy))
    start = time.perf_counter()
    metrics = [learner.step(step) for step in range(chosen.steps)]
    seconds = time.perf_counter() - start
    return Trained(learner.policy.eval(), metrics, seconds, learner)


# ---- exact log-probabilities


def conditionals(model: nn.Module, game: SequenceGame, prompts: Sequence[str]) -> list[Tensor]:
    """For t = 0..T-1: (len(prompts), V^t, V + 1) float64 log-probabilities of the next token.

    After every prefix of t words, in the order of counting; the last column ends the response.
    """
    V, T = len(game.words), game.length
    device = next(model.parameters()).device
    encode = game.tokenizer()
    heads = [encode(prompt)["input_ids"] for prompt in prompts]
    if len(set(map(len, heads))) > 1:
        raise ValueError("conditionals: the prompts must have one length; give them one by one")
    longest = torch.cartesian_prod(*[torch.arange(V)] * (T - 1)) if T > 1 else torch.zeros(1, 0)
    longest = longest.reshape(V ** (T - 1), T - 1).long()
    head = torch.tensor(heads)
    rows = [head.repeat_interleave(len(longest), 0), longest.repeat(len(head), 1)]
    ids = torch.cat(rows, 1).to(device)
    mask = torch.ones_like(ids)
    logits = policies.last_logits(model, ids, mask, policies.positions(mask), T)
    table = logits.double().log_softmax(-1).view(len(head), len(longest), T, V + 1)
    # rows that share a prefix agree on what follows it
    return [table[:, :: V ** (T - 1 - t), t] for t in range(T)]


def join(tables: Sequence[Tensor]) -> Tensor:
    """(..., S) log-probabilities of whole responses from the (..., V^t, V + 1) conditionals."""
    prefix = torch.zeros_like(tables[0][..., 0])
    ended = []
    for table in tables:
        logprobs = prefix[..., None] + table
        ended.append(logprobs[..., -1])
        prefix = logprobs[..., :-1].flatten(-2)
    return torch.cat([*ended, prefix], -1)


def split(logprobs: Tensor, words: int, length: int) -> list[Tensor]:
    """The conditionals of a policy over whole responses: the inverse of ``join``."""
    sizes = [words**t for t in range(length + 1)]
    blocks = list(logprobs.split(sizes, -1))
    below, tables = blocks[-1], []
    for t in reversed(range(length)):
        options = torch.cat([below.unflatten(-1, (-1, words)), blocks[t][..., None]], -1)
        below = options.logsumexp(-1)
        tables.append(options - below[..., None])
    return tables[::-1]


def one_step_mixture(tables: Sequence[Tensor], ref: Sequence[Tensor], coef: float) -> list[Tensor]:
    """The geometric mixture of Munos et al. 2023, F.1, renormalised at every token."""
    pairs = zip(tables, ref, strict=True)
    return [((1 - coef) * a + coef * b).log_softmax(-1) for a, b in pairs]


@torch.no_grad()
def sequence_logprobs(
    model: nn.Module,
    game: SequenceGame,
    prompt: str,
    ref: nn.Module | None = None,
    mixture_coef: float = 0.0,
) -> Tensor:
    """(S,) float64: the exact log-probability of every response to the prompt.

    With ``mixture_coef`` above 0, of the one-step-at-a-time mixture with ``ref``.

    Raises:
        ValueError: a coefficient outside [0, 1], or without a reference.
    """
    if not 0 <= mixture_coef <= 1 or (mixture_coef and ref is None):
        raise ValueError(
            "sequence_logprobs: mixture_coef must be in [0, 1], and 0 without ref, "
            f"got {mixture_coef!r}"
        )
    tables = conditionals(model, game, [prompt])
    if mixture_coef:
        tables = one_step_mixture(tables, conditionals(ref, game, [prompt]), mixture_coef)
    return join(tables)[0]


def policy_logprobs(model: nn.Module, game: SequenceGame, **mixture) -> Tensor:
    """(X, S) float64: ``sequence_logprobs`` for every prompt of the game."""
    rows = [sequence_logprobs(model, game, prompt, **mixture) for prompt in game.prompts]
    return torch.stack(rows)


def matrix_game(game: SequenceGame, ref: nn.Module, tau: float) -> MatrixGame:
    """The game in a table, a context a prompt: the true preference, the exact reference, tau."""
    return MatrixGame(game.matrices, policy_logprobs(ref, game).exp(), tau, game.responses)
