"""``nlhf preference``."""

import argparse
import contextlib
import shlex
import sys
from pathlib import Path

from nlhf import config
from nlhf.commands import common
from nlhf.config import FitConfig
from nlhf.stopping import Interrupted, Stop, Stopped

DESCRIPTION = (
    "Train a model that says how likely one response to a prompt beats another, from pairs of "
    "which one was preferred: what --preference of the other commands reads. A pairwise model "
    "reads both responses and can learn cycles; a reward model (Bradley-Terry) scores each alone. "
    "Every setting is a flag and a line of the --config file, of which flags win; an interrupted "
    "run goes on with --resume."
)
EXAMPLES = """\
  nlhf preference --trunk path/or/hub-name --pairs pairs.jsonl --held-out held_out.jsonl \\
      --output my-preference
  nlhf preference --config tldr-preference
  nlhf preference --trunk hub-name --pairs pairs.jsonl --kind reward --freeze-trunk"""
# what it was called before
OLD_NAME = "fit-preference"

# where a run leaves what it has reached
_OURS = ("checkpoints", "features", "metrics.jsonl")


def add(commands) -> None:
    parser = common.add_parser(
        commands,
        "preference",
        "train a preference or reward model from pairs",
        DESCRIPTION,
        EXAMPLES,
        "docs/recipes.md",
    )
    old = commands.add_parser(OLD_NAME, description="The old name of nlhf preference.")
    for each in (parser, old):
        common.add_config(each, FitConfig)
        each.add_argument(
            "--resume",
            action="store_true",
            help="go on from the last checkpoint in the output folder, if there is one",
        )
        config.add_arguments(each, FitConfig)
        each.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    if arguments.command == OLD_NAME:
        sys.stderr.write(f"nlhf {OLD_NAME} is deprecated: it is now called nlhf preference\n")
    settings = common.settings(arguments, FitConfig)
    try:
        result = fit(settings, arguments.resume)
    except Interrupted as stopped:
        sys.stdout.write(f"\n{stopped}\n")
        return
    sys.stdout.write("\n" + table(result, settings))
    sys.stdout.write(f"\nThe preference model is in {settings.output}: give it as --preference\n")


def fit(settings: FitConfig, resume: bool = False) -> dict:
    """Train as configured, save into ``settings.output`` and return the figures of `fit.json`.

    SIGTERM or Ctrl-C end it after the step that is under way.

    Args:
        settings: the configuration.
        resume: go on from the last checkpoint of the run in the output folder that can be used, or
            start if none is there.

    Raises:
        ValueError: bad input; an output folder that is not empty, or holds another run, or one
            without ``resume``; no checkpoint can be used, or a new one cannot be written; too many
            steps skipped.
        Interrupted: a signal came, and the run is saved.
    """
    for name in ("trunk", "pairs"):
        if not getattr(settings, name):
            raise ValueError(f"config: {name} must be given")
    output, run, started = Path(settings.output), None, False
    with Stop() as stop, contextlib.ExitStack() as held:
        try:
            started = _claim(output, settings, resume)
            # after the cheap checks: torch and transformers take seconds to import
            from nlhf import preference_run

            run = preference_run.Run(settings, stop)
            return run.result() or _fit(run, started, held)
        except Stopped as signal:
            reached = f"Stopped by {signal} {run.reached if run else 'before the first step'}"
            if not started and not (run and run.opened):
                again = "nothing was written: start it again with the same command"
                raise Interrupted(f"{reached}, {again}") from None
            words = ["nlhf", "preference", "--config", str(output / "config.yaml"), "--resume"]
            raise Interrupted(f"{reached}. Go on with: {shlex.join(words)}") from None
        except OSError as error:
            from nlhf import store

            if error.errno not in store.FULL:
                raise
            raise ValueError(
                f"preference: no room left for {output} ({error.strerror}): make some, then go on "
                "with --resume"
            ) from error


