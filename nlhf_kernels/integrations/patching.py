"""Functions of a host replaced by ours in every module that holds them, and put back."""

import sys
from typing import Any


class Patches:
    """What is replaced in the loaded modules of one host.

    Modules that the host loads later import from the patched ones, so they hold ours too; ``undo``
    finds them.
    """

    def __init__(self, host: str):
        self._host = host
        self._pairs: list[tuple[Any, Any]] = []

    def holds(self, x: Any) -> bool:
        """Whether ``x`` is one of ours, in place of the host's."""
        return any(x is new for _, new in self._pairs)

    def replace(self, old: Any, new: Any) -> None:
        self._pairs.append((old, new))
        self._swap(old, new)

    def undo(self) -> None:
        while self._pairs:
            old, new = self._pairs.pop()
            self._swap(new, old)

    def _swap(self, this: Any, that: Any) -> None:
        for name, module in list(sys.modules.items()):
            if name != self._host and not name.startswith(f"{self._host}."):
                continue
            # not by getattr, which would load what a lazy module has not loaded
            values = getattr(module, "__dict__", {})
            for attribute in [a for a, value in values.items() if value is this]:
                setattr(module, attribute, that)
