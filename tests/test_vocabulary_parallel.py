"""A vocabulary that two processes share gives what one process gives: values and gradients."""

import contextlib
import subprocess
import sys
import time

import pytest
import torch.distributed as dist

from tests.test_repo import ROOT
from tests.vocabulary_parts import SECONDS


def test_two_processes_are_as_one(target, tmp_path):
    """All cases in one pair of processes, which take longest to start."""
    if target.device != "cpu":
        pytest.skip("gloo, which this is tested with, is for the CPU")
    if not dist.is_gloo_available():
        pytest.skip("this torch has no gloo")
    # processes find each other through a file: a port may be taken by then
    file = tmp_path / "meeting"
    how = [str(file), target.backend, "few" if target.interpreted else "all"]
    with contextlib.ExitStack() as stack:
        logs = [stack.enter_context(open(tmp_path / f"{rank}.log", "w+")) for rank in (0, 1)]
        codes = run(how, logs)
        said = []
        for log in logs:
            log.seek(0)
            said.append(log.read()[-3000:])
    assert codes == [0, 0], "\n".join(said)


def run(how: list[str], logs: list) -> list[int | None]:
    """What each ended with; None if it had to be ended."""
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.vocabulary_parts", str(rank), *how],
            cwd=ROOT,
            stdout=logs[rank],
            stderr=subprocess.STDOUT,
        )
        for rank in (0, 1)
    ]
    end = time.monotonic() + 2 * SECONDS
    try:
        # the other waits for one that has failed
        while any(worker.poll() is None for worker in workers):
            if any(worker.poll() for worker in workers) or time.monotonic() > end:
                break
            time.sleep(0.05)
        return [worker.poll() for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
