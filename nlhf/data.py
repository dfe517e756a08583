"""Prompt and preference data sets: standard and conversational, from files or a hub name.

Formats (those of TRL): standard rows have strings under ``prompt``, or ``prompt``, ``chosen`` and
``rejected``; conversational rows have lists of ``{"role", "content"}`` messages there. A preference
row without a prompt shares the beginning of its two responses, which becomes the prompt; so does
one whose prompt is a string beside responses that are whole conversations (UltraFeedback). An
optional ``probability`` column holds P(chosen > rejected), 1.0 where it is missing.

A source is a .jsonl, .jsonl.gz or .parquet file, or a data set of the hub: ``name`` or
``name#split``, the split "train" where none is named.
"""

import contextlib
import gzip
import importlib.util
import json
import logging
import os
import shutil
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nlhf.names import shown

Text = str | list[dict[str, str]]

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
_MOST_BYTES = 2**26
_ROWS_AT_ONCE = 1000
_MOST_NAMES = 20


@dataclass(frozen=True)
class Preferences:
    """N pairs in four lists: chosen[i] beats rejected[i] with probability[i]."""

    prompt: list[Text]
    chosen: list[Text]
    rejected: list[Text]
    probability: list[float]

    def __post_init__(self) -> None:
        sizes = {len(self.prompt), len(self.chosen), len(self.rejected), len(self.probability)}
        if len(sizes) != 1:
            raise ValueError(
                f"Preferences: the four lists must have one length, got {sorted(sizes)}"
            )

    def __len__(self) -> int:
        return len(self.prompt)

    def select(self, indices: Sequence[int]) -> "Preferences":
        """The rows of `indices`, in that order."""
        columns = (self.prompt, self.chosen, self.rejected, self.probability)
        return Preferences(*([column[i] for i in indices] for column in columns))

    def texts(self) -> tuple[list[str], list[str], list[str]]:
        """(prompts, chosen, rejected) as plain strings, what a preference model is given."""
        return (
            [plain_text(p) for p in self.prompt],
            [plain_text(c) for c in self.chosen],
            [plain_text(r) for r in self.rejected],
        )


def read_prompts(
    source: str | os.PathLike,
    *,
    column: str = "prompt",
    split: str = "train",
    limit: int | None = None,
) -> list[Text]:
    """The prompts of a data set: strings, or lists of messages where it is conversational.

    source: a file, or a hub name; of a preference data set, the prompts that it is read with.
    split: that of a hub name which names none itself.
    limit: read at most so many rows. Raises ValueError naming file, row and column.
    """
    prompts = []
    for where, row in _rows(source, split, limit):
        if _in_responses(row, column):
            prompts.append(_pair(row, where, column)[0])
            continue
        _need(row, (column,), where)
        prompts.append(_check_text(row[column], column, where, empty_ok=False))
    return prompts


def read_preferences(
    source: str | os.PathLike, *, split: str = "train", limit: int | None = None
) -> Preferences:
    """The pairs of a preference data set; arguments and errors as in `read_prompts`."""
    columns: tuple[list, ...] = ([], [], [], [])
    for where, row in _rows(source, split, limit):
        probability = row.get("probability")
        values = (*_pair(row, where), _check_probability(probability, where))
        for values_so_far, value in zip(columns, values, strict=True):
            values_so_far.append(value)
    return Preferences(*columns)


def read_completions(
    source: str | os.PathLike, *, split: str = "train", limit: int | None = None
) -> tuple[list[Text], list[str]]:
    """Prompts as in `read_prompts`, and what the column ``completion`` answers, as plain text."""
    prompts, completions = [], []
    for where, row in _rows(source, split, limit):
        _need(row, ("prompt", "completion"), where)
        prompts.append(_check_text(row["prompt"], "prompt", where, empty_ok=False))
        answer = _check_text(row["completion"], "completion", where, empty_ok=True)
        completions.append(plain_text(answer))
    return prompts, completions


def render_prompt(prompt: Text, tokenizer: Any, **template) -> str:
    """The string that a policy continues: messages through the chat template, a string as it is.

    A last message of the assistant is left open for the policy to continue. ``template`` are
    arguments of the chat template. Raises ValueError for a tokenizer without a chat template, or
    one whose template refuses the messages.
    """
    if isinstance(prompt, str):
        return prompt
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "render_prompt: the tokenizer has no chat template for a conversational prompt; "
            "set tokenizer.chat_template or use a data set of plain strings"
        )
    import jinja2

    open_end = prompt[-1]["role"] == "assistant"
    try:
        return tokenizer.apply_chat_template(
            prompt,
            tokenize=False,
            add_generation_prompt=not open_end,
            continue_final_message=open_end,
            **template,
        )
    except jinja2.TemplateError as error:
        raise ValueError(
            f"render_prompt: the chat template refuses the messages: {error}"
        ) from error


