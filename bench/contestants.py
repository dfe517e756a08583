"""Who trains in ``bench.train_step``: the same step of Nash-MD, written in several ways.

Each is run in a process of its own, so that its peak of memory is its own:

    python -m bench.contestants '{"model": "tiny", "B": 4, "P": 32, "T": 8}' STEPS nlhf[,bare] [DIR]

With a folder, a further step is profiled into it. The last line of standard output is a JSON
object.

All contestants recompute activations in the update, as TRL does by default.
"""

import contextlib
import itertools
import json
import math
import sys
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import DynamicCache

from bench import profile
from bench.phases import Phases, measure_step, settle
from bench.setting import EOS, PAD, Setting
from nlhf import losses, memory, rollout
from nlhf import policy as policies
from nlhf.graphs import Graphs
from nlhf.rollout import Completion, Pair, Side

# prompts and responses of about so many tokens go through the policy at once in the update: more
# cost memory for logits, fewer cost time (a row of SmolLM2-135M instead of four, at 288 tokens: a
# seventh of the update), and a second pass adds its memory to the gradients of the first (four
# rows at 160 tokens, beyond the state: 200 to 250 MB at once, 360 in twos, 240 one by one)
_MICRO_BATCH = {"cpu": 1280, "cuda": 4096}
# new tokens of the step before the measured ones; Triton compiles again where a size is not, as
# those measured are, a multiple of 16
_WARM_UP = {"cpu": 2, "cuda": 16}
_TRIES = 20


class EndedEarly(Exception):
    """A row ended before T tokens: it would be a cheaper row."""


class Contestant:
    """Models, optimiser, scoring and update that all have in common; the rest is their own."""

    def __init__(self, setting: Setting):
        self.setting = setting
        self.policy = setting.policy()
        self.ref = None
        if setting.lora_r:
            self.policy = policies.lora(self.policy, setting.lora_r, 2 * setting.lora_r).eval()
        else:
            self.ref = setting.policy(1).requires_grad_(False)
        # for those who do not leave it to nlhf which module the reference is
        self.ref_model, self.ref_context = policies.reference(self.policy, self.ref)
        self.reward = setting.reward().requires_grad_(False)
        # the defaults of TRL's trainer
        self.optimizer = torch.optim.AdamW(
            [p for p in self.policy.parameters() if p.requires_grad],
            lr=setting.learning_rate,
            weight_decay=0.0,
            fused=True,
        )

    def rollout(self, ids: Tensor, T: int, seed: int) -> Pair:
        raise NotImplementedError

    def score(self, pair: Pair) -> Tensor:
        """(B,) P(y > y') of Bradley and Terry, from the rewards of both in one batch."""
        y, y_other = self.rewards(pair, [pair.y, pair.y_other])
        return torch.sigmoid(y - y_other)

    def loss(self, pair: Pair, preference: Tensor) -> Tensor:
        """The mean over the rows of ``pair``."""
        raise NotImplementedError

    @torch.no_grad()
    def rewards(self, pair: Pair, completions: list[Completion]) -> tuple[Tensor, ...]:
        ids = torch.cat([torch.cat([pair.input_ids, c.tokens], 1) for c in completions])
        mask = torch.cat([torch.cat([pair.attention_mask, c.mask], 1) for c in completions])
        found = self.reward(input_ids=ids, attention_mask=mask).logits[:, 0].float()
        return found.split(len(pair.input_ids))

    def update(self, pair: Pair, preference: Tensor) -> None:
        """Micro-batches, the same for all: only what a token costs tells them apart."""
        for rows in micro_batches(self.setting):
            share = len(preference[rows]) / len(preference)
            with memory.recomputing(self.policy), memory.untied(self.policy):
                loss = self.loss(pair.rows(rows), preference[rows])
            (loss * share).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def settings(self, ids: Tensor, T: int, seed: int) -> dict:
        """Arguments of a rollout of nlhf."""
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "max_new_tokens": T,
            "temperature": self.setting.temperature,
            "eos_token_id": EOS,
            "pad_token_id": PAD,
            "seed": seed,
        }


def micro_batches(setting: Setting) -> list[slice]:
    most = _MICRO_BATCH[torch.device(setting.device).type] // (setting.P + setting.T) or 1
    # of one size, so that none is a small one
    size = math.ceil(setting.B / math.ceil(setting.B / most))
    return [slice(start, start + size) for start in range(0, setting.B, size)]


