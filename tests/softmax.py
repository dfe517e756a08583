"""Tabular softmax policies as causal language models, and steps with gradients that are exact.

A Llama without layers whose head alone is trained: the prompt is one word, the context; the
response is one word, the action. Every part of the trainer runs on it as on any model.
"""

import torch
from torch import Tensor, nn

from nlhf import config, parts, rollout
from nlhf.learner import Learner


def model(log_policy: Tensor) -> nn.Module:
    """The language model of log-probabilities (contexts X, actions Y), X <= Y."""
    from transformers import LlamaConfig, LlamaForCausalLM

    X, Y = log_policy.shape
    words = {"vocab_size": Y, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    sizes = {"hidden_size": X, "num_hidden_layers": 0, "num_attention_heads": 1, "head_dim": 2}
    built = LlamaForCausalLM(LlamaConfig(**words, **sizes, intermediate_size=1, rms_norm_eps=0.0))
    built = built.to(torch.float64).requires_grad_(False).eval()
    with torch.no_grad():
        # the norm makes a vector of length sqrt(X) of it
        built.model.embed_tokens.weight.copy_(torch.ones(Y, X).tril().triu())
        built.lm_head.weight.copy_(log_policy.T / X**0.5)
    built.lm_head.weight.requires_grad_(True)
    return built


def log_policy(lm: nn.Module, X: int) -> Tensor:
    """Log-probabilities (X, Y) of the actions."""
    with torch.no_grad():
        return lm(torch.arange(X)[:, None]).logits[:, -1].log_softmax(-1)


def tokenizer(Y: int):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({f"a{i}": i for i in range(Y)}, unk_token="a0"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, padding_side="left", pad_token="a0", eos_token="a0"
    )


class Table:
    """The preference of a game over texts, with the reward of every text if there is one."""

    def __init__(self, preference: Tensor, reward: Tensor | None = None):
        self.matrix, self._reward = preference, reward
        if reward is not None:
            self.reward = self._of

    def _of(self, prompts, responses):
        return self._reward[actions(prompts), actions(responses)]

    def __call__(self, prompts, first, second):
        return self.matrix[actions(prompts), actions(first), actions(second)].float()


def actions(texts) -> Tensor:
    # the end of sequence, which is action 0 as well, leaves no text
    return torch.tensor([int(text[1:] or 0) for text in texts], dtype=torch.int64)


def pieces(game, reward: Tensor | None = None, **settings) -> parts.Parts:
    """What a learner is made of, for a ``tabular.MatrixGame`` with contexts."""
    X, Y = game.preference.shape[:2]
    # all pairs of a context are one batch; an exact learner weighs the gradients of logits
    settings = {"micro_batch_size": 10**6, "head": "logits"} | settings
    c = config.Config(max_new_tokens=1, tau=game.tau, warmup_steps=0, max_grad_norm=0, **settings)
    log_ref = game.log_ref.expand(X, Y)
    ref = model(log_ref).requires_grad_(False)
    prefer = Table(game.preference, reward)
    prompts = [f"a{x}" for x in range(X)]
    device = torch.device("cpu")
    return parts.Parts(
        c, model(log_ref), ref, tokenizer(Y), prompts, [], prefer, prefer, None, device
    )


class Exact(Learner):
    """A learner that sees every pair of responses of every context, weighted by its probability."""

    def _log_probs(self, name: str) -> Tensor:
        X = len(self.parts.prompts)
        log_ref = log_policy(self.parts.ref, X)
        if name == "ref":
            return log_ref
        with self.players.model(name) as lm:
            own = log_policy(lm, X)
        b = self.parts.config.mixture_coef if name == "mixture" else 0.0
        return ((1 - b) * own + b * log_ref).log_softmax(-1)

    def generate(self, phase, prompts, ids, step):
        a = self.algorithm
        opponent = self._log_probs(phase.opponent)
        sampler = self._log_probs(a.sampler)
        X, Y = sampler.shape
        x, y, z = (
            i.reshape(-1) for i in torch.meshgrid(*map(torch.arange, (X, Y, Y)), indexing="ij")
        )
        self.rows = x, y, z
        other = opponent if a.loss == "pg" else sampler
        self.weights = (sampler[x, y] + other[x, z]).exp() / X
        self.against = opponent.exp()
        log_ref = log_policy(self.parts.ref, X)

        def answer(k):
            mask = torch.ones(len(k), 1, dtype=torch.bool)
            return rollout.Completion(k[:, None], mask, ref_logprobs=log_ref[x, k][:, None])

        ids = x[:, None]
        return rollout.Pair(ids, torch.ones_like(ids), answer(y), answer(z)), []

    def prefer(self, prompts, pair, judges):
        x, y, z = self.rows
        matrix = self.parts.preference.matrix
        if self.algorithm.reward:
            reward = self.parts.preference._reward
            return reward[x, y] - reward[x, z] + 0.5, None
        if self.algorithm.judged:
            wins = torch.einsum("xyz,xz->xy", matrix, self.against)
            return wins[x, y], wins[x, z]
        return matrix[x, y, z], None

    def lose(self, phase, pair, wins, other_wins):
        # the mean over the rows becomes the expectation in the backward pass: the head's gradient
        # adds up over rows
        scale = (self.weights * len(self.weights))[:, None, None]

        def weigh(head, inputs, logits):
            logits.register_hook(lambda gradient: gradient * scale)

        hook = self.policy.lm_head.register_forward_hook(weigh)
        try:
            return super().lose(phase, pair, wins, other_wins)
        finally:
            hook.remove()