def as_messages(prompts: list[Text]) -> list[Text]:
    """Every string as one message of the user, which ``render_prompt`` puts into the template."""
    return [[{"role": "user", "content": p}] if isinstance(p, str) else p for p in prompts]


def note_plain_prompts(prompts: list[Text], tokenizer: Any) -> None:
    """A line in the log where strings are continued as they are by a model that has a template."""
    if getattr(tokenizer, "chat_template", None) and any(isinstance(p, str) for p in prompts):
        logging.getLogger(__name__).info(
            "the tokenizer has a chat template, which prompts that are plain strings do not go "
            "through: give apply_chat_template if the model should see them as a user's message"
        )


def plain_text(text: Text) -> str:
    """A text without any tokenizer's markup: one message is its content, several a transcript."""
    if isinstance(text, str):
        return text
    if len(text) == 1:
        return text[0]["content"]
    return "\n".join(f"{message['role']}: {message['content']}" for message in text)


@contextlib.contextmanager
def replace_folder(folder: str | os.PathLike, marker: str | None = None) -> Iterator[Path]:
    """A new folder beside `folder`, renamed to it when the body ends: never a half-written one.

    An existing `folder` is replaced only if empty or with the file `marker` in it; else ValueError.
    """
    folder = Path(folder).absolute()
    if folder.exists():
        ours = folder.is_dir() and (
            not any(folder.iterdir()) or (marker is not None and (folder / marker).is_file())
        )
        if not ours:
            raise ValueError(f"{folder}: exists and is something else; choose another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = folder.with_name(f".{folder.name}.{os.getpid()}.new")
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    try:
        yield beside
        if folder.exists():
            os.replace(folder, old)
        os.replace(beside, folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _rows(source: str | os.PathLike, split: str, limit: int | None) -> Iterator[tuple[str, dict]]:
    """(where, row) for each row; `where` names file and line for an error message."""
    name = os.fspath(source)
    path = Path(name)
    if limit is not None and limit < 1:
        raise ValueError(f"data: limit must be at least 1, got {limit}")
    try:
        is_file, is_folder = path.is_file(), path.is_dir()
    # a name that is too long for example
    except OSError as error:
        raise ValueError(f"{shown(name)}: cannot be read: {error.strerror}") from None
    if is_folder:
        raise ValueError(f"{name}: is a folder; name one of its {', '.join(SUFFIXES)} files")
    if is_file or name.endswith(SUFFIXES):
        if not is_file:
            raise ValueError(f"{name}: no such file")
        if not name.endswith(SUFFIXES):
            raise ValueError(f"{name}: must end in one of {', '.join(SUFFIXES)}")
        rows = _parquet_rows(name) if name.endswith(".parquet") else _jsonl_rows(name)
    else:
        rows = _hub_rows(name, split)
    count = 0
    for where, row in rows:
        if limit is not None and count == limit:
            break
        count += 1
        yield where, row
    if count == 0:
        raise ValueError(f"{name}: has no rows")


def _jsonl_rows(name: str) -> Iterator[tuple[str, dict]]:
    opener = gzip.open if name.endswith(".gz") else open
    number = 0
    try:
        with opener(name, "rb") as lines:
            # one more than may be, to tell: a small gzip file may hold a line without end
            while line := lines.readline(_MOST_BYTES + 1):
                number += 1
                where = f"{name}, line {number}"
                if len(line) > _MOST_BYTES:
                    raise ValueError(f"{where}: is longer than {_MOST_BYTES // 2**20} MiB")
                if line.strip():
                    yield where, _json_row(line, where)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{name}, after line {number}: cannot be read: {error}") from error


def _json_row(line: bytes, where: str) -> dict:
    try:
        # the mark of some editors before the first line says nothing
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: is not UTF-8; convert it") from error
    # also of an integer with more digits than Python reads
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where}: must be a JSON object, got {type(row).__name__}")
    return row


def _parquet_rows(name: str) -> Iterator[tuple[str, dict]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(f"{name}: reading parquet needs `pip install pyarrow`") from error
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(name) as table:
            names = table.schema_arrow.names
            twice = {column for column in names if names.count(column) > 1}
            if twice:
                raise ValueError(f"{name}: has the column {min(twice)} twice; leave one out")
            for batch in table.iter_batches(_ROWS_AT_ONCE):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{name}, row {number}", row
    # pyarrow raises the others over pages and texts that are damaged
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError, ArithmeticError) as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(
            f"{name}, after row {number}: cannot be read as parquet: {first}"
        ) from error


def _hub_rows(name: str, split: str) -> Iterator[tuple[str, dict]]:
    name, mark, named = name.partition("#")
    if mark and (Path(name).is_file() or not named):
        raise ValueError(f"{name}#{named}: #split is for a data set of the hub, not for a file")
    split = named or split
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"{name}: no such file; a hub name needs `pip install datasets`"
        ) from error
    # such a name, as json is, would have it read whatever lies in the working folder
    if name.isidentifier() and importlib.util.find_spec(f"datasets.packaged_modules.{name}"):
        raise ValueError(f"{name}: is a format, and no data set; name a file or a data set")
    try:
        table = datasets.load_dataset(name, split=split)
    # the hub's own errors (not found, gated, offline, bad split) are subclasses of these
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{name}: no such file, and not loaded from the hub with split {split!r}: {reason}"
        ) from error
    for number, row in enumerate(table, start=1):
        yield f"{name} ({split}), row {number}", row


