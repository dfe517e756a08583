"""A training run: its folder, its steps, its report."""

import collections
import contextlib
import dataclasses
import errno
import functools
import json
import logging
import os
import shlex
from pathlib import Path

import safetensors
import torch

import nlhf_kernels as nk
from nlhf import (
    algorithms,
    checkpoint,
    config,
    diagnosis,
    distributed,
    evaluate,
    http,
    model_card,
    parts,
    plots,
    policy,
    preference,
    snapshots,
    tracking,
)
from nlhf.config import Config
from nlhf.learner import Learner
from nlhf.players import trainable
from nlhf.stopping import Interrupted, Stop, Stopped


def run(settings: Config, resume: bool = False) -> dict:
    """Train as configured, write everything into ``settings.output`` and return the final report.

    SIGTERM or Ctrl-C end a run after the step that is under way. A step that nothing should be
    learned from is skipped (``Learner.step``); more than ``settings.max_skipped`` in a row end it.

    Args:
        settings: the configuration.
        resume: go on from the last checkpoint of the run in the output folder that can be used, or
            start if none is there.

    Returns:
        The report of ``evaluate.report``; empty without held-out prompts.

    Raises:
        ValueError: bad input; the output folder holds another run, or one without ``resume``; no
            checkpoint of it can be used, or a new one cannot be written; too many steps skipped.
        Interrupted: a signal came, and the run is saved.
        distributed.Lost: another process of the run is gone.
        model_card.PushError: the run is whole and saved, but not on the hub.
    """
    before = collections.Counter(nk.calls())
    with Stop() as stop, distributed.together(settings.collective_timeout):
        try:
            with contextlib.ExitStack() as stack:
                result = _run(settings, resume, stop, stack)
            ran = collections.Counter(nk.calls()) - before
            logging.getLogger(__name__).info("ops of this run:\n%s", nk.calls_table(ran))
            return result
        except Stopped:
            raise Interrupted(_how_to_go_on(settings, stop, "nothing is lost")) from None
        except (OSError, safetensors.SafetensorError) as error:
            if os.strerror(errno.ENOSPC) not in str(error):
                raise
            raise ValueError(
                f"train: no room left on the disk of {settings.output}: make some, then go on with "
                "--resume"
            ) from error


def _run(settings: Config, resume: bool, stop: Stop, stack: contextlib.ExitStack) -> dict:
    """``stack`` ends with the run: what holds its folder."""
    output, world = Path(settings.output), distributed.join(settings.collective_timeout)
    algorithms.check(settings)
    tracking.trackers(settings.report_to)
    model_card.check_hub_name(settings.push_to_hub)
    begun = (output / "config.yaml").exists()
    hold = functools.partial(snapshots.alone, output)
    world.first(lambda: stack.enter_context(hold(begun)))
    world.first(lambda: _claim(output, settings, resume))
    pieces = parts.build(settings)
    learner = Learner(pieces)
    world.first(lambda: _open(output, settings))
    world.first(lambda: stack.enter_context(hold(not begun)))
    folder = output / "checkpoints"
    done = snapshots.newest(folder, lambda path: checkpoint.load(path, learner), world) or 0
    # a kill may have come before the last one had ended that
    world.first(lambda: snapshots.forget(folder, settings.keep_checkpoints))
    metrics = world.first(lambda: _keep_metrics(output / "metrics.jsonl", done))
    world.first(lambda: _keep_metrics(output / "samples.jsonl", done))
    found = diagnosis.history(metrics, settings)
    log = tracking.Log(output, settings, done) if world.main else tracking.Quiet()
    with log, stop.finishing():
        for step in range(done, settings.steps):
            row, samples = learner.step(step), []
            every = settings.eval_every
            if every and pieces.eval_prompts and (step + 1) % every == 0:
                figures, samples = _measured(learner)
                row |= figures
            log(row, samples)
            metrics.append(row)
            for finding in diagnosis.diagnose(metrics, settings):
                if finding.name not in {before.name for before in found}:
                    found.append(finding)
                    log.warn(finding)
            asked = world.any(bool(stop.asked))
            if asked or _due(settings, step + 1, learner.skipped_in_a_row):
                checkpoint.save(folder, step + 1, learner, settings.keep_checkpoints)
            _check_skipped(learner, step + 1)
            if asked:
                what = f"after step {step + 1} of {settings.steps}, saved"
                raise Interrupted(_how_to_go_on(settings, stop, what))
    result = _finish(learner, metrics, output, found)
    world.first(lambda: _write_cards(output, settings, result))
    # the others have nothing left to wait for
    if settings.push_to_hub and world.main:
        model_card.push(output / "model", settings.push_to_hub, settings.hub_private)
    return result


def _due(settings: Config, done: int, skipped_in_a_row: int) -> bool:
    """Whether to write a checkpoint; also before what may be the end of a run that goes wrong."""
    every = settings.checkpoint_every
    return bool(every) and (done == settings.steps or done % every == 0 or skipped_in_a_row == 1)


def _check_skipped(learner: Learner, done: int) -> None:
    count, settings = learner.skipped_in_a_row, learner.parts.config
    if count > settings.max_skipped:
        raise ValueError(
            f"train: {count} steps in a row were skipped, up to step {done}: {learner.problem}; "
            "see to it, then go on with --resume"
        )


def _measured(learner: Learner) -> tuple[dict[str, float], list]:
    """A measurement on held-out prompts; nothing where no preference can be had."""
    problem, found = "", ({}, [])
    try:
        with learner.gathered():
            found = evaluate.quick(learner.parts, learner.engine.together)
    except (preference.Unusable, http.Unavailable) as error:
        problem = str(error)
    if problem and learner.world.size > 1:
        raise ValueError(problem)
    if problem:
        logging.getLogger(__name__).warning("a measurement is left out: %s", problem)
    return found


def _how_to_go_on(settings: Config, stop: Stop, what: str) -> str:
    words = ["nlhf", "train", "--config", str(Path(settings.output) / "config.yaml"), "--resume"]
    by = f" by {stop.asked}" if stop.asked else ""
    return f"Stopped{by}, {what}. Go on with: {shlex.join(words)}"


def _write_cards(output: Path, settings: Config, result: dict) -> None:
    for folder in sorted(output.glob("model*")):
        model_card.write(folder, settings, result)


def _open(output: Path, settings: Config) -> None:
    output.mkdir(parents=True, exist_ok=True)
    if not _started(output):
        snapshots.write(output / "config.yaml", config.dump(settings))
    (output / "checkpoints").mkdir(exist_ok=True)


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
    if resume and output.is_dir():
        for folder in (output, output / "checkpoints"):
            snapshots.clean(folder)
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
    before = config.identity(config.load(str(path)))
    if other := config.difference(settings, before):
        raise ValueError(
            f"train: the run in {output} has {other}: resume it with its own settings, or choose "
            "another --output"
        )


def _started(output: Path) -> bool:
    """Whether a run got as far as its first step; before that there is nothing to lose."""
    metrics = output / "metrics.jsonl"
    done = metrics.exists() and metrics.stat().st_size > 0
    checkpoints = output / "checkpoints"
    any_saved = checkpoints.is_dir() and any(checkpoints.iterdir())
    return done or any_saved or (output / "model").exists()


def _keep_metrics(path: Path, done: int) -> list[dict]:
    """The metrics of the steps that the checkpoint holds; later lines are taken out of the file."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_bytes().split(b"\n"):
        # a line that was cut short by a kill is one that the checkpoint does not cover
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    rows = [row for row in rows if row["step"] <= done]
    snapshots.write(path, "".join(json.dumps(row) + "\n" for row in rows))
    return rows
