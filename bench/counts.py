"""How many instructions the C++ ops take: ``bench/counts.cpp`` under callgrind.

valgrind has no AVX-512: the levels "avx2" and "plain" are counted, on one thread.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from bench.cli import BadInput
from bench.rows import ROOT

BUILD = ROOT / "build" / "counts"
SOURCES = ("csrc/**/*.cpp", "csrc/**/*.h", "csrc/**/*.inl", "bench/counts.cpp", "setup.py")


def measured() -> tuple[str, dict[str, float]]:
    """(what compiled the ops, instructions of each by name)."""
    valgrind = shutil.which("valgrind")
    if valgrind is None:
        raise BadInput("python -m bench check: there is no valgrind: apt-get install valgrind")
    if not Path("/usr/include/valgrind/callgrind.h").exists():
        raise BadInput("python -m bench check: there is no valgrind/callgrind.h: install valgrind")
    program = _built()
    with tempfile.TemporaryDirectory() as folder:
        command = [valgrind, "--tool=callgrind", f"--callgrind-out-file={folder}/out", program]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(f"callgrind: exit status {result.returncode}:\n{result.stderr}")
        found = read(x.read_text(encoding="utf-8") for x in sorted(Path(folder).iterdir()))
    return result.stdout.strip(), found


def read(dumps: Iterable[str]) -> dict[str, float]:
    """The totals of callgrind's dumps, by the name that the program gave each."""
    found = {}
    for text in dumps:
        # the dump at the program's end has no name
        if name := re.search(r"^desc: Trigger: Client Request: (.+)$", text, re.M):
            total = re.search(r"^totals: (\d+)", text, re.M)
            assert name[1] not in found, f"two dumps are called {name[1]}"
            found[name[1]] = int(total[1])
    return found


def _built() -> Path:
    program = BUILD / "counts"
    newest = max(x.stat().st_mtime for pattern in SOURCES for x in ROOT.glob(pattern))
    if not program.exists() or program.stat().st_mtime < newest:
        command = [sys.executable, "setup.py", "-q", "build_counts", "--build-temp", str(BUILD)]
        environment = os.environ | {"NLHF_REQUIRE_NATIVE": "1"}
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(f"bench/counts.cpp does not build:\n{result.stderr[-4000:]}")
    return program