def _fit(run, started: bool, held: contextlib.ExitStack) -> dict:
    from nlhf import data, parts, preference, preference_fit, snapshots

    settings = run.settings
    device = parts.device_of(settings.device)
    limit = settings.limit or None
    pairs = data.read_preferences(settings.pairs, limit=limit)
    held_out = data.read_preferences(settings.held_out, limit=limit) if settings.held_out else None
    if run.saved:
        model = preference.load_preference(settings.output, device=device)
    else:
        model = _model(settings, device)
    result = {}
    if settings.skip_long:
        pairs, result["pairs_skipped"] = _short(model, pairs, settings.pairs)
    held.enter_context(snapshots.alone(run.output, started))
    run.open(pairs, started)
    held.enter_context(snapshots.alone(run.output, not started))
    if run.saved:
        losses = run.losses()
    else:
        # features may be broken off anywhere, steps are finished
        with contextlib.nullcontext() if model.frozen else run.stop.finishing():
            losses = preference_fit.fit(
                model,
                pairs,
                epochs=settings.epochs,
                batch_size=settings.batch_size,
                lr=settings.learning_rate,
                l2=settings.l2,
                seed=settings.seed,
                progress=True,
                max_skipped=settings.max_skipped,
                recorder=run,
            )
        run.save(model, losses)
    # the mean of a tenth, since a single batch is noise
    last = losses[-max(1, len(losses) // 10) :]
    result |= {"pairs": len(pairs), "loss": sum(last) / len(last)}
    if held_out:
        result["held_out"] = {}
        if settings.skip_long:
            held_out, result["held_out"]["pairs_skipped"] = _short(
                model, held_out, settings.held_out
            )
        result["held_out"] |= preference_fit.evaluate(model, held_out)
    run.end(result)
    return result


def _model(settings: FitConfig, device):
    import torch

    from nlhf import preference

    trunk, tokenizer = preference.load_trunk(
        local_folder(settings.trunk), getattr(torch, settings.dtype)
    )
    template = {"template": settings.template} if settings.template else {}
    return preference.KINDS[settings.kind](
        trunk.to(device),
        tokenizer,
        pooling=settings.pooling,
        n_layers=settings.n_layers or None,
        freeze_trunk=settings.freeze_trunk,
        max_length=settings.max_length or None,
        truncate=settings.truncate,
        **template,
    )


def _claim(output: Path, settings: FitConfig, resume: bool) -> bool:
    """Whether the folder holds a run to go on with; ValueError where it is somebody else's."""
    path = output / "config.yaml"
    if resume and output.is_dir():
        from nlhf import snapshots

        snapshots.clean(output)
    there = {p.name for p in output.iterdir()} if output.is_dir() else set()
    # of a process that works there, or has: who may is asked later
    there.discard(".lock")
    if output.exists() and not output.is_dir():
        raise ValueError(f"preference: {output} is no folder: choose another --output")
    if path.name not in there:
        if there:
            raise ValueError(f"preference: {output} is not empty: choose another --output")
        return False
    # before its first step there is nothing to lose
    if there <= {path.name, *_OURS} and not any(map(_holds, (output / name for name in _OURS))):
        # a file that we did not write is somebody's own, whatever its name
        if config.dump(config.load(str(path), kind=FitConfig)) != path.read_text(encoding="utf-8"):
            raise ValueError(f"preference: {path} is not of a run: choose another --output")
        return False
    if not resume:
        begun = (output / "checkpoints").is_dir() and not (output / "fit.json").exists()
        raise ValueError(
            f"preference: {output} holds a run that has not ended: give --resume to go on with "
            "it, or another --output"
            if begun
            else f"preference: {output} is not empty: choose another --output"
        )
    before = config.identity(config.load(str(path), kind=FitConfig))
    if other := config.difference(settings, before):
        raise ValueError(
            f"preference: the run in {output} has {other}: resume it with its own settings, or "
            "choose another --output"
        )
    return True


def _holds(path: Path) -> bool:
    """Whether anything is in a file or folder."""
    return any(path.iterdir()) if path.is_dir() else path.exists() and path.stat().st_size > 0


def table(result: dict, settings: FitConfig) -> str:
    """The figures as Markdown."""
    lines = [
        f"| {settings.kind} model | training | held out |",
        "|---|---|---|",
        _row("pairs", f"{result['pairs']:,}", result, "pairs", ",.0f"),
    ]
    if settings.skip_long:
        skipped = f"{result['pairs_skipped']:,}"
        lines.append(_row("pairs too long, left out", skipped, result, "pairs_skipped", ",.0f"))
    lines += [
        _row(
            "cross-entropy (training: last tenth)",
            f"{result['loss']:.4f}",
            result,
            "cross_entropy",
            ".4f",
        ),
        _row("accuracy", "", result, "accuracy_0", ".4f"),
        _row("expected calibration error", "", result, "calibration_error", ".4f"),
    ]
    return "\n".join(lines) + "\n"


def _row(name: str, training: str, result: dict, key: str, form: str) -> str:
    held_out = result.get("held_out")
    return f"| {name} | {training} | {format(held_out[key], form) if held_out else ''} |"


def local_folder(trunk: str) -> str:
    """A folder as it is; a hub name is fetched, weights in safetensors alone."""
    # a hub name is one word, or two with a slash between them
    if Path(trunk).exists() or trunk.startswith((".", "/", "~")) or trunk.count("/") > 1:
        return trunk
    import huggingface_hub

    wanted = ["*.json", "*.safetensors", "*.model", "*.txt"]
    try:
        return huggingface_hub.snapshot_download(trunk, allow_patterns=wanted)
    # the hub's own errors are subclasses of these
    except (OSError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(
            f"{trunk}: no such folder, and not loaded from the hub: {reason}"
        ) from error


def _short(model, pairs, source: str):
    """The pairs whose texts the model can read, and how many others there are."""
    kept = []
    for i, texts in enumerate(zip(*pairs.texts(), strict=True)):
        try:
            for fields in model.sides(*texts):
                model.token_ids(fields)
        except ValueError:
            continue
        kept.append(i)
    if not kept:
        raise ValueError(f"{source}: no pair fits max_length = {model.max_length}; raise it")
    return pairs.select(kept), len(pairs) - len(kept)
