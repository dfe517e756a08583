"""One step of training: generate, prefer, lose, differentiate, update."""

import contextlib
import functools
import logging
import math
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

import nlhf_kernels as nk
from nlhf import (
    algorithms,
    engines,
    http,
    importance,
    losses,
    memory,
    optimizers,
    parts,
    preference,
    serving,
)
from nlhf.algorithms import Phase
from nlhf.graphs import Graphs
from nlhf.parts import Parts, plain
from nlhf.players import Players, trainable
from nlhf.reward import as_reward
from nlhf.rollout import Completion, Pair

# the stream of the words that round an average in bfloat16
_AVERAGE = 2**40
# nats on average between sampling and training, above which something is wrong
_APART = {"float32": 0.01, "bfloat16": 0.2}


class Learner:
    """What training changes, the policy, its copies and its optimiser, and how a step changes them.

    Made from the ``Parts`` of a run, or by hand from models and callables of one's own; the
    algorithm is that of the configuration.

    Raises:
        ValueError: the algorithm lacks a setting, or a reward, or the optimiser a package.
    """

    def __init__(self, pieces: Parts):
        c, world = pieces.config, pieces.world
        self.parts, self.world = pieces, world
        self.policy = pieces.policy
        self.algorithm = algorithms.check(c)
        engines.check(c, pieces.engine, world, self.algorithm)
        self.players = Players(
            self.algorithm,
            pieces.policy,
            getattr(torch, c.copies_dtype) if c.copies_dtype else None,
            c.copies_device or None,
        )
        # after the copies, since what an engine has taken over cannot be copied
        self.engine = engines.make(c, pieces.engine, pieces.policy, world)
        self._trunks = parts.trunks(pieces.preference, pieces.judge)
        for model in (pieces.ref, *self.copies.values(), *self._trunks):
            if model is not None:
                self.engine.shard(model)
        optimizer = optimizers.build(c, self.algorithm, trainable(pieces.policy).values())
        self.engine.prepare(optimizer, c.max_grad_norm or math.inf)
        head = "fused" if c.vocabulary_parallel else c.head
        self._forward = {"head": head, "packing": c.packing}
        # what was recorded in one step serves the next
        self.graphs: Graphs | bool = Graphs() if c.cuda_graphs else False
        self._reward = as_reward(pieces.preference) if self.algorithm.reward else None
        self.chunks = memory.Chunks(
            "loss",
            "set gradient_checkpointing, a smaller micro_batch_size or a shorter max_new_tokens",
            c.micro_batch_size,
            # the others would wait for what this process runs again
            fixed=world.size > 1,
        )
        self.skipped, self.skipped_in_a_row, self.problem = 0, 0, ""

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The engine's, which may be replaced by one of your own over the same weights."""
        return self.engine.optimizer

    @optimizer.setter
    def optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        self.engine.optimizer = optimizer

    @property
    def copies(self) -> dict[str, nn.Module]:
        """The frozen copies as models, "ema" the averaged weights for example."""
        return {name: copy.model for name, copy in self.players.copies.items()}

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        """Inside it all that a measurement runs has its weights here."""
        with (
            self.engine.decoding(self.policy, self.parts.ref),
            self.engine.gathered(*self._trunks),
        ):
            yield

    def step(self, step: int) -> dict[str, float]:
        """Step number ``step``, counted from 0; returns its metrics.

        ``kl`` is the mean of log(policy/ref) over the sampled y: the divergence where the policy
        is who samples. ``sampling_logp_difference`` is the mean of |log-probability at sampling -
        in training| over the tokens of y, and ``..._max`` the largest.

        A step is skipped, which changes nothing but ``skipped`` and ``problem``, if its loss or
        gradient is not finite, the preference gives no probabilities or its server no answer, or
        the log-probabilities are too far apart.

        Raises:
            ValueError: bad settings; or it would be skipped and no step was good before.
        """
        c = self.parts.config
        phase, ended = self.algorithm.phase(step, c.inner_steps)
        clock = Clock(self.parts.device)
        everybody = prompt_ids(c.seed, step, c.batch_size, len(self.parts.prompts))
        ids = self.world.share(everybody)
        prompts = [self.parts.prompts[i % len(self.parts.prompts)] for i in ids]
        asked, problem = self._asked(), ""
        try:
            with clock("generate"):
                pair, judges = self.generate(phase, prompts, ids, step)
            with clock("prefer"):
                wins, other_wins = self.prefer(prompts, pair, judges)
                preferred = wins.double().sum().item()
                wins, other_wins = self.penalised(wins, other_wins, pair, judges)
        except (preference.Unusable, http.Unavailable) as error:
            problem = str(error)
        row: dict[str, float] = {"step": step + 1}
        if not (problem := self.world.worst(problem)):
            results = self._differentiate(phase, clock, pair, wins, other_wins)
            row |= self._measured(results, pair, judges, preferred)
            problem = self._unfit(results, row)
        with clock("update"):
            if not problem:
                norm = row["grad_norm"] = self.update(step).item()
                if not math.isfinite(norm):
                    problem = f"the norm of the gradient is {norm}"
            if problem:
                self.engine.forget()
            seed = nk.fold_in(nk.fold_in(c.seed, step), _AVERAGE)
            self.players.advance(phase, ended, c.ema_decay, seed, learned=not problem)
        self._count(step, problem)
        if problem:
            row = {"step": step + 1}
        else:
            row["tokens_per_second"] = row.pop("drawn") / sum(clock.seconds.values())
        return row | {
            "skipped": self.skipped,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            **self._asked(asked),
            **{f"seconds_{phase}": seconds for phase, seconds in clock.seconds.items()},
        }

    def _differentiate(
        self, phase: Phase, clock: "Clock", pair: Pair, wins: Tensor, other_wins: Tensor | None
    ) -> list:
        """The gradient of the step, a micro-batch at a time; what their losses say."""

        def run() -> list:
            results = []
            for rows in self.chunks.over(len(wins)):
                lean = memory.recomputing(self.policy, self.parts.config.gradient_checkpointing)
                apart = (
                    memory.untied(self.policy) if self.engine.alone else contextlib.nullcontext()
                )
                with self.engine.part(last=rows.stop == len(wins)):
                    with clock("lose"), apart, lean:
                        other = None if other_wins is None else other_wins[rows]
                        result = self.lose(phase, pair.rows(rows), wins[rows], other)
                    with clock("differentiate"):
                        self.engine.backward(result.loss * (len(wins[rows]) / len(wins)))
                results.append(result._replace(loss=result.loss.detach()))
            return results

        while True:
            found = self.chunks.attempt(self.chunks.size or len(wins), run)
            if found is not None:
                return found
            self.engine.forget()

    def _measured(
        self, results: list, pair: Pair, judges: list[Completion], preferred: float
    ) -> dict[str, float]:
        """The metrics of what was drawn and read."""
        tokens = pair.y.mask.sum().item()
        names = ("kl", "entropy")
        apart = self._apart(results, pair)
        total = self.world.sum(
            {
                "rows": len(pair.y.tokens),
                "preference": preferred,
                "ended": self.ended(pair.y).sum().item(),
                "tokens": tokens,
                "drawn": tokens + sum(x.mask.sum().item() for x in (pair.y_other, *judges)),
                "apart": 0.0 if apart is None else apart.sum().item(),
            }
            | {name: sum(getattr(r, name).sum().item() for r in results) for name in names}
        )
        row = {
            "preference": total["preference"] / total["rows"],
            "ended": total["ended"] / total["rows"],
            "kl": total["kl"] / total["rows"],
            "entropy": total["entropy"] / total["tokens"],
            "length": total["tokens"] / total["rows"],
            "drawn": total["drawn"],
        }
        if apart is not None:
            most = self.world.gather([apart.max().item()])
            row["sampling_logp_difference"] = total["apart"] / total["tokens"]
            row["sampling_logp_difference_max"] = max(most)
        return row | self._of_weights(results)

    def _apart(self, results: list, pair: Pair) -> Tensor | None:
        """(B, T) how far log-probabilities at sampling and in training are apart, 0 under the mask.

        None where nobody knows the former: of responses of another player, or through filters of a
        server's.
        """
        c, drawn = self.parts.config, pair.y.policy_logprobs
        if c.server:
            filtered = serving.sampling(c, ()).filtered
            drawn = None if filtered else pair.y.sampling_logprobs
        if drawn is None or self.algorithm.sampler != "policy":
            return None
        read = torch.cat([result.logprobs.detach() for result in results])
        return torch.where(pair.y.mask, (read.double() - drawn.double()).abs(), 0)

    def _unfit(self, results: list, row: dict[str, float]) -> str:
        """Why nothing should be learned from a step; "" if something should."""
        c = self.parts.config
        loss = sum(result.loss.item() for result in results)
        problem = "" if math.isfinite(loss) else f"the loss is {loss}"
        apart = row.get("sampling_logp_difference", 0.0)
        most = c.max_logp_difference or _APART.get(c.dtype, _APART["float32"])
        # with importance weights it is a part of the loss; written so that NaN counts as too far
        if not problem and c.importance == "none" and not apart <= most:
            problem = (
                f"log-probabilities at sampling and in training are {apart:.3g} apart on average, "
                f"more than max_logp_difference = {most:g}"
            )
            if c.server:
                problem += " (does the server still have these weights? or set importance)"
        return self.world.worst(problem)

    def _count(self, step: int, problem: str) -> None:
        self.problem = problem
        if not problem:
            self.skipped_in_a_row = 0
            return
        if step <= self.skipped:
            # no step was good yet: it is the settings, and not the time
            raise ValueError(f"train: step {step + 1}: {problem}")
        self.skipped += 1
        self.skipped_in_a_row += 1
        if self.world.main:
            logging.getLogger(__name__).warning("step %d is skipped: %s", step + 1, problem)

    def counts(self) -> dict[str, int]:
        """What a run must know to go on, beside weights and moments."""
        return {
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "rows": self.chunks.size,
            "prompts": self.parts.chunks.size,
        }

    def count_on(self, counts: dict[str, int]) -> None:
        """Take what ``counts`` once returned."""
        self.skipped, self.skipped_in_a_row = counts["skipped"], counts["skipped_in_a_row"]
        self.parts.chunks.size = counts["prompts"]
        # a smaller micro-batch may have been asked for since
        if counts["rows"]:
            self.chunks.size = min(counts["rows"], self.chunks.size or counts["rows"])

    def _asked(self, before: dict[str, int] | None = None) -> dict[str, int]:
        """Requests to a judge over HTTP, and how many of them were sent again, since ``before``."""
        inner = self.parts.preference
        while not hasattr(inner, "stats") and hasattr(inner, "preference"):
            inner = inner.preference
        names = ("requests", "retries")
        stats = getattr(inner, "stats", {})
        found = {f"judge_{name}": stats[name] for name in names if name in stats}
        if before is None:
            return found
        return self.world.sum({name: found[name] - before[name] for name in found})

    def generate(
        self, phase: Phase, prompts: list, ids: list[int], step: int
    ) -> tuple[Pair, list[Completion]]:
        """y and y' for each prompt, and the responses that both are compared with, if any.

        The latter, ``opponent_samples`` a prompt, lie together.
        """
        c, a = self.parts.config, self.algorithm
        # a policy gradient learns from y alone, a pair loss from two of the same player
        who = [a.sampler, phase.opponent if a.loss == "pg" else a.sampler]
        who += [phase.opponent] * a.judged
        counts = [1, 1, c.opponent_samples]
        coef = algorithms.mixture_coef(c, step)
        with contextlib.ExitStack() as stack:
            sides = [
                stack.enter_context(self.players.side(name, coef, n))
                for name, n in zip(who, counts, strict=False)
            ]
            draw = parts.seeds(c.seed, step, ids, self.parts.device)
            models = {id(side.model): side.model for side in sides}
            stack.enter_context(self.engine.decoding(*models.values(), self.parts.ref))
            # a recording cannot look at the values of its draws
            how = {"check": step == 0 and not self.graphs, "cuda_graphs": self.graphs}
            how["together"] = self.engine.together
            pair, judges = self.parts.generate(prompts, sides, draw, served=bool(c.server), **how)
        return pair, judges

    def prefer(
        self, prompts: list, pair: Pair, judges: list[Completion]
    ) -> tuple[Tensor, Tensor | None]:
        """(B,) what the loss takes for y, and for y' if it takes something."""
        with self.engine.gathered(*self._trunks):
            return self._prefer(prompts, pair, judges)

    def _prefer(
        self, prompts: list, pair: Pair, judges: list[Completion]
    ) -> tuple[Tensor, Tensor | None]:
        shown, device = plain(prompts), self.parts.device
        y, y_other = self.parts.decode(pair.y), self.parts.decode(pair.y_other)
        if self._reward is not None:
            # an independent response is an unbiased baseline, and makes 1/2 of no difference
            margin = self._reward(shown, y) - self._reward(shown, y_other)
            return margin.to(device) + 0.5, None
        if not judges:
            return self.parts.preference(shown, y, y_other).to(device), None
        n = self.parts.config.opponent_samples
        against = self.parts.decode(judges[0])
        repeated = [prompt for prompt in shown for _ in range(n)]
        wins = [
            self.parts.preference(repeated, [text for text in texts for _ in range(n)], against)
            for texts in (y, y_other)
        ]
        return tuple(w.view(-1, n).mean(1).to(device) for w in wins)

    def penalised(
        self, wins: Tensor, other_wins: Tensor | None, pair: Pair, judges: list[Completion]
    ) -> tuple[Tensor, Tensor | None]:
        """What ``prefer`` found, with ``missing_eos_penalty`` for responses that do not end.

        Their own preference sinks by it and that over them rises: of two players the one gets what
        the other pays. A loss of pairs takes probabilities, so there nobody gets below 0 or above
        1; of a reward, what a response pays is taken from it.
        """
        penalty = self.parts.config.missing_eos_penalty
        if not penalty:
            return wins, other_wins
        y, y_other = self.ended(pair.y), self.ended(pair.y_other)
        if other_wins is not None:
            # each is compared with the same responses of the opponent
            against = self.ended(judges[0]).view(len(y), -1).mean(1)
            found = wins + penalty * (y - against), other_wins + penalty * (y_other - against)
        else:
            found = wins + penalty * (y - y_other), None
        if self.algorithm.loss != "pg":
            found = tuple(None if x is None else x.clamp(0, 1) for x in found)
        return found

    def ended(self, completion: Completion) -> Tensor:
        """(R,) float32: 1 for responses whose own last token is one that ends, else 0."""
        count = completion.mask.sum(-1, keepdim=True)
        last = completion.tokens.gather(1, (count - 1).clamp(min=0))
        ends = torch.tensor(self.parts.end_tokens(), device=last.device)
        return (torch.isin(last, ends) & (count > 0))[:, 0].float()

    def lose(self, phase: Phase, pair: Pair, wins: Tensor, other_wins: Tensor | None) -> Any:
        """The loss of a micro-batch, with what the metrics read."""
        c, a = self.parts.config, self.algorithm
        strengths = [algorithms.STRENGTHS[strength](c) for _, strength in phase.anchors]
        names = [name for name, _ in phase.anchors]
        if a.loss == "pg":
            anchored = dict(zip(names, strengths, strict=True))
            settings = {
                "tau": anchored.pop("ref", 0.0),
                "temperature": c.temperature,
                "kl": c.kl,
                "anchors": [(self._logprobs(n, pair, pair.y), w) for n, w in anchored.items()],
                **self._forward,
            }
            loss = losses.nash_md_pg
            if c.importance != "none":
                loss, settings["importance"] = importance.corrected_pg, self._weights(pair)
            return loss(self.engine.policy, self.parts.ref, pair, wins, **settings)
        both = (pair.y, pair.y_other)
        parameters = {name: getattr(c, name) for name in nk.PAIR_METHODS[a.loss].parameters}
        if not nk.PAIR_METHODS[a.loss].anchors:
            parameters["weights"] = strengths
        return losses.contrast(
            self.engine.policy,
            pair,
            wins,
            other_wins,
            method=a.loss,
            anchors=[tuple(self._logprobs(name, pair, x) for x in both) for name in names],
            temperature=c.temperature,
            **self._forward,
            **parameters,
        )

    def _weights(self, pair: Pair) -> importance.ImportanceWeights:
        c, y = self.parts.config, pair.y
        # only what a server drew comes without the mass that was kept: y' too is the policy's then
        other = pair.y_other if pair.y_other.log_kept_mass is None else None
        own = y.policy_logprobs
        if y.log_kept_mass is not None:
            # drawn here: what the rollout found is who drew it, and training may find another
            own = losses.frozen_logprobs(self.policy, pair, y, c.temperature, **self._forward)
        return importance.weights(
            own,
            y.sampling_logprobs,
            y.mask,
            level=c.importance,
            cap=c.importance_cap,
            other=other,
        )

    def _of_weights(self, results: list) -> dict[str, float]:
        c = self.parts.config
        if c.importance == "none":
            return {}
        everybody = self.world.gather(results)
        return importance.metrics(everybody, c.importance, serving.sampling(c, ()).filtered)

    def _logprobs(self, name: str, pair: Pair, completion: Completion) -> Tensor:
        """Of y or y' under an anchor."""
        if name == "ref":
            return completion.ref_logprobs
        # who drew a response has said how likely it was
        if name == self.algorithm.sampler and completion.policy_logprobs is not None:
            return completion.policy_logprobs
        with self.players.model(name) as model:
            return losses.frozen_logprobs(
                model, pair, completion, self.parts.config.temperature, **self._forward
            )

    def update(self, step: int) -> Tensor:
        """The optimiser's step, if the gradient is finite; its norm before it was clipped."""
        c = self.parts.config
        for group in self.optimizer.param_groups:
            group["lr"] = c.learning_rate * rate(step, c.warmup_steps, c.steps)
        norm = self.engine.norm()
        if norm.isfinite():
            self.engine.step()
        return norm


def rate(step: int, warmup: int, steps: int) -> float:
    """Share of the highest learning rate: a linear rise, then a linear fall to a tenth."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 1 - 0.9 * (step - warmup) / max(steps - warmup - 1, 1)


def prompt_ids(seed: int, step: int, batch_size: int, count: int) -> list[int]:
    """Which prompts a step takes: epochs of shuffled prompts; id = prompt + count * epoch."""
    places = range(step * batch_size, (step + 1) * batch_size)
    epochs = range(places[0] // count, places[-1] // count + 1)
    # in one call, since few prompts are many epochs
    seeds = nk.fold_in(seed, torch.tensor(epochs)).tolist()
    orders = {epoch: _shuffled(s, count) for epoch, s in zip(epochs, seeds, strict=True)}
    return [orders[k // count][k % count] + k // count * count for k in places]


@functools.lru_cache(maxsize=2)
def _shuffled(seed: int, count: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(count, generator=generator).tolist()


class Clock:
    """Seconds per phase; on a GPU a phase ends when its kernels have."""

    def __init__(self, device: torch.device):
        self.seconds: dict[str, float] = {}
        self._device = device

    @contextlib.contextmanager
    def __call__(self, phase: str):
        start = time.perf_counter()
        yield
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start
