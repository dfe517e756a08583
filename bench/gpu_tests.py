"""``pytest``, and a JSON line per test as soon as it has ended: a run that is cut loses nothing.

python -m bench.gpu_tests [arguments of pytest]
"""

import importlib.util
import json
import os
import sys

import pytest

# as many as one device and its memory serve well; they compile most of the time
WORKERS = 8


class Rows:
    """Where pytest tells how each test ended; with workers, in the process that started them."""

    def __init__(self):
        # rows have standard output for themselves, pytest goes on on standard error
        self._out = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)

    def pytest_collectreport(self, report) -> None:
        if report.failed:
            self._write(report.nodeid, "wrong", str(report.longrepr).strip().splitlines()[-1], 0.0)

    def pytest_runtest_logreport(self, report) -> None:
        if report.when != "call" and report.passed:
            return
        note = ""
        if report.skipped and isinstance(report.longrepr, tuple):
            note = report.longrepr[2].removeprefix("Skipped: ")
        elif report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            note = crash.message if crash else str(report.longrepr)
        status = {"passed": "ok", "failed": "wrong", "skipped": "skipped"}[report.outcome]
        self._write(report.nodeid, status, note, report.duration)

    def _write(self, test: str, status: str, note: str, seconds: float) -> None:
        note = note.strip().splitlines()[0][:300] if note.strip() else ""
        row = {"kind": "test", "test": test, "status": status, "note": note}
        self._out.write(json.dumps(row | {"seconds": round(seconds, 3)}) + "\n")


def main(argv: list[str]) -> int:
    arguments = ["-p", "no:cacheprovider", "--no-header", "--tb=short"]
    arguments += ["--continue-on-collection-errors", *argv]
    many = len(os.sched_getaffinity(0)) // 2
    if many >= WORKERS and importlib.util.find_spec("xdist"):
        arguments += ["-n", str(WORKERS)]
    return int(pytest.main(arguments, plugins=[Rows()]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