def _in_responses(row: dict, column: str) -> bool:
    """Whether both responses begin with the prompt, which the row lacks or has as a bare string."""
    prompt, chosen, rejected = (row.get(name) for name in (column, "chosen", "rejected"))
    if prompt is None:
        return chosen is not None and rejected is not None
    conversations = isinstance(chosen, list) and isinstance(rejected, list)
    return (
        isinstance(prompt, str) and conversations and len(chosen) > 1 and chosen[:1] == rejected[:1]
    )


def _pair(row: dict, where: str, column: str = "prompt") -> tuple[Text, Text, Text]:
    """(prompt, chosen, rejected) of a preference row."""
    _need(row, ("chosen", "rejected"), where)
    chosen = _check_text(row["chosen"], "chosen", where, empty_ok=True)
    rejected = _check_text(row["rejected"], "rejected", where, empty_ok=True)
    if type(chosen) is not type(rejected):
        raise ValueError(f"{where}: chosen and rejected must both be strings or both messages")
    if _in_responses(row, column):
        return _split_prefix(chosen, rejected, where)
    prompt = _check_text(row[column], column, where, empty_ok=False)
    if type(prompt) is not type(chosen):
        raise ValueError(f"{where}: prompt and responses must all be strings or all messages")
    return prompt, chosen, rejected


def _need(row: dict, names: tuple[str, ...], where: str) -> None:
    missing = [name for name in names if name not in row]
    if missing:
        raise ValueError(
            f"{where}: lacks the column {', '.join(missing)}; it has {_named(row) or 'none'}, "
            f"and needs {', '.join(names)}"
        )


def _named(row: dict) -> str:
    names = [name if name.isidentifier() else shown(name) for name in list(row)[:_MOST_NAMES]]
    return ", ".join(names) + ", ..." * (len(row) > _MOST_NAMES)


def _check_text(text: Any, column: str, where: str, *, empty_ok: bool) -> Text:
    """A string as it is, or messages reduced to role and content."""
    if isinstance(text, str):
        _check_unicode(text, column, where)
        if not empty_ok and not text.strip():
            raise ValueError(f"{where}: {column} must not be empty")
        return text
    if not isinstance(text, list):
        raise ValueError(
            f"{where}: {column} must be a string or a list of messages, got {type(text).__name__}"
        )
    if not text:
        raise ValueError(f"{where}: {column} must not be empty")
    for message in text:
        good = isinstance(message, dict) and all(
            isinstance(message.get(key), str) for key in ("role", "content")
        )
        if not good:
            raise ValueError(
                f"{where}: every message of {column} must have a role and a content that are "
                f"strings, got {shown(message)}"
            )
    if not empty_ok and not any(message["content"].strip() for message in text):
        raise ValueError(f"{where}: {column} must not be empty")
    _check_unicode(plain_text(text), column, where)
    return [{"role": message["role"], "content": message["content"]} for message in text]


def _check_unicode(text: str, column: str, where: str) -> None:
    """JSON can spell half a surrogate pair, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{where}: {column} is not valid Unicode (a lone surrogate)") from None


def _check_probability(value: Any, where: str) -> float:
    if value is None:
        return 1.0
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    # written so that NaN fails it
    if not (number and 0 <= value <= 1):
        raise ValueError(f"{where}: probability must be a number in [0, 1], got {shown(value)}")
    return float(value)


def _split_prefix(chosen: Text, rejected: Text, where: str) -> tuple[Text, Text, Text]:
    """The common beginning as prompt: whole messages, or whole words of two strings."""
    shortest = min(len(chosen), len(rejected))
    same = next((i for i in range(shortest) if chosen[i] != rejected[i]), shortest)
    if isinstance(chosen, str):
        # a word that the two only begin alike belongs to the responses, with the space before it
        while same and not (chosen[same:][:1].isspace() and rejected[same:][:1].isspace()):
            same -= 1
    elif same == shortest:
        # a response must keep at least its last message
        same -= 1
    if same < 1 or not plain_text(chosen[:same]).strip():
        raise ValueError(
            f"{where}: has no prompt column, and chosen and rejected share no beginning to take "
            "for one; add a prompt"
        )
    return chosen[:same], chosen[same:], rejected[same:]
