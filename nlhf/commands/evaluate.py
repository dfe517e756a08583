"""``nlhf evaluate``."""

import argparse
import collections
import dataclasses
import gc
import json
import re
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path

from nlhf import config, progress
from nlhf.commands import common, models
from nlhf.commands.settings import EvaluateConfig

COMPLETIONS = "completions.jsonl"
DESCRIPTION = (
    "Compare any set of models and completions: the win rate of each against every other under a "
    "preference model, with intervals and a heat map, intransitive triples, and the equilibrium "
    "over the models. All answer the same prompts; what a model answers is kept, and can stand for "
    "it the next time."
)
EXAMPLES = """\
  nlhf evaluate runs/quickstart runs/nash-mp --preference my-preference --prompts held_out.jsonl
  nlhf evaluate before=hub-name after=runs/mine/model human=answers.jsonl \\
      --preference my_package.judge:prefer --prompts held_out.jsonl --samples 512
  nlhf evaluate evaluation/completions/*.jsonl --preference another-preference --output again"""


def add(commands) -> None:
    parser = common.add_parser(
        commands,
        "evaluate",
        "compare models, or completions, under a preference model",
        DESCRIPTION,
        EXAMPLES,
        "docs/recipes.md",
    )
    common.add_config(parser, EvaluateConfig, "[NAME=]PATH [NAME=]PATH ...")
    parser.add_argument(
        "contestants",
        nargs="+",
        metavar="[NAME=]PATH",
        help="a model (folder, run of nlhf train, LoRA adapters, hub name), or completions (a "
        f".jsonl or .parquet file with prompt and completion, a folder with {COMPLETIONS}, a data "
        "set of the hub with its #split)",
    )
    config.add_arguments(parser, EvaluateConfig)
    parser.set_defaults(run=run)


@dataclass(frozen=True)
class Contestant:
    name: str
    path: str
    completions: bool
    """whether ``path`` is read, rather than a model that answers"""


