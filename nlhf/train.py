"""The training loop: generate, prefer, lose, differentiate, update, log."""

import contextlib
import dataclasses
import functools
import importlib.util
import json
import math
import time
from pathlib import Path

import torch
from tqdm import tqdm

import nlhf_kernels as nk
from nlhf import checkpoint, config, evaluate, losses, memory, parts, plots, policy
from nlhf.config import Config
from nlhf.parts import Parts, plain

# what may differ between a run and its continuation: none of it changes the weights
_FREE = {"output", "device", "eval_every", "eval_samples", "report_samples"}
_FREE |= {"checkpoint_every", "keep_checkpoints", "gradient_checkpointing"}


def run(settings: Config, resume: bool = False) -> dict:
    """Train as configured, write everything into ``settings.output`` and return the final report.

    Args:
        settings: the configuration.
        resume: go on from the last checkpoint of the run in the output folder, or start if none is
            there.

    Returns:
        The report of ``evaluate.report``; empty without held-out prompts.

    Raises:
        ValueError: bad input; the output folder holds another run, or one without ``resume``.
    """
    output = Path(settings.output)
    _claim(output, settings, resume)
    pieces = parts.build(settings)
    output.mkdir(parents=True, exist_ok=True)
    if not _started(output):
        config.save(settings, output / "config.yaml")
    optimizer = torch.optim.AdamW(
        [p for p in pieces.policy.parameters() if p.requires_grad],
        lr=settings.learning_rate,
        weight_decay=settings.weight_decay,
        # one weight after the other, as is the default there, takes two copies of the largest
        fused=pieces.device.type == "cpu" or None,
    )
    saved = checkpoint.complete(output / "checkpoints")
    done = checkpoint.load(saved[-1], pieces.policy, optimizer) if saved else 0
    metrics = _keep_metrics(output / "metrics.jsonl", done)
    with Log(output, done, settings.steps) as log:
        for step in range(done, settings.steps):
            row = train_step(pieces, optimizer, step)
            every = settings.eval_every
            if every and pieces.eval_prompts and (step + 1) % every == 0:
                row |= evaluate.quick(pieces)
            log(row)
            metrics.append(row)
            last = step + 1 == settings.steps
            if settings.checkpoint_every and (last or (step + 1) % settings.checkpoint_every == 0):
                keep = settings.keep_checkpoints
                folder = output / "checkpoints"
                checkpoint.save(folder, step + 1, pieces.policy, optimizer, keep)
    return _finish(pieces, metrics, output)


def _finish(pieces: Parts, metrics: list[dict], output: Path) -> dict:
    plots.curves(metrics, output / "curves.png")
    policy.save(pieces.policy, pieces.tokenizer, output / "model")
    if not pieces.eval_prompts:
        return {}
    # what is reported is what was saved
    dtype = getattr(torch, pieces.config.dtype)
    trained = policy.load_model(output / "model", dtype, pieces.device)
    with contextlib.ExitStack() as stack:
        if pieces.ref is None:
            stack.enter_context(pieces.policy.disable_adapter())
            pieces = dataclasses.replace(pieces, ref=pieces.policy)
        result = evaluate.report(pieces, trained)
    evaluate.save(result, output)
    return result


def train_step(pieces: Parts, optimizer: torch.optim.Optimizer, step: int) -> dict[str, float]:
    """One step of Nash-MD-PG (Munos et al. 2023, section 7); returns its metrics."""
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


class Log:
    """Metrics as JSON lines, as a progress bar, and for TensorBoard where it is installed."""

    def __init__(self, output: Path, done: int, steps: int):
        self._file = (output / "metrics.jsonl").open("a", encoding="utf-8")
        self._bar = tqdm(total=steps, initial=done, desc="nash-md-pg", unit="step")
        self._board = None
        if importlib.util.find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(output / "tensorboard")
        self._versus = math.nan

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._bar.close()
        self._file.close()
        if self._board:
            self._board.close()

    def __call__(self, row: dict[str, float]) -> None:
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        if self._board:
            for name, value in row.items():
                self._board.add_scalar(name, value, row["step"])
        self._versus = row.get("preference_vs_ref", self._versus)
        phases = {k.removeprefix("seconds_"): v for k, v in row.items() if "seconds_" in k}
        self._bar.set_postfix_str(
            f"P {row['preference']:.3f}, vs ref {self._versus:.3f}, KL {row['kl']:.2f}, "
            f"entropy {row['entropy']:.2f}, {row['tokens_per_second']:.0f} tokens/s, "
            + " ".join(f"{name} {seconds:.1f}s" for name, seconds in phases.items())
        )
        self._bar.update()


def _claim(output: Path, settings: Config, resume: bool) -> None:
    """Refuse an output folder that holds another run, so that nothing is written over."""
    path = output / "config.yaml"
    if not path.exists():
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise ValueError(f"train: {output} exists and holds no run: choose another --output")
        return
    if not _started(output):
        # a file that we did not write is somebody's own, whatever its name
        if config.dump(config.load(str(path))) != path.read_text(encoding="utf-8"):
            raise ValueError(f"train: {path} is not of a run: choose another --output")
        return
    if not resume:
        raise ValueError(
            f"train: {output} already holds a run: give --resume to go on with it, or another "
            "--output"
        )
    before = dataclasses.asdict(config.load(str(path)))
    for name, value in dataclasses.asdict(settings).items():
        if name not in _FREE and value != before[name]:
            raise ValueError(
                f"train: the run in {output} has {name} = {before[name]!r}, not {value!r}: "
                "resume it with its own settings, or choose another --output"
            )


def _started(output: Path) -> bool:
    """Whether a run got as far as its first step; before that there is nothing to lose."""
    metrics = output / "metrics.jsonl"
    done = metrics.exists() and metrics.stat().st_size > 0
    return done or (output / "checkpoints").exists() or (output / "model").exists()


def _keep_metrics(path: Path, done: int) -> list[dict]:
    """The metrics of the steps that the checkpoint holds; later lines are taken out of the file."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        # a line that was cut short by a kill is one that the checkpoint does not cover
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    rows = [row for row in rows if row["step"] <= done]
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    partial.rename(path)
    return rows
