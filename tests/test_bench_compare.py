"""``bench.compare`` on a small repository of its own, whose bench prints what it is told to."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench import compare

# what the kernels of the little repository are worth, in milliseconds
KERNELS = "MS = {ms}\n"
BENCH = """
import json, sys
from nlhf_kernels import MS
from nlhf_kernels.testing import CASE
assert "--no-peers" in sys.argv and "--json" in sys.argv, sys.argv
with open({log!r}, "a") as file:
    file.write(f"{{MS}} ")
for variant in ("cpp", "eager"):
    ms = MS[variant]
    ms = [ms - 1, ms, ms + 1] if ms else None
    print(json.dumps(dict(kind="op", op="sample", shape=CASE, dtype="float32", mode="fwd",
        variant=variant, ms=ms, note="" if ms else "not right", commit=str(MS), device="toy")))
print(json.dumps(dict(kind="limit", name="read")))
sys.exit(1)
"""


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=n", "-c", "user.email=e@x", "-c", "commit.gpgsign=false"]
    return subprocess.run(
        ["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True
    ).stdout


def write(root: Path, ms: dict, case: str) -> None:
    (root / "nlhf_kernels" / "__init__.py").write_text(KERNELS.format(ms=ms))
    (root / "nlhf_kernels" / "testing" / "__init__.py").write_text(f"CASE = {case!r}\n")


@pytest.fixture
def repository(tmp_path, monkeypatch) -> Path:
    """A commit with kernels of 10 and 4 ms, and after it 5 and 4 ms; the latter not committed."""
    root = tmp_path / "tree"
    (root / "nlhf_kernels" / "testing").mkdir(parents=True)
    (root / "setup.py").write_text("import sys\nprint('built', sys.argv)\n")
    write(root, {"cpp": 10, "eager": 4}, "old case")
    git(tmp_path, "init", "-q", str(root))
    git(root, "add", ".")
    git(root, "commit", "-qm", "old")
    # as here: a bench that the ref did not have yet
    (root / "bench").mkdir()
    (root / "bench" / "__init__.py").touch()
    (root / "bench" / "__main__.py").write_text(BENCH.format(log=str(tmp_path / "log")))
    write(root, {"cpp": 5, "eager": 4}, "new case")
    monkeypatch.setattr(compare, "ROOT", root)
    return root


def clean(root: Path) -> bool:
    return len(git(root, "worktree", "list").splitlines()) == 1


def test_both_sides_run_the_cases_of_this_tree_in_turns(repository, capsys):
    assert compare.main("HEAD", ["--base", "HEAD", "--json", "--op", "sample"]) == 0
    said = capsys.readouterr()
    rows = [json.loads(line) for line in said.out.splitlines()]
    (faster, same) = rows
    assert (faster["variant"], faster["base_ms"], faster["new_ms"]) == ("cpp", 10, 5)
    assert (faster["ratio"], faster["verdict"]) == (0.5, "faster")
    assert (same["variant"], same["ratio"], same["verdict"]) == ("eager", 1.0, "same")
    assert {row["shape"] for row in rows} == {"new case"}
    old, new = {"cpp": 10, "eager": 4}, {"cpp": 5, "eager": 4}
    assert (repository.parent / "log").read_text() == f"{old} {new} {old} {new} "
    assert "both sides run the cases of this tree (bench and nlhf_kernels/testing)" in said.err
    assert clean(repository)


def test_the_table_names_what_one_side_has_not_got(repository, capsys):
    write(repository, {"cpp": None, "eager": 8}, "case")
    assert compare.main("HEAD", ["--rounds", "3"]) == 0
    title, _, wrong, slower = capsys.readouterr().out.splitlines()
    assert title == "base = HEAD, new = this tree, new/base below 1 is faster; toy"
    assert wrong.split()[5:] == ["10", "-", "-", "new:", "not", "right"]
    assert slower.split()[5:] == ["4", "8", "2.000", "slower"]
    assert len((repository.parent / "log").read_text().split("} ")) == 7


@pytest.mark.parametrize(
    ("base", "new", "ratio", "want"),
    [
        ([1.0, 1.0], [1.0, 1.0], 1.0, "same"),
        ([1.0, 1.2], [0.9, 1.0], 0.864, "same"),
        ([1.0, 1.1], [0.8, 0.8], 0.762, "faster"),
        ([1.0, 1.0], [1.3, 1.3], 1.3, "slower"),
    ],
)
def test_verdict(base, new, ratio, want):
    assert compare.verdict(ratio, {"base": base, "new": new}) == want


def broken_setup(root: Path) -> None:
    (root / "setup.py").write_text("raise SystemExit('no compiler here')\n")


def broken_bench(root: Path) -> None:
    (root / "bench" / "__main__.py").write_text("import nothing_of_the_kind\n")


def silent_bench(root: Path) -> None:
    (root / "bench" / "__main__.py").write_text("")


@pytest.mark.parametrize(
    ("ref", "flags", "breaks", "said"),
    [
        ("nowhere", [], None, "no commit 'nowhere'"),
        ("--help", [], None, "no commit '--help'"),
        ("HEAD", ["--rounds", "1"], None, "--rounds must be at least 2"),
        ("HEAD", ["--save"], None, "--save and --base exclude each other"),
        ("HEAD", [], broken_setup, "new does not build: no compiler here"),
        ("HEAD", [], broken_bench, "base failed: it measured nothing: ModuleNotFound"),
        ("HEAD", [], silent_bench, "base failed: it measured nothing"),
    ],
)
def test_what_cannot_be_compared_is_one_line(repository, capsys, ref, flags, breaks, said):
    if breaks:
        breaks(repository)
    assert compare.main(ref, flags) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert said in captured.err.splitlines()[-1]
    assert clean(repository)


def test_without_git(repository, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert compare.main("HEAD", []) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "'git'" in line


def test_packages_from_elsewhere_are_refused(repository, tmp_path, capsys):
    """An import hook, as an editable install has one, must not decide what is measured."""
    (repository / "nlhf_kernels" / "__init__.py").write_text(f"__file__ = {str(tmp_path)!r}\n")
    assert compare.main("HEAD", []) == 2
    assert "new imports" in capsys.readouterr().err.splitlines()[-1]
    assert clean(repository)


def test_ctrl_c_removes_the_worktree(repository, tmp_path):
    slow = tmp_path / "log"
    (repository / "bench" / "__main__.py").write_text(
        f"import pathlib, time; pathlib.Path({str(slow)!r}).touch(); time.sleep(60)"
    )
    # a shell's background job inherits that Ctrl-C is ignored, and these tests may run in one
    script = (
        "import signal, sys; from pathlib import Path; from bench import compare\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "compare.ROOT = Path(sys.argv[1]); sys.exit(compare.main('HEAD', []))"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script, str(repository)],
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent.parent,
        env=os.environ | {"TMPDIR": str(tmp_path)},
    )
    while not slow.exists():
        assert child.poll() is None
        time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=30)
    assert child.returncode == 130
    assert err.splitlines()[-1] == "interrupted; the worktree is removed"
    assert not list(tmp_path.glob("nlhf-base-*"))
    assert clean(repository)
