"""Drop-ins against the hosts themselves: those that ``NLHF_EXPECT_HOSTS`` names, in ``make hosts``.

A host that it names and that does not import fails. Tests of others are not collected.
"""

import importlib
import os
import warnings
from pathlib import Path

import pytest

# whose tests a file has; TRL's Nash-MD trainer is in its older versions alone
HOSTS = {
    "trl": "test_trl.py",
    "trl-nash-md": "test_trl_nash_md.py",
    "verl": "test_verl.py",
    "openrlhf": "test_openrlhf.py",
    "deepspeed": "test_zero3.py",
    "bitsandbytes": "test_bitsandbytes.py",
}
EXPECTED = tuple(filter(None, os.environ.get("NLHF_EXPECT_HOSTS", "").split(",")))
collect_ignore = [file for host, file in HOSTS.items() if host not in EXPECTED]
# what importing OpenRLHF takes of flash-attn
STUBS = Path(__file__).parent / "stubs"


def pytest_configure() -> None:
    for name in EXPECTED:
        if name not in HOSTS:
            known = ", ".join(HOSTS)
            raise pytest.UsageError(f"NLHF_EXPECT_HOSTS names {name!r}: one of {known}")


@pytest.fixture(scope="session")
def stubs():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(STUBS))
        yield


@pytest.fixture(scope="session")
def load(stubs):
    """``load(module)``: a module of a host."""

    def import_module(name: str):
        with warnings.catch_warnings():
            # hosts are full of deprecated names, and pytest makes errors of warnings
            warnings.simplefilter("ignore")
            return importlib.import_module(name)

    return import_module