class Nlhf(Contestant):
    """The public API of nlhf."""

    graphs: Graphs | None = None

    def rollout(self, ids: Tensor, T: int, seed: int) -> Pair:
        coef = self.setting.mixture_coef
        settings = self.settings(ids, T, seed)
        if self.graphs is not None:
            settings["cuda_graphs"] = self.graphs
        return rollout.generate_pair(self.policy, self.ref, mixture_coef=coef, **settings)

    def loss(self, pair: Pair, preference: Tensor) -> Tensor:
        s = self.setting
        result = losses.nash_md_pg(
            self.policy, self.ref, pair, preference, tau=s.tau, temperature=s.temperature
        )
        return result.loss


class NlhfGraphs(Nlhf):
    """A training run records the step of a token once, so that is part of no measured step."""

    def __init__(self, setting: Setting):
        super().__init__(setting)
        self.graphs = Graphs()
        self.rollout(setting.prompts(), setting.T, setting.seed)


class Rlhf(Contestant):
    """What NLHF is compared with by its cost: policy gradient on a reward, one response a prompt.

    The policy alone generates; the reference reads the response once, for the KL term.
    """

    def rollout(self, ids: Tensor, T: int, seed: int) -> Pair:
        settings = self.settings(ids, T, seed)
        (y,) = rollout.generate([Side(self.policy)], None, with_ref=False, **settings)
        return Pair(ids, settings["attention_mask"], y, y)

    def score(self, pair: Pair) -> Tensor:
        return self.rewards(pair, [pair.y])[0]

    def loss(self, pair: Pair, preference: Tensor) -> Tensor:
        s = self.setting
        result = losses.nash_md_pg(
            self.policy, self.ref, pair, preference,
            tau=s.tau, temperature=s.temperature, baseline=0.0,
        )  # fmt: skip
        return result.loss


class PlainLoop(Contestant):
    """What a careful user writes on transformers and torch: a cache for each model, two loops."""

    @torch.no_grad()
    def rollout(self, ids: Tensor, T: int, seed: int) -> Pair:
        torch.manual_seed(seed)
        y = self._generate(ids, T, 0.0)
        y_other = self._generate(ids, T, self.setting.mixture_coef)
        return Pair(ids, torch.ones_like(ids), y, y_other)

    def _generate(self, ids: Tensor, T: int, coef: float) -> Completion:
        cache = DynamicCache(config=self.policy.config)
        ref_cache = DynamicCache(config=self.ref_model.config)
        alive = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
        tokens, mask = [], []
        while len(tokens) < T:
            logits = _next_logits(self.policy, ids, cache)
            if coef:
                with self.ref_context:
                    ref_logits = _next_logits(self.ref_model, ids, ref_cache)
                logits = (1 - coef) * logits + coef * ref_logits
            probabilities = torch.softmax(logits / self.setting.temperature, -1)
            drawn = torch.multinomial(probabilities, 1)[:, 0].masked_fill(~alive, PAD)
            tokens.append(drawn)
            mask.append(alive)
            alive = alive & (drawn != EOS)
            ids = drawn[:, None]
            if not alive.any():
                break
        return Completion(torch.stack(tokens, 1), torch.stack(mask, 1))

    def loss(self, pair: Pair, preference: Tensor) -> Tensor:
        logprobs = self._logprobs(self.policy, pair)
        with torch.no_grad(), self.ref_context:
            ref_logprobs = self._logprobs(self.ref_model, pair)
        mask = pair.y.mask
        ratio = (logprobs.detach() - ref_logprobs) * mask
        to_go = ratio.flip(1).cumsum(1).flip(1)
        weight = preference[:, None] - 0.5 - self.setting.tau * to_go
        return -(logprobs * weight * mask).sum(1).mean()

    def _logprobs(self, model, pair: Pair) -> Tensor:
        """(B, T) of y; the logits that predict the prompt are never made."""
        y = pair.y
        logits = model(
            input_ids=torch.cat([pair.input_ids, y.tokens], 1),
            attention_mask=torch.cat([pair.attention_mask, y.mask], 1),
            use_cache=False,
            logits_to_keep=y.tokens.shape[1] + 1,
        ).logits[:, :-1]
        all_logprobs = torch.log_softmax(logits.float() / self.setting.temperature, -1)
        return all_logprobs.gather(2, y.tokens[:, :, None])[:, :, 0]


