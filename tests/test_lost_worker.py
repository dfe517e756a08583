"""A process of several that is gone, or does not come: the run ends, and says why."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from nlhf import config, snapshots
from tests import test_train
from tests.test_train import prefer_even, settings

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")
folder = test_train.folder
ROOT = Path(__file__).parent.parent
CALLS: list = []


def third_of_the_second() -> bool:
    CALLS.append(1)
    return os.environ["RANK"] == "1" and len(CALLS) == 3


def dies(prompts, first, second):
    if third_of_the_second():
        os.kill(os.getpid(), signal.SIGKILL)
    return prefer_even(prompts, first, second)


def hangs(prompts, first, second):
    if third_of_the_second():
        # else the launcher gives it 30 seconds to finish its step
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(600)
    return prefer_even(prompts, first, second)


@pytest.mark.parametrize(
    ("what", "timeout", "why"),
    [
        (dies, 600.0, "Signal 9 (SIGKILL)"),
        (hangs, 3.0, "nlhf: another process of the run is gone, or did not come within "
                     "collective_timeout = 3 s"),
    ],
    ids=["dies", "hangs"],
)  # fmt: skip
def test_a_run_that_loses_a_process_ends_with_the_reason(folder, tmp_path, what, timeout, why):
    chosen = settings(
        folder, tmp_path / "run", preference=f"tests.test_lost_worker:{what.__name__}",
        collective_timeout=timeout, eval_prompts="", checkpoint_every=1, report_to="none",
    )  # fmt: skip
    config.save(chosen, tmp_path / "c.yaml")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone",
         "-m", "nlhf", "train", "--config", str(tmp_path / "c.yaml")],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert why in done.stdout + done.stderr
    # what was reached before is there, whole
    saved = snapshots.complete(tmp_path / "run" / "checkpoints")
    assert [snapshots.checked(path)["step"] for path in saved] == [1, 2]
