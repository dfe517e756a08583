"""``nlhf evaluate``."""

import argparse
import collections
import difflib
import gc
import json
import re
import sys
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path

COMPLETIONS = "completions.jsonl"
_MODEL, _ADAPTER = "config.json", "adapter_config.json"


def add(commands) -> None:
    parser = commands.add_parser(
        "evaluate",
        help="compare models, or completions, under a preference model",
        description="The win rate of every model against every other under a preference model, "
        "with intervals, intransitive triples and the equilibrium over the models.",
    )
    add_flag = parser.add_argument
    add_flag(
        "contestants",
        nargs="+",
        metavar="[NAME=]PATH",
        help="a model (folder, run of nlhf train, LoRA adapters, hub name), or completions (a "
        f".jsonl or .parquet file with prompt and completion, a folder with {COMPLETIONS}, a data "
        "set of the hub with its #split)",
    )
    add_flag(
        "--preference",
        default="",
        help='folder of a saved preference or reward model, or "module:function" of our protocol',
    )
    add_flag(
        "--prompts",
        default="",
        help="a .jsonl, .jsonl.gz or .parquet file, or a hub name with its #split (default: the "
        "prompts of the contestants that are completions)",
    )
    add_flag("--samples", type=int, default=256, help="prompts, the first ones (default: 256)")
    add_flag("--max-new-tokens", type=int, default=64, help="longest completion (default: 64)")
    add_flag("--temperature", type=float, default=1.0, help="of sampling (default: 1.0)")
    add_flag(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16", "float64"),
        help="of the models (default: float32)",
    )
    add_flag("--device", default="auto", help="auto, cpu, cuda or cuda:1 (default: auto)")
    add_flag("--seed", type=int, default=0, help="of the draws (default: 0)")
    add_flag("--batch-size", type=int, default=32, help="prompts at once (default: 32)")
    add_flag("--output", default="evaluation", help="a new folder (default: evaluation)")
    parser.set_defaults(run=run)


@dataclass(frozen=True)
class Contestant:
    name: str
    path: str
    completions: bool
    """whether ``path`` is read, rather than a model that answers"""


def run(arguments: argparse.Namespace) -> None:
    _check(arguments)
    contestants = resolve(arguments.contestants)
    output = Path(arguments.output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"evaluate: {output} is not empty: choose another --output")
    # after the cheap checks: torch takes seconds to import
    from nlhf import arena, data, parts, preference

    device = parts.device_of(arguments.device)
    saved = Path(arguments.preference) / preference.CONFIG
    # a saved model waits until those that answer are out of memory
    judge = None if saved.is_file() else preference.as_preference(arguments.preference)
    given = {c.name: data.read_completions(c.path) for c in contestants if c.completions}
    prompts, answers = _align(arguments, contestants, given)
    for contestant in contestants:
        if not contestant.completions:
            answers[contestant.name] = answer(contestant, prompts, arguments, device)
            # at once, since nothing else here takes so long
            _write(output, contestant.name, prompts, answers)
            # a model may be in a cycle of references
            gc.collect()
    judge = judge or preference.as_preference(arguments.preference, device=device)
    ordered = {c.name: answers[c.name] for c in contestants}
    for name in given:
        _write(output, name, prompts, answers)
    wins = arena.win_matrix(judge, parts.plain(prompts), ordered, progress=True)
    triples = arena.intransitive_triples(wins.matrix, wins.half)
    balance = arena.equilibrium(wins, seed=arguments.seed)
    text = arena.report(wins, triples, balance)
    skip = ("command", "run", "contestants")
    result = {
        "settings": {k: v for k, v in vars(arguments).items() if k not in skip},
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


def _check(arguments: argparse.Namespace) -> None:
    limits = {"samples": 1, "max_new_tokens": 1, "batch_size": 1}
    for name, low in limits.items():
        if getattr(arguments, name) < low:
            flag = name.replace("_", "-")
            raise ValueError(
                f"evaluate: --{flag} must be at least {low}, got {getattr(arguments, name)}"
            )
    if not 0 < arguments.temperature < 1e30:
        raise ValueError(
            f"evaluate: --temperature must be above 0 and finite, got {arguments.temperature}"
        )
    if not -(2**63) <= arguments.seed < 2**63:
        raise ValueError(f"evaluate: --seed must be a 64-bit integer, got {arguments.seed}")
    if not arguments.preference:
        raise ValueError(
            "evaluate: --preference must be given: a folder that fit-preference wrote, or "
            "module:function"
        )
    if len(arguments.contestants) < 2:
        raise ValueError(
            f"evaluate: needs two contestants at least, got {arguments.contestants[0]} alone"
        )


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
        # the last is a run of nlhf train
        for folder, file in ((local, _MODEL), (local, _ADAPTER), (local / "model", _MODEL)):
            if (folder / file).is_file():
                return str(folder), False
        raise ValueError(f"{text}: holds neither a model ({_MODEL}, {_ADAPTER}) nor {COMPLETIONS}")
    # a hub name is one word, or two with a slash between them
    hub = text and text.count("/") < 2 and not text.startswith((".", "/", "~"))
    if hub and "#" in text:
        return text, True
    if not hub or text.endswith(SUFFIXES) or ("/" in text and local.parent.is_dir()):
        raise ValueError(f"{text or repr(text)}: no such file or folder{_beside(local)}")
    return text, False


def _beside(path: Path) -> str:
    """What lies there with a name like that, as a suggestion."""
    names = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, names, n=1)
    return f"; do you mean {path.parent / close[0]}?" if close else ""


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


