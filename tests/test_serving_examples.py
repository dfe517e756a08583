"""The examples of servers run as they stand there."""

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def printed(name, capsys) -> list[str]:
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return capsys.readouterr().out.splitlines()


def test_http_judge(capsys):
    lines = printed("http_judge.py", capsys)
    p, q = (float(line.split()[2]) for line in lines[:2])
    assert p > 0.7
    assert q < 0.3
    assert "'misses': 4" in lines[2]
    assert "'hits': 4, 'misses': 0" in lines[3]


@pytest.mark.usefixtures("one_thread")
def test_engine_rollout(capsys):
    lines = printed("engine_rollout.py", capsys)
    found = {name: float(value) for name, value in (line.split() for line in lines[1:])}
    assert 0.5 < found["importance_mean"] < 1.5
    assert 0 < found["importance_ess"] < 1
    assert found["importance_max"] > 1.5
    assert found["importance_bias_bound"] > 0
