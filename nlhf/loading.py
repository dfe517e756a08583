"""Folders in the formats of other packages: no pickle is read, and errors name the folder."""

import hashlib
import os
from contextlib import AbstractContextManager
from pathlib import Path

_CODE = "trust_remote_code=True"


class reading(AbstractContextManager):
    """``ValueError`` in one line, "``path``: ``what`` cannot be loaded", for whatever comes up.

    transformers, peft and tokenizers raise errors of any class over a file that is damaged, plain
    ``Exception`` and the panics of Rust among them, so that no list of classes would hold them.
    """

    def __init__(self, path: str | os.PathLike, what: str):
        self._name = f"{path}: {what}"

    def __exit__(self, kind, error, trace) -> None:
        # a panic is derived from BaseException, beside KeyboardInterrupt and SystemExit
        if not isinstance(error, Exception) and getattr(kind, "__name__", "") != "PanicException":
            return
        if _CODE in str(error):
            raise ValueError(
                f"{self._name} comes with code of its own; read it, and where there is the flag "
                "--trust-remote-code, give it"
            ) from error
        line = next(iter(str(error).strip().splitlines()), "") or kind.__name__
        raise ValueError(f"{self._name} cannot be loaded: {line}") from error


def check_weights(folder: str | os.PathLike, name: str = "model") -> None:
    """ValueError for a folder of pickles: nothing reads them here, since they may hold code.

    name: of the weights' file without its end; a name of the hub is left to who fetches it.
    """
    folder = Path(folder)
    if folder.is_dir() and not any(folder.glob(f"{name}*.safetensors")):
        raise ValueError(
            f"{folder}: holds no {name}.safetensors, and weights are read from no other format; "
            "save them with save_pretrained of a recent transformers or peft"
        )


def sha256(path: Path) -> str:
    """Of the bytes of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