def run(arguments: argparse.Namespace) -> None:
    settings = common.settings(arguments, EvaluateConfig)
    _check(settings, arguments.contestants)
    contestants = resolve(arguments.contestants)
    output = Path(settings.output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"evaluate: {output} is not empty: choose another --output")
    # after the cheap checks: torch takes seconds to import
    from nlhf import arena, data, parts, preference

    device = parts.device_of(settings.device)
    saved = Path(settings.preference) / preference.CONFIG
    # a saved model waits until those that answer are out of memory
    judge = None if saved.is_file() else preference.as_preference(settings.preference)
    given = {c.name: data.read_completions(c.path) for c in contestants if c.completions}
    prompts, answers = _align(settings, contestants, given)
    try:
        for contestant in contestants:
            if not contestant.completions:
                answers[contestant.name] = answer(contestant, prompts, settings, device)
                # at once, since nothing else here takes so long
                _write(output, contestant.name, prompts, answers)
                # a model may be in a cycle of references
                gc.collect()
        ordered = {c.name: answers[c.name] for c in contestants}
        judge = judge or preference.as_preference(settings.preference, device=device)
        wins = arena.win_matrix(judge, parts.plain(prompts), ordered, progress=True)
    except ValueError as error:
        kept = f"; what the models answered is in {output / 'completions'}" * output.is_dir()
        raise ValueError(f"{error}{kept}") from error
    for name in given:
        _write(output, name, prompts, answers)
    triples = arena.intransitive_triples(wins.matrix, wins.half)
    balance = arena.equilibrium(wins, seed=settings.seed)
    text = arena.report(wins, triples, balance)
    result = {
        "settings": dataclasses.asdict(settings),
        "contestants": {c.name: c.path for c in contestants},
    } | arena.as_dict(wins, triples, balance)
    arena.heatmap(wins, output / "heatmap.png")
    (output / "report.md").write_text(text, encoding="utf-8")
    (output / "evaluation.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    sys.stdout.write(f"\n{text}\nThe evaluation is in {output}: report.md, evaluation.json, ")
    sys.stdout.write("heatmap.png, completions/\n")


def _write(output: Path, name: str, prompts: list, answers: dict) -> None:
    (output / "completions").mkdir(parents=True, exist_ok=True)
    rows = zip(prompts, answers[name], strict=True)
    lines = (json.dumps({"prompt": x, "completion": y}, ensure_ascii=False) for x, y in rows)
    path = output / "completions" / f"{name}.jsonl"
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def _check(settings: EvaluateConfig, contestants: list[str]) -> None:
    if not settings.preference:
        raise ValueError(
            "evaluate: --preference must be given: a folder that nlhf preference wrote, or "
            "module:function"
        )
    if len(contestants) < 2:
        raise ValueError(f"evaluate: needs two contestants at least, got {contestants[0]} alone")


# ---- who takes part


def resolve(texts: list[str]) -> list[Contestant]:
    """The contestants by their paths, with names that differ; ValueError names what is wrong."""
    given, paths = [], []
    for text in texts:
        name, equals, path = text.partition("=")
        named = equals and not Path(text).exists()
        if named and (not re.fullmatch(r"[^/\\]+", name) or name in (".", "..")):
            raise ValueError(f"evaluate: a name must be a word without a slash, got {text!r}")
        given.append(name if named else "")
        paths.append(path if named else text)
    found = [_find(path) for path in paths]
    names = _names(given, paths)
    return [Contestant(name, *place) for name, place in zip(names, found, strict=True)]


def _find(text: str) -> tuple[str, bool]:
    """(path, whether it is completions)."""
    from nlhf.data import SUFFIXES

    local = Path(text).expanduser()
    if local.is_file():
        if not text.endswith(SUFFIXES):
            raise ValueError(
                f"{text}: completions must be in a file that ends in one of {', '.join(SUFFIXES)}"
            )
        return str(local), True
    if local.is_dir():
        if (local / COMPLETIONS).is_file():
            return str(local / COMPLETIONS), True
        if not models.inside(local):
            names = f"{models.CONFIG}, {models.ADAPTER}"
            raise ValueError(f"{text}: holds neither a model ({names}) nor {COMPLETIONS}")
    elif models.is_hub_name(text) and "#" in text:
        return text, True
    return models.find(text), False


def _names(given: list[str], paths: list[str]) -> list[str]:
    """The given names, or as much of the end of a path as tells it from the others."""
    pieces, depth = [], [1] * len(paths)
    for path in paths:
        local = Path(path).expanduser()
        *folders, last = (local.absolute() if local.exists() else Path(path)).parts
        if local.is_file():
            last = re.sub(r"\.(jsonl|jsonl\.gz|parquet)$", "", last)
        last = last.replace("#", "-")
        folders = [folder for folder in folders if folder.strip("/\\")]
        generic = last == COMPLETIONS.removesuffix(".jsonl") and folders
        pieces.append(folders if generic else [*folders, last])
    while True:
        names = [
            name or "-".join(piece[-length:])
            for name, piece, length in zip(given, pieces, depth, strict=True)
        ]
        twice = [name for name, count in collections.Counter(names).items() if count > 1]
        if not twice:
            return names
        longer = [
            i
            for i, name in enumerate(names)
            if name in twice and not given[i] and depth[i] < len(pieces[i])
        ]
        if not longer:
            raise ValueError(
                f"evaluate: two contestants have the name {twice[0]!r}; give names, as in "
                f"NAME={paths[names.index(twice[0])]}"
            )
        for i in longer:
            depth[i] += 1


# ---- the same prompts for everybody


def _align(
    settings: EvaluateConfig, contestants: list[Contestant], given: dict
) -> tuple[list, dict]:
    """The prompts, and the completions of those contestants that bring theirs, in that order."""
    from nlhf import data

    if settings.prompts:
        prompts = data.read_prompts(settings.prompts, limit=settings.samples)
    elif given:
        prompts = _union(given)[: settings.samples]
    else:
        raise ValueError(
            "evaluate: --prompts must be given when all contestants are models: a file or hub name"
        )
    wanted = _keys(prompts)
    answers = {}
    for contestant in contestants:
        if contestant.name not in given:
            continue
        theirs, completions = given[contestant.name]
        found = dict(zip(_keys(theirs), completions, strict=True))
        missing = [i for i, key in enumerate(wanted) if key not in found]
        if missing:
            first = " ".join(data.plain_text(prompts[missing[0]]).split())
            count = "all" if len(missing) == len(wanted) else f"{len(missing)} of the"
            raise ValueError(
                f"{contestant.path}: lacks {count} {len(wanted)} prompts; the first of them is "
                f"{first[:80]!r}"
            )
        answers[contestant.name] = [found[key] for key in wanted]
    return prompts, answers


def _union(given: dict) -> list:
    """The prompts of all, in the order of the first; ValueError if no prompt is common to all."""
    keyed = [dict(zip(_keys(prompts), prompts, strict=True)) for prompts, _ in given.values()]
    if not set(keyed[0]).intersection(*keyed[1:]):
        raise ValueError(f"evaluate: {', '.join(given)} have no prompts in common")
    return list({key: prompt for prompts in keyed for key, prompt in prompts.items()}.values())


def _keys(prompts: list) -> list[tuple[str, int]]:
    """A prompt's plain text and how often it came before: one may be answered several times."""
    from nlhf.data import plain_text

    seen = collections.Counter()
    keys = []
    for prompt in prompts:
        text = plain_text(prompt)
        keys.append((text, seen[text]))
        seen[text] += 1
    return keys


# ---- the answers of a model


def answer(contestant: Contestant, prompts: list, settings: EvaluateConfig, device) -> list[str]:
    """Sampled completions of the prompts; the model is loaded here and lives no longer."""
    import torch

    from nlhf import data, parts, rollout

    model, tokenizer = models.load(contestant.path, getattr(torch, settings.dtype), device)
    # every contestant has noise of its own: P(a > b) is over independent draws
    stream = zlib.crc32(contestant.name.encode())
    texts = []
    if settings.apply_chat_template:
        prompts = data.as_messages(prompts)
    else:
        data.note_plain_prompts(prompts, tokenizer)
    starts = range(0, len(prompts), settings.batch_size)
    for start in progress.track(starts, contestant.name, len(starts)):
        batch = prompts[start : start + settings.batch_size]
        ids = list(range(start, start + len(batch)))
        (y,) = rollout.generate(
            [rollout.Side(model)],
            None,
            *parts.encode(tokenizer, batch, device),
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            eos_token_id=parts.end_tokens(model, tokenizer),
            pad_token_id=tokenizer.pad_token_id,
            seed=parts.seeds(settings.seed, stream, ids, device),
            with_ref=False,
        )
        texts += parts.decode(tokenizer, y)
    return texts
