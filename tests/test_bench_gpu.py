"""``bench gpu``: parts that hang, crash or find something wrong; and a dry run without a GPU."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from bench import gpu, gpu_check, gpu_parts, gpu_summary
from bench.gpu_parts import Command, Part
from nlhf_kernels.testing import OPS
from nlhf_kernels.testing.check import backends

ROOT = Path(__file__).parent.parent
STAMP = {
    "device": "NVIDIA H200",
    "commit": "abc",
    "dirty": True,
    "versions": {"torch": "2.11.0", "triton": "3.6.0"},
}


def op_row(**changes) -> dict:
    row = {"kind": "op", "op": "mixture_sample", "shape": "s", "dtype": "bfloat16", "mode": "fwd"}
    row |= {"variant": "triton", "peer": False, "status": "ok", "note": "", "ms": [1.0, 2.0, 3.0]}
    row |= {"gbps": 2000.0, "share": 0.5, "limit": "read"}
    return {**STAMP, **row, **changes}


def python(name: str, code: str, **limits) -> Command:
    return Command(name, [sys.executable, "-c", textwrap.dedent(code)], **limits)


def printing(*rows: dict, then: str = "") -> str:
    prints = "".join(f"print({json.dumps(row)!r})\n" for row in rows)
    return f"import json, sys, time\n{prints}{then}"


def part(name: str, code: str, seconds: float = 20, **changes) -> Part:
    return Part(name, seconds, (python(name, code),), **changes)


def rows_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]


def reports(out: Path) -> dict[str, dict]:
    return {row["part"]: row for row in rows_of(out) if row["kind"] == "part"}


def test_a_part_that_hangs_is_cut_and_its_rows_are_kept(tmp_path, capsys):
    alive = tmp_path / "alive"
    # a grandchild that would go on, as a bench's own children would
    child = f"import pathlib, time; time.sleep(4); pathlib.Path({str(alive)!r}).touch()"
    hang = f"import subprocess; subprocess.Popen([sys.executable, '-c', {child!r}])\ntime.sleep(60)"
    hanging = Part(
        "ops", 1.5, (python("hangs", printing(op_row(), then=hang)), python("never", "print(1)"))
    )
    start = time.monotonic()
    after = part("tests", printing({"kind": "test", "test": "t", "status": "ok"}))
    assert gpu.run([hanging, after], tmp_path, 100) == 0
    assert time.monotonic() - start < 20
    found = reports(tmp_path)
    assert found["ops"]["status"] == "cut"
    assert found["ops"]["note"].startswith("not finished after ")
    assert found["ops"]["note"].endswith("hangs, never")
    assert found["tests"]["status"] == "ok"
    assert op_row() in rows_of(tmp_path)
    said = capsys.readouterr().out
    assert (tmp_path / "summary.txt").read_text() == said
    assert "mixture_sample fwd, s, bfloat16: triton 2 ms, 2000 GB/s, 50% of read" in said
    assert "1 ok" in said
    time.sleep(max(0, 5 - (time.monotonic() - start)))
    assert not alive.exists()


def test_what_does_not_fit_into_the_budget_is_named(tmp_path, capsys):
    slow = "import time; time.sleep(30)"
    parts = [part("build", slow), part("check", slow), Part("sanitizer", 0, skip="it is not here")]
    assert gpu.run(parts, tmp_path, 2) == 0
    found = reports(tmp_path)
    assert found["build"]["status"] == "cut"
    assert (found["check"]["status"], found["check"]["note"]) == ("skipped", "no time was left")
    assert found["sanitizer"]["note"] == "it is not here"
    assert "check      skipped      0 s  no time was left" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("code", "status", "note"),
    [
        (printing(op_row(status="wrong", note="off", ms=None)), "wrong", ""),
        (printing(op_row(status="wrong", note="off", ms=None), then="sys.exit(1)"), "wrong", ""),
        (printing(op_row(status="wrong", peer=True, ms=None), then="sys.exit(1)"), "ok", ""),
        (printing(op_row(), then="sys.exit(1)"), "wrong", "ops: status 1: it said nothing"),
        (printing(op_row(), then="raise OSError('disk')"), "wrong", "status 1: OSError: disk"),
        ("import os; os.abort()", "wrong", "SIGABRT"),
        ("import sys; sys.exit(2)", "wrong", "status 2"),
    ],
)
def test_wrong_is_told_from_slow(tmp_path, code, status, note):
    assert gpu.run([part("ops", code)], tmp_path, 100) == (status == "wrong")
    report = reports(tmp_path)["ops"]
    assert report["status"] == status
    assert note in report["note"]


def test_a_step_that_is_wrong_is_ours_only_by_name():
    step = {"kind": "step", "status": "wrong"}
    assert gpu_summary.is_peer({**step, "variant": "trl 1.13.0, use_cache"})
    assert not gpu_summary.is_peer({**step, "variant": "nlhf, CUDA graphs"})


def test_a_profiled_run_leaves_no_rows(tmp_path):
    profiled = part("profile", printing(op_row()), keep_rows=False)
    assert gpu.run([profiled], tmp_path, 100) == 0
    assert [row["kind"] for row in rows_of(tmp_path)] == ["part"]


# ---- the summary


def many_rows() -> list[dict]:
    seconds = {"rollout": [1, 2, 3], "step": [2, 3, 4]}
    setting = {"model": "m", "B": 32, "P": 512, "T": 512, "dtype": "bfloat16", "lora_r": 16}
    step = {"kind": "step", "setting": setting, "status": "ok", "note": "", "peak_mb": 2048}
    test = {"kind": "test", "part": "tests", "status": "wrong", "note": "x" * 300}
    scaling = {"kind": "scaling", "title": "ms", "x": "B", "y": "ms", "variant": "triton"}
    check = {"kind": "check", "part": "check", "op": "o", "case": "c", "backend": "triton"}
    return [
        *({**STAMP, **check, "status": "wrong", "note": "NaN"} for _ in range(9)),
        {**STAMP, "kind": "limit", "name": "read", "value": 4000.0, "unit": "GB/s"},
        *(op_row(shape=f"shape {i}") for i in range(40)),
        *(op_row(shape=f"shape {i}", variant="peer", peer=True, ms=[3, 4, 5]) for i in range(40)),
        *({**step, "variant": f"v{i}", "seconds": seconds} for i in range(30)),
        {**step, "variant": "trl", "seconds": None, "status": "missing", "note": "no trl"},
        *({**test, "test": f"t{i}"} for i in range(30)),
        *({**scaling, "exponent": 1.0} for _ in range(20)),
    ]


def test_summary_fits_and_says_what_it_leaves_out(tmp_path):
    parts = [{"part": p, "status": "ok", "seconds": 9.0, "note": ""} for p in gpu_parts.PARTS]
    lines = gpu_summary.summary(many_rows(), parts, tmp_path)
    assert len(lines) == gpu_summary.LINES == 60
    assert max(map(len, lines)) <= gpu_summary.WIDTH
    text = "\n".join(lines)
    assert "NVIDIA H200; commit abc and changes" in text
    assert "limits: read 4e+03 GB/s" in text
    assert "| 2.00 x ours: peer 4 ms" in text
    assert "step m, LoRA 16 B=32 512+512 bfloat16: v0: seconds: rollout 2, step 3" in text
    assert text.count("more in rows.jsonl") == 4
    few = [row for row in many_rows() if row["kind"] in ("limit", "scaling") or "trl" in str(row)]
    text = "\n".join(gpu_summary.summary(few, parts, tmp_path))
    assert "trl: missing: no trl" in text
    assert text.count("scaling ms, triton: ms grows as B^1.00") == 20
    assert gpu_summary.summary([], [], tmp_path)[0] == "gpu: no row came back"


# ---- the command line


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--only", "ops,nonsense"], "there is no part 'nonsense'"),
        (["--only", "ops:nonsense"], "ops knows no 'nonsense'"),
        (["--only", "step:gpt-5"], "step knows no 'gpt-5'"),
        (["--only", "build:x"], "build cannot be narrowed"),
        (["--minutes", "0"], "--minutes must be positive"),
        (["--minutes", "x"], "invalid float value: 'x'"),
        (["--onyl", "ops"], "unrecognized arguments: --onyl ops"),
        (["--device", "cpu", "--out", __file__], "--out"),
        ([], "torch finds no CUDA device"),
    ],
)
def test_bad_input_is_one_line(argv, said, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(argv) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert said in line
    assert captured.out == ""


def test_only_narrows_parts_and_keeps_their_order(tmp_path):
    wanted = gpu.narrowing("step:llama3-8b,ops:mixture_sample,ops:token_logprobs,build")
    assert wanted["ops"] == ["mixture_sample", "token_logprobs"]
    made = {name: gpu_parts.PARTS[name]("cuda", wanted[name], tmp_path) for name in wanted}
    (ops,) = made["ops"].commands
    assert ops.arguments[-2:] == ["--op", "mixture_sample,token_logprobs"]
    (step,) = made["step"].commands
    assert step.arguments[-2:] == ["--lora-r", "16"]
    assert "--quick" not in step.arguments
    assert list(gpu.narrowing(None)) == list(gpu_parts.PARTS)
    assert {c.name for c in gpu_parts.step("cuda", [], tmp_path).commands} == {
        "qwen2.5-1.5b", "llama3-8b", "qwen2.5-0.5b",
    }  # fmt: skip


def test_all_parts_fit_nearly_and_a_few_get_more_time(tmp_path):
    made = [make("cuda", [], tmp_path) for make in gpu_parts.PARTS.values()]
    assert gpu.stretched(made, 540) == made
    # those that end early leave enough for the rest
    assert sum(p.seconds for p in made) < 1.3 * 540
    (alone,) = gpu.stretched([gpu_parts.step("cuda", ["llama3-8b"], tmp_path)], 540)
    assert alone.seconds > 500
    assert alone.commands[0].seconds > 300


def test_the_files_with_tests_for_a_gpu_are_there():
    for name in (*gpu_parts.TESTS, *gpu_parts.UPDATES):
        assert (ROOT / "tests" / f"test_{name}.py").exists()


def test_the_sanitizer_says_what_it_found_or_why_not(tmp_path, monkeypatch):
    assert gpu_parts.sanitizer("cpu", [], tmp_path).skip
    tool = tmp_path / "compute-sanitizer"
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = gpu_parts.sanitizer("cuda", ["mixture_sample"], tmp_path)
    assert found.commands[0].arguments[0] == str(tool)
    # the kernels without cases are watched in their tests, unless one op was asked for
    assert len(found.commands) == 1
    updates = gpu_parts.sanitizer("cuda", [], tmp_path).commands[1].arguments
    assert updates[:5] == found.commands[0].arguments[:5]
    assert "tests/test_pair_loss.py" in updates
    assert found.judge([], "========= ERROR SUMMARY: 2 errors\n").startswith("wrong: memcheck")
    assert found.judge([], "========= ERROR SUMMARY: 0 errors\n") == "memcheck found nothing"
    assert "Device not supported" in found.unavailable("========= Device not supported.\n")
    assert not found.unavailable("========= ERROR SUMMARY: 2 errors\n")


def test_every_op_must_be_right_somewhere(tmp_path):
    judge = gpu_parts.check("cuda", [], tmp_path).judge
    rows = [{"op": op, "status": "ok"} for op in OPS]
    assert judge(rows, "") == ""
    rows[list(OPS).index("token_logprobs")]["status"] = "refused"
    assert judge(rows, "") == "wrong: not one case of token_logprobs is right"


# ---- whole runs


def start(out: Path, *argv: str) -> subprocess.Popen:
    code = "import sys; from bench import gpu; sys.exit(gpu.main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "--out", str(out), "--device", "cpu", *argv]
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=env, **streams)


def test_dry_run_without_a_gpu(tmp_path):
    child = start(tmp_path, "--only", "check:token_logprobs,tests:cold,sanitizer")
    out, err = child.communicate(timeout=300)
    assert child.returncode == 0, out + err
    rows = rows_of(tmp_path)
    cases = [row for row in rows if row["kind"] == "check"]
    assert {row["case"] for row in cases} == {case.why for case in OPS["token_logprobs"].tests}
    assert {(row["backend"], row["status"]) for row in cases} == {("cpp", "ok")}
    tests = [row for row in rows if row["kind"] == "test"]
    assert [row["status"] for row in tests] == ["ok"] * 2, tests
    assert f"check      ok  {'':6}" in out
    assert len(out.splitlines()) <= 60
    assert out.splitlines()[-1].endswith(str(tmp_path))


def test_a_run_that_is_ended_still_leaves_its_summary(tmp_path):
    child = start(tmp_path, "--only", "check,tests,sanitizer")
    while (
        not (tmp_path / "rows.jsonl").exists()
        or "check" not in (tmp_path / "rows.jsonl").read_text().split('"kind": ')[-1]
    ):
        assert child.poll() is None
        time.sleep(0.05)
    child.send_signal(signal.SIGTERM)
    out, err = child.communicate(timeout=60)
    assert child.returncode == 130, out + err
    assert "interrupted" in out
    assert (tmp_path / "summary.txt").read_text() == out
    assert "Traceback" not in err


# ---- the children


def test_check_names_what_is_wrong_or_refused(plant, monkeypatch):
    from nlhf_kernels import registry

    (first, *_), filtered = OPS["token_logprobs"].tests, OPS["mixture_sample"].tests[-1]
    assert gpu_check.judge(first, "cpp", "cpu")["status"] == "ok"
    lacks = {"cpp": {"filters": "it has no filters"}}
    monkeypatch.setitem(registry._LACKS, "mixture_sample", lacks)
    refused = gpu_check.judge(filtered, "cpp", "cpu")
    assert (refused["status"], refused["note"][:10]) == ("refused", "it has no ")

    right = registry.load("token_logprobs_fwd", "cpp")
    off = plant({"token_logprobs_fwd": lambda *x: tuple(y + 1 for y in right(*x))})
    row = gpu_check.judge(first, off, "cpu")
    assert (row["status"], row["note"].split(":")[0]) == ("wrong", "logprobs")

    def broken(*arguments):
        raise MemoryError

    off = plant({"token_logprobs_fwd": broken})
    monkeypatch.setattr(gpu_check, "ERRORS", (*gpu_check.ERRORS, MemoryError))
    row = gpu_check.judge(first, off, "cpu")
    assert (row["status"], row["note"]) == ("wrong", "MemoryError: no word why")


def test_check_starts_again_behind_a_case_that_breaks_the_device(monkeypatch, capsys):
    judged = []
    monkeypatch.setattr(gpu_check, "judge", lambda *x: judged.append(x) or {})
    monkeypatch.setattr(gpu_check, "_usable", lambda: len(judged) < 3)

    def replace(program, arguments):
        raise SystemExit(arguments)

    monkeypatch.setattr(os, "execv", replace)
    argv = ["--device", "cuda", "--shard", "1/2"]
    with pytest.raises(SystemExit) as stopped:
        gpu_check.main(argv)
    assert stopped.value.code[1:] == ["-m", "bench.gpu_check", *argv, "--start", "3"]
    all_of_it = gpu_check.work("cuda", list(OPS), False)
    assert [x[:2] for x in judged] == all_of_it[1:6:2]


def test_every_case_is_dealt_out_and_the_small_ones_take_every_branch():
    everything = gpu_check.work("cuda", list(OPS), False)
    per_backend = sum(len(op.tests) for op in OPS.values())
    assert len(everything) == per_backend * len([x for x in backends("cuda") if x != "eager"])
    small = [case for case, backend in gpu_check.work("cuda", list(OPS), True)]
    for option in ("layout", "packed", "inplace_backward", "rows", "softcap", "ref"):
        assert any(option in case.options for case in small), option
    assert len(set(map(str, small))) < per_backend / 2


def test_a_json_line_per_test(tmp_path):
    (tmp_path / "test_toy.py").write_text(
        "import pytest\n"
        "def test_right(): print('not a row')\n"
        "def test_wrong(): assert False, 'two\\nlines'\n"
        "def test_left_out(): pytest.skip('why')\n"
        "def test_broken(no_such_fixture): pass\n"
    )
    (tmp_path / "test_bad.py").write_text("import nothing_of_the_kind\n")
    command = [sys.executable, "-m", "bench.gpu_tests", str(tmp_path), "--rootdir", str(tmp_path)]
    done = subprocess.run([*command, "-c", os.devnull], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    found = {row["test"].split("::")[-1]: (row["status"], row["note"]) for row in rows}
    assert found.pop("test_broken")[0] == "wrong"
    status, note = found.pop("test_bad.py")
    assert status == "wrong"
    assert "nothing_of_the_kind" in note
    assert found == {
        "test_right": ("ok", ""),
        "test_wrong": ("wrong", "AssertionError: two"),
        "test_left_out": ("skipped", "why"),
    }