def _next_logits(model, ids: Tensor, cache: DynamicCache) -> Tensor:
    outputs = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return outputs.logits[:, -1].float()


CONTESTANTS = {"nlhf": Nlhf, "graphs": NlhfGraphs, "plain": PlainLoop, "rlhf": Rlhf}


@torch.no_grad()
def bare_forwards(contestant: Contestant, ids: Tensor, tokens: Tensor) -> None:
    """The passes that a rollout of y and y' cannot avoid, and no draw, no test for the end.

    Each prompt (B, P) is read once by each model, with a cache of its own; then both models read
    ``tokens`` (2B, T), the rows of both sides, one column after the other but for the last.
    """
    both = torch.arange(len(ids), device=ids.device).repeat(2)
    models = [
        (contestant.policy, contextlib.nullcontext()),
        (contestant.ref_model, contestant.ref_context),
    ]
    caches = [DynamicCache(config=model.config) for model, _ in models]
    for t, column in enumerate([ids, *tokens[:, :-1].split(1, 1)]):
        for (model, context), cache in zip(models, caches, strict=True):
            with context:
                model(input_ids=column, past_key_values=cache, use_cache=True, logits_to_keep=1)
            if t == 0:
                cache.batch_select_indices(both)


# ---- measured


def require_full(pair: Pair, T: int) -> None:
    for completion in (pair.y, pair.y_other):
        if completion.tokens.shape[1] != T or not completion.mask.all():
            raise EndedEarly


def train(
    contestant: Contestant, phases: Phases, ids: Tensor, T: int, seed: int, full: bool = True
) -> None:
    """One step; ``full`` refuses one whose responses are not all of T tokens."""
    with phases("rollout"), profile.range("rollout"):
        pair = contestant.rollout(ids, T, seed)
    if full:
        require_full(pair, T)
    with phases("scoring"), profile.range("scoring"):
        preference = contestant.score(pair)
    with profile.range("update"):
        contestant.update(pair, preference)


def run(setting: Setting, steps: int, names: list[str], folder: str = "") -> dict:
    """``steps`` measured steps of the contestant, alternating with bare forwards if named."""
    name = next((n for n in names if n in CONTESTANTS), "")
    contestant, phases = CONTESTANTS[name or "nlhf"](setting), Phases(setting.device)
    generator = torch.Generator().manual_seed(setting.seed)
    shape = (2 * setting.B, setting.T)
    tokens = torch.randint(setting.vocab_size, shape, generator=generator).to(setting.device)
    ids = setting.prompts(steps)
    # a few tokens bring everything into being: caches, kernels, the optimiser's state
    few = _WARM_UP[torch.device(setting.device).type]
    if "bare" in names:
        bare_forwards(contestant, ids, tokens[:, :few])
    if name:
        train(contestant, phases, ids, few, setting.seed, full=False)
    found = {"steps": [], "bare": []}
    seeds = itertools.count(setting.seed + 1)
    for number in range(steps):
        ids = setting.prompts(number)
        if "bare" in names:
            settle()
            phases.seconds = {}
            with phases("rollout"):
                bare_forwards(contestant, ids, tokens)
            found["bare"].append(phases.seconds)
        if name:
            found["steps"].append(measure_full(contestant, phases, ids, seeds))
    if folder:
        with profile.session(folder):
            train(contestant, phases, ids, setting.T, next(seeds), full=False)
    return found


def measure_full(contestant: Contestant, phases: Phases, ids: Tensor, seeds: Iterator[int]) -> dict:
    """A measured step with responses of T tokens: with the first of ``seeds`` that gives them."""
    setting = contestant.setting
    for seed in itertools.islice(seeds, _TRIES):

        def step(seed=seed):
            train(contestant, phases, ids, setting.T, seed)

        with contextlib.suppress(EndedEarly):
            return measure_step(step, phases, setting.device, contestant.policy)
    raise SystemExit(f"a response ended before {setting.T} tokens {_TRIES} times in a row")


def main() -> None:
    setting, steps = Setting(**json.loads(sys.argv[1])), int(sys.argv[2])
    print(json.dumps(run(setting, steps, sys.argv[3].split(","), *sys.argv[4:])))


if __name__ == "__main__":
    main()