def _align(arguments, contestants: list[Contestant], given: dict) -> tuple[list, dict]:
    """The prompts, and the completions of those contestants that bring theirs, in that order."""
    from nlhf import data

    if arguments.prompts:
        prompts = data.read_prompts(arguments.prompts, limit=arguments.samples)
    elif given:
        prompts = _union(given)[: arguments.samples]
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


def answer(contestant: Contestant, prompts: list, arguments, device) -> list[str]:
    """Sampled completions of the prompts; the model is loaded here and lives no longer."""
    import torch
    from tqdm import tqdm

    from nlhf import parts, rollout

    model, tokenizer = load(contestant.path, getattr(torch, arguments.dtype), device)
    # every contestant has noise of its own: P(a > b) is over independent draws
    stream = zlib.crc32(contestant.name.encode())
    texts = []
    for start in tqdm(range(0, len(prompts), arguments.batch_size), desc=contestant.name):
        batch = prompts[start : start + arguments.batch_size]
        ids = list(range(start, start + len(batch)))
        (y,) = rollout.generate(
            [rollout.Side(model)],
            None,
            *parts.encode(tokenizer, batch, device),
            max_new_tokens=arguments.max_new_tokens,
            temperature=arguments.temperature,
            eos_token_id=parts.end_tokens(model, tokenizer),
            pad_token_id=tokenizer.pad_token_id,
            seed=parts.seeds(arguments.seed, stream, ids, device),
            with_ref=False,
        )
        texts += parts.decode(tokenizer, y)
    return texts


def load(path: str, dtype, device) -> tuple:
    """(model, tokenizer) of a folder or hub name, or of a folder of LoRA adapters on their base."""
    from nlhf import policy

    folder = Path(path)
    if (folder / _MODEL).is_file() or not (folder / _ADAPTER).is_file():
        try:
            return policy.load_model(path, dtype, device), policy.load_tokenizer(path)
        except ValueError as error:
            hint = "" if folder.exists() else _beside(folder)
            raise ValueError(f"{error}{hint}") from error
    try:
        base = json.loads((folder / _ADAPTER).read_text(encoding="utf-8"))[
            "base_model_name_or_path"
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: {_ADAPTER} names no base model: {error}") from error
    import peft

    own = (folder / "tokenizer_config.json").is_file()
    tokenizer = policy.load_tokenizer(path if own else base)
    model = policy.load_model(base, dtype, device)
    try:
        with warnings.catch_warnings():
            # peft still asks transformers by a name that 5.23 deprecates
            warnings.filterwarnings(
                "ignore", message=".*gradient_checkpointing", category=FutureWarning
            )
            return peft.PeftModel.from_pretrained(model, path).eval(), tokenizer
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"{path}: the adapters cannot be loaded: {first}") from error
