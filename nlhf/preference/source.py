"""A preference from what a user names: a callable, a folder, a server."""

import importlib
import inspect
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nlhf.preference.judge import HTTPJudge, JudgeConfig, load_judge
from nlhf.preference.models import load_preference
from nlhf.preference.protocol import Checked, first_line


def as_preference(source: Any, *, device: torch.device | str | None = None) -> Checked:
    """A checked preference from a callable, a "module:function", a saved folder or a judge.

    A judge is the YAML file of a ``JudgeConfig``, or the url of a server with a single model.
    device: where a saved model is put; a callable stays where it is.
    """
    if isinstance(source, Checked):
        return source
    if isinstance(source, str) and re.fullmatch(r"\w[\w.]*:[\w.]+", source):
        module, _, path = source.partition(":")
        try:
            target: Any = importlib.import_module(module)
            for name in path.split("."):
                target = getattr(target, name)
        # a name that ends in a dot is a ValueError of importlib
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(
                f"preference {source}: cannot be imported: {first_line(error)}"
            ) from error
        source = target
    elif isinstance(source, str) and re.match(r"https?://", source):
        source = HTTPJudge(JudgeConfig(url=source))
    elif isinstance(source, (str, os.PathLike)) and Path(source).suffix in (".yaml", ".yml"):
        source = load_judge(source)
    elif isinstance(source, (str, os.PathLike)):
        source = load_preference(source, device=device)
    if not callable(source):
        raise ValueError(
            "preference: must be a callable (prompts, first, second), a module:function, a saved "
            f"folder, or the url or YAML file of a judge, got {type(source).__name__}"
        )
    _check_arguments(source)
    return Checked(source)


def _check_arguments(function: Callable) -> None:
    """ValueError unless it can be called with three lists."""
    try:
        signature = inspect.signature(function)
    # some of C have none
    except (ValueError, TypeError):
        return
    try:
        signature.bind([], [], [])
    except TypeError as error:
        raise ValueError(f"preference: must take (prompts, first, second): {error}") from None
