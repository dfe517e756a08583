"""One step of training: generate, prefer, lose, differentiate, update."""

import contextlib
import functools
import math
import time

import torch

import nlhf_kernels as nk
from nlhf import losses, memory, parts
from nlhf.parts import Parts, plain


class Learner:
    """What training changes, the policy and its optimiser, and how one step changes it.

    Made from the ``Parts`` of a run, or by hand from models and callables of one's own.
    """

    def __init__(self, pieces: Parts):
        self.parts = pieces
        self.policy = pieces.policy
        self.optimizer = torch.optim.AdamW(
            [p for p in pieces.policy.parameters() if p.requires_grad],
            lr=pieces.config.learning_rate,
            weight_decay=pieces.config.weight_decay,
            # one weight after the other, as is the default there, takes two copies of the largest
            fused=pieces.device.type == "cpu" or None,
        )

    def step(self, step: int) -> dict[str, float]:
        """One step of Nash-MD-PG (Munos et al. 2023, section 7); returns its metrics."""
        pieces, optimizer = self.parts, self.optimizer
        c = pieces.config
        clock = Clock(pieces.device)
        ids = prompt_ids(c.seed, step, c.batch_size, len(pieces.prompts))
        prompts = [pieces.prompts[i % len(pieces.prompts)] for i in ids]
        with clock("generate"):
            draw = parts.seeds(c.seed, step, ids, pieces.device)
            pair = pieces.generate_pair(prompts, draw, check=step == 0)
        with clock("prefer"):
            y, y_other = pieces.decode(pair.y), pieces.decode(pair.y_other)
            wins = pieces.preference(plain(prompts), y, y_other).to(pieces.device)

        results = []
        size = c.micro_batch_size or c.batch_size
        for start in range(0, c.batch_size, size):
            rows = slice(start, start + size)
            lean = memory.recomputing(pieces.policy, c.gradient_checkpointing)
            with clock("lose"), memory.untied(pieces.policy), lean:
                result = losses.nash_md_pg(
                    pieces.policy,
                    pieces.ref,
                    pair.rows(rows),
                    wins[rows],
                    tau=c.tau,
                    temperature=c.temperature,
                    kl=c.kl,
                )
            with clock("differentiate"):
                (result.loss * (len(wins[rows]) / c.batch_size)).backward()
            results.append(result)
        with clock("update"):
            weights = [p for group in optimizer.param_groups for p in group["params"]]
            norm = torch.nn.utils.clip_grad_norm_(weights, c.max_grad_norm or math.inf)
            if not norm.isfinite():
                raise ValueError(
                    f"train: the gradient of step {step + 1} is not finite; go on from the last "
                    "checkpoint with --resume, or start again with a lower learning_rate"
                )
            for group in optimizer.param_groups:
                group["lr"] = c.learning_rate * rate(step, c.warmup_steps, c.steps)
            optimizer.step()
            optimizer.zero_grad()

        tokens = pair.y.mask.sum().item()
        both = tokens + pair.y_other.mask.sum().item()
        summed = {
            name: sum(getattr(r, name).sum().item() for r in results) for name in ("kl", "entropy")
        }
        return {
            "step": step + 1,
            "preference": wins.mean().item(),
            "kl": summed["kl"] / c.batch_size,
            "entropy": summed["entropy"] / tokens,
            "length": tokens / c.batch_size,
            "grad_norm": norm.item(),
            "learning_rate": optimizer.param_groups[0]["lr"],
            "tokens_per_second": both / sum(clock.seconds.values()),
            **{f"seconds_{phase}": seconds for phase, seconds in clock.seconds.items()},
        }


def rate(step: int, warmup: int, steps: int) -> float:
    """Share of the highest learning rate: a linear rise, then a linear fall to a tenth."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 1 - 0.9 * (step - warmup) / max(steps - warmup - 1, 1)


def prompt_ids(seed: int, step: int, batch_size: int, count: int) -> list[int]:
    """Which prompts a step takes: epochs of shuffled prompts; id = prompt + count * epoch."""
    ids = []
    for k in range(step * batch_size, (step + 1) * batch_size):
        epoch, place = divmod(k, count)
        ids.append(_shuffled(seed, epoch, count)[place] + count * epoch)
    return ids


@functools.lru_cache(maxsize=2)
def _shuffled(seed: int, epoch: int, count: int) -> list[int]:
    generator = torch.Generator().manual_seed(nk.fold_in(seed, epoch))
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
