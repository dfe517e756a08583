"""``nlhf preference``."""

import argparse
import json
import sys
from pathlib import Path

from nlhf import config
from nlhf.commands import common
from nlhf.config import FitConfig

DESCRIPTION = (
    "Train a model that says how likely one response to a prompt beats another, from pairs of "
    "which one was preferred: what --preference of the other commands reads. A pairwise model "
    "reads both responses and can learn cycles; a reward model (Bradley-Terry) scores each alone. "
    "Every setting is a flag and a line of the --config file, of which flags win."
)
EXAMPLES = """\
  nlhf preference --trunk path/or/hub-name --pairs pairs.jsonl --held-out held_out.jsonl \\
      --output my-preference
  nlhf preference --config tldr-preference
  nlhf preference --trunk hub-name --pairs pairs.jsonl --kind reward --freeze-trunk"""
# what it was called before
OLD_NAME = "fit-preference"


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
        config.add_arguments(each, FitConfig)
        each.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    if arguments.command == OLD_NAME:
        sys.stderr.write(f"nlhf {OLD_NAME} is deprecated: it is now called nlhf preference\n")
    settings = common.settings(arguments, FitConfig)
    result = fit(settings)
    sys.stdout.write("\n" + table(result, settings))
    sys.stdout.write(f"\nThe preference model is in {settings.output}: give it as --preference\n")


def fit(settings: FitConfig) -> dict:
    """Train as configured, save into ``settings.output`` and return the figures of `fit.json`.

    Raises:
        ValueError: bad input, or an output folder that is not empty.
    """
    for name in ("trunk", "pairs"):
        if not getattr(settings, name):
            raise ValueError(f"config: {name} must be given")
    output = Path(settings.output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"preference: {output} is not empty: choose another --output")
    # after the cheap checks: torch and transformers take seconds to import
    import torch

    from nlhf import data, parts, preference, preference_fit

    device = parts.device_of(settings.device)
    limit = settings.limit or None
    pairs = data.read_preferences(settings.pairs, limit=limit)
    held_out = data.read_preferences(settings.held_out, limit=limit) if settings.held_out else None
    trunk, tokenizer = preference.load_trunk(
        local_folder(settings.trunk), getattr(torch, settings.dtype)
    )
    template = {"template": settings.template} if settings.template else {}
    model = preference.KINDS[settings.kind](
        trunk.to(device),
        tokenizer,
        pooling=settings.pooling,
        n_layers=settings.n_layers or None,
        freeze_trunk=settings.freeze_trunk,
        max_length=settings.max_length or None,
        truncate=settings.truncate,
        **template,
    )
    result = {}
    if settings.skip_long:
        pairs, result["pairs_skipped"] = _short(model, pairs, settings.pairs)
    losses = preference_fit.fit(
        model,
        pairs,
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        lr=settings.learning_rate,
        l2=settings.l2,
        seed=settings.seed,
        progress=True,
    )
    # the mean of a tenth, since a single batch is noise
    last = losses[-max(1, len(losses) // 10) :]
    result |= {"pairs": len(pairs), "loss": sum(last) / len(last)}
    model.save_pretrained(output)
    if held_out:
        result["held_out"] = {}
        if settings.skip_long:
            held_out, result["held_out"]["pairs_skipped"] = _short(
                model, held_out, settings.held_out
            )
        result["held_out"] |= preference_fit.evaluate(model, held_out)
    config.save(settings, output / "config.yaml")
    (output / "fit.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    return result


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
