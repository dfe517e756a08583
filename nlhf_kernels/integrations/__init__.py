"""The ops inside other codebases, with the signatures and results those have: a module a host.

``trl``, ``verl``, ``openrlhf``, ``transformers``; only the last imports its host with it.
"""

import importlib
from types import ModuleType

HOSTS = ("openrlhf", "transformers", "trl", "verl")
__all__ = ["openrlhf", "transformers", "trl", "verl"]


def __getattr__(name: str) -> ModuleType:
    if name in HOSTS:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
