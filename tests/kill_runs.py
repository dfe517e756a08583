"""Runs that are killed at random moments, in children of a process that has imported everything."""

import gc
import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

# before anything starts a thread, which a fork would lose
os.environ["OMP_NUM_THREADS"] = "1"

import torch
import tqdm

from nlhf import cli, snapshots


def start(words: list[str], log: Path) -> int:
    """``nlhf`` with these words in a child, which ends as the command does."""
    if child := os.fork():
        return child
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    status = 1
    try:
        torch.set_num_threads(1)
        cli.main(words)
        status = 0
    except SystemExit as end:
        status = end.code
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def wait(child: int, seconds: float) -> int | None:
    """The child's exit status; None if it is still running after so many seconds."""
    until = time.monotonic() + seconds
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= until:
            return None
        time.sleep(0.002)


def killed(
    make: Callable[[Path], list[str]],
    folder: Path,
    kills: int,
    seed: int,
    look: Callable[[Path], None],
) -> dict:
    """Runs of ``make(output)`` until so many kills have hit one; ``look`` after each of them.

    A run that came to its end is followed by a new one. The moments are spread over the time that
    a run takes which nobody kills, the first output.
    """
    whole, log = folder / "whole", folder / "log.txt"
    moments, ended, hits = random.Random(seed), [], 0
    begin = time.monotonic()
    if wait(start(make(whole), log), 600) != 0:
        raise SystemExit(log.read_text())
    length = time.monotonic() - begin
    while hits < kills:
        output, begin, lives = folder / f"run-{len(ended)}", time.monotonic(), 0
        while True:
            lives += 1
            child = start(make(output), log)
            status = wait(child, moments.uniform(0, length) if hits < kills else 600)
            if status is not None:
                break
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            hits += 1
            look(output)
        if status != 0:
            raise SystemExit(f"status {status}: {log.read_text()[-3000:]}")
        if lives == 1:
            # the machine was busier before: moments after the end hit nobody
            length = min(length, time.monotonic() - begin)
        ended.append(str(output))
    return {"whole": str(whole), "runs": ended, "kills": hits, "seconds": length}


def main() -> None:
    """``kill_runs.py CONFIG FOLDER KILLS SEED``: what ``killed`` returns, as JSON."""
    config, folder, kills, seed = sys.argv[1:]
    # all but a backward pass, after which nobody may fork, so that children find it imported
    cli.main(["train", "--config", config, "--output", f"{folder}/none", "--steps", "0"])
    # its own is shared between processes, and a child may be killed while it holds it
    tqdm.tqdm.set_lock(threading.RLock())
    # a collection in a child would copy all the memory that it shares
    gc.collect()
    gc.freeze()

    def make(output: Path) -> list[str]:
        return ["train", "--config", config, "--output", str(output), "--resume"]

    def look(output: Path) -> None:
        for snapshot in snapshots.complete(output / "checkpoints"):
            snapshots.checked(snapshot)

    found = killed(make, Path(folder), int(kills), int(seed), look)
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
