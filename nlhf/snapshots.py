"""What a run has reached, in folders: written beside and renamed, hashed, the last few kept.

A process that is killed leaves the last complete one. One that is damaged, or of somebody else, is
found out before anything of it is used, and the one before it is.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout

from nlhf.data import replace_folder
from nlhf.distributed import ALONE, World
from nlhf.loading import sha256

T = TypeVar("T")

STATE = "state.json"
_NAME = re.compile(r"step-(\d{6,})")
# what a killed process leaves: the name, its number
_LEFT = re.compile(r"\.(.+)\.\d+\.(new|old)")


def complete(folder: Path) -> list[Path]:
    """The snapshots in a folder, that of the fewest steps first."""
    found = [(int(m[1]), path) for path in folder.glob("*") if (m := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def path_of(folder: Path, step: int) -> Path:
    """Where the snapshot of so many steps is."""
    return folder / f"step-{step:06d}"


@contextlib.contextmanager
def new(folder: Path, step: int) -> Iterator[Path]:
    """A folder to write a snapshot into, and ``seal``; in its place when the body ends."""
    with replace_folder(path_of(folder, step), marker=STATE) as place:
        yield place
    _flush(folder)


def seal(place: Path, step: int, **state: Any) -> None:
    """Hash every file of a new snapshot, see them onto the disk, and write ``state`` down."""
    hashes = {}
    for path in sorted(place.iterdir()):
        hashes[path.name] = sha256(path)
        _flush(path)
    whole = {"step": step, "files": hashes, **state}
    write(place / STATE, json.dumps({"state": whole, "sha256": _digest(whole)}, indent=1))


def checked(snapshot: Path) -> dict[str, Any]:
    """What ``seal`` wrote, after a look at every file.

    Raises:
        ValueError, OSError: a file is missing, or not what it was, or there is one too many.
    """
    whole = json.loads((snapshot / STATE).read_text(encoding="utf-8"))
    if not isinstance(whole, dict) or "state" not in whole or "sha256" not in whole:
        raise ValueError(f"{STATE} is none of ours")
    state = whole["state"]
    if _digest(state) != whole["sha256"]:
        raise ValueError(f"{STATE} does not match its hash")
    step, hashes = state["step"], state["files"]
    if path_of(snapshot.parent, step) != snapshot:
        raise ValueError(f"{STATE} is that of step {step}")
    for path in snapshot.iterdir():
        if path.name != STATE and path.name not in hashes:
            raise ValueError(f"{path.name} is none of its files")
    for name, wanted in hashes.items():
        if sha256(snapshot / name) != wanted:
            raise ValueError(f"{name} does not match its hash")
    return state


def newest(folder: Path, read: Callable[[Path], T], world: World = ALONE) -> T | None:
    """What ``read`` returns for the last snapshot that it can read; None if there is none at all.

    Those that it cannot are named, and renamed once a good one has been found.

    Raises:
        ValueError: there are some, and ``read`` has raised it for all of them.
    """
    failures: list[tuple[Path, ValueError]] = []
    for snapshot in reversed(world.first(lambda: complete(folder))):
        try:
            found = read(snapshot)
        except ValueError as error:
            failures.append((snapshot, error))
            continue
        for damaged, error in failures:
            aside = world.first(lambda damaged=damaged: _set_aside(damaged))
            logging.getLogger(__name__).warning("%s; it is now called %s", error, aside.name)
        if failures:
            logging.getLogger(__name__).warning("the run goes on from %s", snapshot)
        return found
    if failures:
        what = "there is no other" if len(failures) == 1 else f"nor can the others in {folder}"
        raise ValueError(f"{failures[0][1]}; {what}: delete {folder} to start again from step 0")
    return None


@contextlib.contextmanager
def said(folder: Path, step: int, *kinds: type[Exception]) -> Iterator[None]:
    """A snapshot that cannot be written ends the run in one line that names the last good one."""
    try:
        yield
    except (OSError, *kinds) as error:
        last = complete(folder)[-1:]
        kept = f"the last complete one is {last[0]}" if last else "there is none before it"
        raise ValueError(
            f"checkpoint {path_of(folder, step)}: cannot be written: {_reason(error)}; {kept}: "
            "make room, then go on with --resume"
        ) from error


def forget(folder: Path, keep: int) -> None:
    """Delete all but the last ``keep``."""
    for old in complete(folder)[:-keep]:
        # one that is half deleted must not pass for a snapshot
        gone = old.with_name(f".{old.name}.{os.getpid()}.old")
        os.replace(old, gone)
        shutil.rmtree(gone)


@contextlib.contextmanager
def alone(output: Path, when: bool = True) -> Iterator[None]:
    """Inside it no other process works on the run in this folder; ``when``: it is to be locked.

    Raises:
        ValueError: one does.
    """
    if not when:
        yield
        return
    lock = FileLock(output / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(
            f"{output}: another process works on this run; wait for its end, or choose another "
            "--output"
        ) from None
    try:
        yield
    finally:
        lock.release()


def clean(folder: Path) -> None:
    """Take away what a process that was killed has left in the middle of its writing."""
    for path in folder.glob(".*"):
        if not (found := _LEFT.fullmatch(path.name)):
            continue
        place = path.with_name(found[1])
        if found[2] == "old" and not place.exists() and not _NAME.fullmatch(found[1]):
            # between two renames: the new one is not there yet
            os.replace(path, place)
        elif path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def write(path: Path, text: str) -> None:
    """A file that is there whole or not at all."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """As ``write``."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        beside.write_bytes(content)
        _flush(beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def pour(source: Path, folder: Path, last: str) -> None:
    """Move what is in a folder into another, over files and folders of the same names.

    ``last``, the file that says that the others are there, goes when they are on the disk.
    """
    for path in source.rglob("*"):
        _flush(path)
    for path in sorted(source.iterdir(), key=lambda path: path.name == last):
        target = folder / path.name
        if target.is_dir():
            shutil.rmtree(target)
        if path.name == last:
            _flush(folder)
        os.replace(path, target)
    _flush(folder)
    source.rmdir()


def _set_aside(snapshot: Path) -> Path:
    aside = snapshot.with_name(f"damaged-{snapshot.name}")
    for i in range(2, 1000):
        if not aside.exists():
            break
        aside = snapshot.with_name(f"damaged-{snapshot.name}-{i}")
    os.replace(snapshot, aside)
    return aside


def _reason(error: BaseException) -> str:
    # torch wraps what each process raised
    failures = getattr(error, "failures", None) or {}
    inner = next(iter(failures.values()), (error,))[0]
    if isinstance(inner, OSError) and inner.strerror:
        return inner.strerror
    return next(iter(str(inner).splitlines()), type(inner).__name__)


def _flush(path: Path) -> None:
    """Onto the disk: a machine may lose its power too."""
    # a folder can be opened so on Unix alone
    if path.is_dir() and os.name != "posix":
        return
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _digest(state: Any) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
