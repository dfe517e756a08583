"""The notebooks run from top to bottom as they stand, and are committed without their outputs."""

import json
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / "examples").glob("*.ipynb"))


def cells(path: Path) -> list[dict]:
    return [
        c for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"
    ]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_stripped(path):
    assert all(not c["outputs"] and c["execution_count"] is None for c in cells(path))


def test_the_ten_minutes_end_at_the_exact_limit(one_thread, capsys):
    import matplotlib.pyplot as plt

    names = {}
    (path,) = [path for path in NOTEBOOKS if path.stem == "nash_in_ten_minutes"]
    for i, cell in enumerate(cells(path)):
        exec(compile("".join(cell["source"]), f"cell {i}", "exec"), names)
    plt.close("all")
    assert names["before"] > 0.3
    assert names["distance"] < 0.06
    assert "total variation to the exact limit" in capsys.readouterr().out
