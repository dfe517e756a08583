"""A folder in which processes put what they fetch or make, each thing once.

Who puts something there holds a lock, works in ``.work`` and renames what is complete; a kill
leaves ``.work`` to the next one, who empties it. Folders carry the hashes of their files.
"""

import contextlib
import errno
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import safetensors
from filelock import FileLock, Timeout

from nlhf import snapshots
from nlhf.loading import sha256

HASHES = "hashes.json"
# no room, none left to this user, none for a file of this size
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def working(store: Path) -> Iterator[Path]:
    """An empty folder in ``store`` for this process, the only one inside of such a body.

    Raises:
        ValueError: there is no room on the disk.
    """
    work = store / ".work"
    try:
        store.mkdir(parents=True, exist_ok=True)
        with _locked(store):
            # a child of a process that was killed may still write there, but to no name of ours
            shutil.rmtree(work, ignore_errors=True)
            snapshots.clean(store)
            work.mkdir(exist_ok=True)
            try:
                yield Path(tempfile.mkdtemp(dir=work))
            finally:
                shutil.rmtree(work, ignore_errors=True)
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{store}: cannot be written: {error}; make room, then try again"
        ) from error
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise ValueError(
            f"{store}: no room left on its disk ({error.strerror}): make some, then try again"
        ) from error


def put(new: Path, store: Path) -> Path:
    """Move a complete file or folder into ``store``, over one of its name."""
    if new.is_dir():
        files = sorted(path for path in new.rglob("*") if path.is_file())
        hashes = {path.relative_to(new).as_posix(): sha256(path) for path in files}
        (new / HASHES).write_text(json.dumps(hashes, indent=1), encoding="utf-8")
    alone = Path(tempfile.mkdtemp(dir=new.parent))
    os.replace(new, alone / new.name)
    snapshots.pour(alone, store, last=new.name)
    return store / new.name


def problem(folder: Path, marker: str) -> str:
    """Why a folder cannot be used; "" if it is as ``put`` left it, with the file ``marker``.

    One without hashes, of an earlier version, is looked at as far as its files tell themselves.
    """
    if not (folder / marker).is_file():
        return f"{marker} is not there"
    if not (folder / HASHES).exists():
        return _incomplete(folder)
    try:
        hashes = json.loads((folder / HASHES).read_text(encoding="utf-8"))
        for name, digest in hashes.items():
            if sha256(folder / name) != digest:
                return f"{name} does not match its hash"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is not there"
    except (ValueError, AttributeError) as error:
        return f"{HASHES} is damaged: {error}"
    return "" if marker in hashes else f"{marker} has no hash"


def tidy(store: Path) -> None:
    """Take away what a process has left that was killed when all was there, unless one works."""
    if (store / ".work").exists():
        with contextlib.suppress(Timeout), FileLock(store / ".lock").acquire(timeout=0):
            shutil.rmtree(store / ".work", ignore_errors=True)


def _incomplete(folder: Path) -> str:
    for path in folder.rglob("*"):
        try:
            if path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
            elif path.suffix == ".safetensors":
                # its header says how long the file is
                with safetensors.safe_open(path, "pt"):
                    pass
        except (ValueError, safetensors.SafetensorError) as error:
            return f"{path.name} is damaged: {error}"
    return ""


@contextlib.contextmanager
def _locked(store: Path) -> Iterator[None]:
    lock = FileLock(store / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logging.getLogger(__name__).warning("waiting for the process that is filling %s", store)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
