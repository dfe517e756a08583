"""Games from files."""

import csv
import os
import warnings
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
import torch

from nlhf.tabular.matrix_game import MatrixGame

SUFFIXES = (".csv", ".npy")
_UNREADABLE = (ValueError, EOFError, SyntaxError, TokenError, TypeError, OverflowError)


def read(path: str | os.PathLike, **settings: Any) -> MatrixGame:
    """The game in a file; ``settings`` are tau and ref of ``MatrixGame``.

    .npy: an array (Y, Y), or (X, Y, Y) for X contexts. .csv: Y lines of Y numbers, the i-th of
    which are P(i > j), with or without a line of names above, a column of names before, or both
    (then the corner is empty or a word).

    Raises:
        ValueError: names the file and, for .csv, the line and the column, counted from 1.
        OSError: the file cannot be read.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"read: {path} must end in {' or '.join(SUFFIXES)}")
    if path.suffix == ".npy":
        preference, names = _read_npy(path), None
    else:
        preference, names = _read_csv(path)
    try:
        return MatrixGame(preference, names=names, **settings)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _read_npy(path: Path) -> np.ndarray:
    try:
        with warnings.catch_warnings():
            # of files by Python 2, which are read all the same
            warnings.simplefilter("ignore")
            array = np.load(path, allow_pickle=False)
    # the header is parsed as Python's literals, and may promise more than there is memory
    except (*_UNREADABLE, MemoryError) as error:
        first = (str(error).splitlines() or ["it is empty"])[0]
        raise ValueError(f"{path}: not an array of numbers in .npy format: {first}") from None
    if (
        not isinstance(array, np.ndarray)
        or array.dtype.kind not in "biuf"
        or array.ndim not in (2, 3)
    ):
        what = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else "an archive"
        raise ValueError(f"{path}: must hold real numbers (Y, Y) or (X, Y, Y), got {what}")
    # torch has neither long doubles nor the other byte order
    return array.astype(np.float64, copy=False)


def _read_csv(path: Path) -> tuple[torch.Tensor, list[str] | None]:
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            rows = [(reader.line_num, [cell.strip() for cell in row]) for row in reader if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: not a text file with commas: {error}") from None
    if not rows:
        raise ValueError(f"{path}: no lines in it")
    width = len(rows[0][1])
    for line, cells in rows:
        if len(cells) != width:
            raise ValueError(f"{path}: line {line} has {len(cells)} columns, the first has {width}")
    header, labels = _layout(path, [cells for _, cells in rows])
    names = rows[0][1][labels:] if header else None
    rows = rows[header:]
    if labels:
        own = [cells[0] for _, cells in rows]
        if names is not None and names != own:
            raise ValueError(f"{path}: the names above and before differ: {names} and {own}")
        names = own
    values = torch.empty(len(rows), len(rows), dtype=torch.float64)
    for i, (line, cells) in enumerate(rows):
        values[i] = torch.tensor(
            [
                _probability(path, line, j, cell)
                for j, cell in enumerate(cells[labels:], 1 + labels)
            ],
            dtype=torch.float64,
        )
    return values, names


def _layout(path: Path, rows: list[list[str]]) -> tuple[int, int]:
    """How many lines and columns of names there are, 0 or 1 each; numbers may be names too."""
    height, width = len(rows), len(rows[0])
    if height == width:
        above, before = rows[0][1:], [cells[0] for cells in rows[1:]]
        corner = rows[0][0]
        words = above and not any(map(_is_number, above + before))
        both = bool(words) or (width > 1 and corner == "")
        return int(both), int(both)
    if abs(height - width) == 1:
        return max(height - width, 0), max(width - height, 0)
    raise ValueError(
        f"{path}: must have as many lines as columns, beside names, got {height} lines of {width}"
    )


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _probability(path: Path, line: int, column: int, cell: str) -> float:
    if not _is_number(cell):
        raise ValueError(f"{path}: line {line}, column {column}: {cell!r} is no number")
    value = float(cell)
    if not 0 <= value <= 1:
        raise ValueError(
            f"{path}: line {line}, column {column}: a preference must be in [0, 1], got {cell}"
        )
    return value
