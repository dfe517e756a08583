"""Which versions of each host the drop-ins are tested with, and the warning outside of them."""

import contextlib
import importlib
import importlib.metadata
import sys
import warnings
from types import ModuleType

from packaging.version import InvalidVersion, Version

# host -> first and last version that tests/hosts has run with
TESTED = {
    "openrlhf": ("0.11.2", "0.11.2"),
    "transformers": ("5.17.0", "5.23.0"),
    "trl": ("1.13.0", "1.16.0"),
    "verl": ("0.9.1", "0.9.1"),
}
_said: set[tuple[str, str]] = set()


def check(host: str) -> None:
    """A ``UserWarning`` with the tested range, once, if the host that is here lies outside of it.

    Nothing without the host. What counts is the version installed and that of the loaded module,
    which may be of a source tree.
    """
    for found in _found(host):
        if not _tested(host, found) and (host, found) not in _said:
            _said.add((host, found))
            low, high = TESTED[host]
            wanted = low if low == high else f"{low} to {high}"
            warnings.warn(
                f"nlhf_kernels.integrations.{host}: {host} {found} is outside the tested range, "
                f"{wanted}: compare results, or install {host}=={high}",
                UserWarning,
                stacklevel=3,
            )


def load(host: str, module: str) -> ModuleType:
    """A module of a host; ``ImportError`` in one line that says what is missing."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name == host:
            raise ImportError(f"{host} is not installed: pip install {host}", name=host) from None
        raise ImportError(f"{module} cannot be imported: {error}", name=error.name) from error


def _found(host: str) -> list[str]:
    found = [getattr(sys.modules.get(host), "__version__", None)]
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        found.append(importlib.metadata.version(host))
    return [version for version in found if version]


def _tested(host: str, found: str) -> bool:
    low, high = map(Version, TESTED[host])
    try:
        # a build's own suffix, as in 1.16.0+local, changes nothing
        return low <= Version(Version(found).public) <= high
    except InvalidVersion:
        return False
