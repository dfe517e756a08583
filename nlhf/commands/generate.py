"""``nlhf generate``."""

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from nlhf import config, progress
from nlhf.commands import common, models
from nlhf.commands.settings import GenerateConfig

COMPLETIONS = "completions.jsonl"
DESCRIPTION = (
    "Draw responses from a model, or from its geometric mixture with a reference, with their exact "
    "log-probabilities under both. A run of nlhf train, a folder of LoRA adapters (whose base is "
    "then the reference) or any causal language model will do. What --output writes is what nlhf "
    "evaluate reads."
)
EXAMPLES = """\
  nlhf generate --model runs/quickstart --prompt "The film was" --n-samples 4
  nlhf generate --model runs/mine --prompts held_out.jsonl --output answers.jsonl
  nlhf generate --model runs/mine --ref hub-name --mixture-coef 0.125 --prompts held_out.jsonl \\
      --temperature 0.8 --output mixture && nlhf evaluate answers.jsonl mixture \\
      --preference my-preference"""


def add(commands) -> None:
    parser = common.add_parser(
        commands,
        "generate",
        "draw responses from a model or its mixture with a reference",
        DESCRIPTION,
        EXAMPLES,
        "docs/recipes.md",
    )
    common.add_config(parser, GenerateConfig)
    config.add_arguments(parser, GenerateConfig)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    settings = common.settings(arguments, GenerateConfig)
    if not settings.model:
        raise ValueError("generate: --model must be given: a folder, a run or a hub name")
    if bool(settings.prompt) == bool(settings.prompts):
        raise ValueError("generate: give either --prompt, a text, or --prompts, a file or hub name")
    if settings.prompt and not settings.prompt.strip():
        raise ValueError(f"generate: --prompt must not be empty, got {settings.prompt!r}")
    path = _path(settings.output) if settings.output else None
    rows = generate(settings)
    if path is None:
        for row in rows:
            sys.stdout.write(json.dumps(row, ensure_ascii=False) + "\n")
        return
    made = [folder for folder in path.parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    # whole or not there: a file that is cut short would pass for an answer to fewer prompts
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)
        # nothing is left behind but what is whole
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()
    sys.stdout.write(f"The responses are in {path}: give it to nlhf evaluate\n")


def _path(output: str) -> Path:
    """The file to write; ValueError if it is there, or the folder is one of something else."""
    path = Path(output)
    if path.suffix == ".jsonl":
        if path.exists():
            raise ValueError(f"generate: {path} exists: choose another --output")
        return path
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"generate: {path} is not empty: choose another --output")
    return path / COMPLETIONS


def generate(settings: GenerateConfig) -> Iterator[dict]:
    """A row a response: its texts, and in nats what it is worth under each distribution.

    The models are loaded before this returns, the responses drawn as rows are asked for.

    ``policy_logprob`` and, with a reference, ``ref_logprob`` are sums over the response's tokens,
    its end included, under the whole distributions at the temperature; ``sampling_logprob`` under
    the filtered mixture that was drawn from. ``tokens`` counts them; ``finished`` says whether the
    response ended by itself.

    Raises:
        ValueError: bad input.
    """
    where = models.find(settings.model)
    ref_where = models.find(settings.ref) if settings.ref else ""
    # after the cheap checks: torch and transformers take seconds to import
    import torch

    from nlhf import data, parts, policy

    device, dtype = parts.device_of(settings.device), getattr(torch, settings.dtype)
    prompts = [settings.prompt]
    if settings.prompts:
        prompts = data.read_prompts(settings.prompts, limit=settings.limit or None)
    code = {"trust_remote_code": settings.trust_remote_code}
    model, tokenizer = models.load(where, dtype, device, **code)
    ref = models.load(ref_where, dtype, device, **code)[0] if ref_where else None
    if settings.mixture_coef and ref is None and not policy.has_adapters(model):
        raise ValueError(
            "generate: --ref must be given for a --mixture-coef above 0, since the model has no "
            "LoRA adapters, whose base would be the reference"
        )
    if not settings.apply_chat_template:
        data.note_plain_prompts(prompts, tokenizer)
    return _draw(settings, prompts, model, ref, tokenizer, device)


def _draw(settings: GenerateConfig, prompts: list, model, ref, tokenizer, device) -> Iterator[dict]:
    from nlhf import data, parts, policy, rollout

    asked = data.as_messages(prompts) if settings.apply_chat_template else prompts
    end = parts.end_tokens(model, tokenizer)
    side = rollout.Side(model, settings.mixture_coef, settings.n_samples)
    starts = range(0, len(prompts), settings.batch_size)
    # what is printed shows how far it is
    for start in progress.track(starts, "generate", len(starts)) if settings.output else starts:
        batch = asked[start : start + settings.batch_size]
        (y,) = rollout.generate(
            [side],
            ref,
            *parts.encode(tokenizer, batch, device),
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            min_p=settings.min_p,
            eos_token_id=end,
            pad_token_id=tokenizer.pad_token_id,
            seed=parts.seeds(settings.seed, 0, [start + i for i in range(len(batch))], device),
            with_ref=ref is not None or policy.has_adapters(model),
            check=start == 0,
        )
        for i, row in enumerate(_rows(y, parts.decode(tokenizer, y), end)):
            yield {"prompt": prompts[start + i // settings.n_samples]} | row


def _rows(y, texts: list[str], end: list[int]) -> Iterator[dict]:
    names = ("policy", "ref", "sampling")
    sums = {name: getattr(y, f"{name}_logprobs") for name in names}
    for i, text in enumerate(texts):
        tokens = y.tokens[i][y.mask[i]].tolist()
        row = {"completion": text, "tokens": len(tokens), "finished": tokens[-1] in end}
        yield row | {
            f"{name}_logprob": x[i].sum().item() for name, x in sums.items() if x is not None
        }
