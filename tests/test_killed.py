"""Training that is killed with SIGKILL, wherever it is, ends as if it had not been."""

import json
import os
import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file

from nlhf import config
from tests import test_train
from tests.test_train import metrics, settings

folder = test_train.folder
ROOT = Path(__file__).parent.parent
# more by hand: NLHF_KILLS=1000
KILLS = int(os.environ.get("NLHF_KILLS", "50"))


def lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def test_fifty_kills_change_no_bit_of_what_a_run_ends_with(folder, tmp_path):
    chosen = settings(
        folder, "", steps=6, batch_size=4, max_new_tokens=3, eval_every=2, eval_samples=2,
        report_samples=4, algorithm="nash_mp", eta=1.0, ema_decay=0.5, report_to="none",
    )  # fmt: skip
    config.save(chosen, tmp_path / "c.yaml")
    done = subprocess.run(
        [sys.executable, "-m", "tests.kill_runs", tmp_path / "c.yaml", tmp_path, str(KILLS), "0"],
        cwd=ROOT, capture_output=True, text=True, timeout=1200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["kills"] == KILLS
    assert found["runs"]
    whole = Path(found["whole"])
    # all that a run leaves, its own name and its times aside
    for run in map(Path, found["runs"]):
        ours = {p.relative_to(run) for p in run.rglob("*")}
        assert ours == {p.relative_to(whole) for p in whole.rglob("*")}
        assert metrics(run) == metrics(whole)
        for name in ("samples.jsonl", "report.json"):
            assert lines(run / name) == lines(whole / name)
        for path in whole.rglob("*.safetensors"):
            a, b = load_file(run / path.relative_to(whole)), load_file(path)
            assert a.keys() == b.keys()
            assert all((a[name] == b[name]).all() for name in b)
