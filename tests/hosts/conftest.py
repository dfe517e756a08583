"""Drop-ins against the hosts themselves, where ``NLHF_EXPECT_HOSTS`` names some: ``make hosts``.

A host that it names and that does not import fails; one that it does not name is skipped. Without
the variable nothing here is collected.
"""

import importlib
import os
import warnings
from pathlib import Path

import pytest

EXPECTED = tuple(filter(None, os.environ.get("NLHF_EXPECT_HOSTS", "").split(",")))
collect_ignore_glob = [] if EXPECTED else ["test_*.py"]
# what importing OpenRLHF takes of flash-attn
STUBS = Path(__file__).parent / "stubs"


# TRL's Nash-MD trainer is in its older versions alone
HOSTS = ("trl", "trl-nash-md", "verl", "openrlhf", "deepspeed", "bitsandbytes")


def pytest_configure() -> None:
    for name in EXPECTED:
        if name not in HOSTS:
            known = ", ".join(HOSTS)
            raise pytest.UsageError(f"NLHF_EXPECT_HOSTS names {name!r}: one of {known}")


def needs(host: str):
    """A mark for tests of a host that is imported by what they test, not by them."""
    why = f"NLHF_EXPECT_HOSTS does not name {host}"
    return pytest.mark.skipif(host not in EXPECTED, reason=why)


@pytest.fixture(scope="session")
def stubs():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(STUBS))
        yield


@pytest.fixture(scope="session")
def load(stubs):
    """``load(module)``: a module of a host, or a skip if nobody expects that host."""

    def import_module(name: str):
        host = name.split(".")[0]
        if host not in EXPECTED:
            pytest.skip(f"NLHF_EXPECT_HOSTS does not name {host}")
        with warnings.catch_warnings():
            # hosts are full of deprecated names, and pytest makes errors of warnings
            warnings.simplefilter("ignore")
            return importlib.import_module(name)

    return import_module
