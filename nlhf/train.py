"""A training run: its folder, its steps, its report."""

import contextlib
import dataclasses
import json
from pathlib import Path

import torch

from nlhf import (
    algorithms,
    checkpoint,
    config,
    diagnosis,
    distributed,
    evaluate,
    model_card,
    parts,
    plots,
    policy,
    tracking,
)
from nlhf.config import Config
from nlhf.learner import Learner
from nlhf.players import trainable

# what may differ between a run and its continuation: none of it changes the weights
_FREE = {"output", "device", "eval_every", "eval_samples", "report_samples"}
_FREE |= {
    "parallel",
    "gather",
    "vocabulary_parallel",
    "checkpoint_every",
    "keep_checkpoints",
    "gradient_checkpointing",
}
_FREE |= {"server", "server_key_env", "server_concurrency", "server_timeout"}
_FREE |= {"report_to", "push_to_hub", "hub_private"}


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
        model_card.PushError: the run is whole and saved, but not on the hub.
    """
    output, world = Path(settings.output), distributed.join()
    algorithms.check(settings)
    tracking.trackers(settings.report_to)
    model_card.check_hub_name(settings.push_to_hub)
    world.first(lambda: _claim(output, settings, resume))
    pieces = parts.build(settings)
    learner = Learner(pieces)
    world.first(lambda: _open(output, settings))
    saved = world.first(lambda: checkpoint.complete(output / "checkpoints"))
    done = checkpoint.load(saved[-1], learner) if saved else 0
    metrics = world.first(lambda: _keep_metrics(output / "metrics.jsonl", done))
    world.first(lambda: _keep_metrics(output / "samples.jsonl", done))
    found = diagnosis.history(metrics, settings)
    with tracking.Log(output, settings, done) if world.main else tracking.Quiet() as log:
        for step in range(done, settings.steps):
            row, samples = learner.step(step), []
            every = settings.eval_every
            if every and pieces.eval_prompts and (step + 1) % every == 0:
                with learner.gathered():
                    figures, samples = evaluate.quick(pieces, learner.engine.together)
                row |= figures
            log(row, samples)
            metrics.append(row)
            for finding in diagnosis.diagnose(metrics, settings):
                if finding.name not in {before.name for before in found}:
                    found.append(finding)
                    log.warn(finding)
            last = step + 1 == settings.steps
            if settings.checkpoint_every and (last or (step + 1) % settings.checkpoint_every == 0):
                keep = settings.keep_checkpoints
                folder = output / "checkpoints"
                checkpoint.save(folder, step + 1, learner, keep)
    result = _finish(learner, metrics, output, found)
    world.first(lambda: _write_cards(output, settings, result))
    # the others have nothing left to wait for
    if settings.push_to_hub and world.main:
        model_card.push(output / "model", settings.push_to_hub, settings.hub_private)
    return result


def _write_cards(output: Path, settings: Config, result: dict) -> None:
    for folder in sorted(output.glob("model*")):
        model_card.write(folder, settings, result)


def _open(output: Path, settings: Config) -> None:
    output.mkdir(parents=True, exist_ok=True)
    if not _started(output):
        config.save(settings, output / "config.yaml")


def _finish(learner: Learner, metrics: list[dict], output: Path, found: list) -> dict:
    pieces, world = learner.parts, learner.world
    world.first(lambda: plots.curves(metrics, output / "curves.png"))
    _save(learner, trainable(pieces.policy), pieces.policy, output / "model")
    if "ema" in learner.copies:
        with learner.players.model("ema") as averaged:
            own = learner.players.copies["ema"].own()
            _save(learner, own, averaged, output / "model-ema")
    if not pieces.eval_prompts:
        return {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(learner.gathered())
        trained = pieces.policy
        if learner.engine.whole:
            # what is reported is what was saved
            dtype = getattr(torch, pieces.config.dtype)
            trained = policy.load_model(output / "model", dtype, pieces.device)
            if pieces.ref is None:
                stack.enter_context(policy.AdaptersOff(pieces.policy))
                pieces = dataclasses.replace(pieces, ref=pieces.policy)
        result = evaluate.report(pieces, trained, learner.engine.together)
    result["findings"] = [dataclasses.asdict(finding) for finding in found]
    world.first(lambda: evaluate.save(result, output))
    return result


def _save(learner: Learner, weights: dict, model: torch.nn.Module, folder: Path) -> None:
    """``model``, whose ``weights`` training has changed; by the first process, with the others."""
    pieces, engine = learner.parts, learner.engine
    if not engine.whole:
        # a model that no engine has taken over, to lay the whole weights into, one at a time
        model = (
            parts.trained_model(pieces.config, torch.device("cpu")) if learner.world.main else None
        )
        whole = dict(model.named_parameters()) if model else {}
        for name, weight in weights.items():
            value = engine.full(weight)
            if model:
                whole[name].data.copy_(value)
    learner.world.first(lambda: policy.save(model, pieces.tokenizer, folder))


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
    # a text may hold characters that splitlines takes for the end of one
    for line in path.read_text(encoding="utf-8").split("\n"):
        # a line that was cut short by a kill is one that the checkpoint does not cover
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    rows = [row for row in rows if row["step"] <= done]
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    partial.rename(path)
    return rows
