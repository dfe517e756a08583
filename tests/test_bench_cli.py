"""The command line of the op bench."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch

import bench.__main__ as cli
from bench import compare, heads, layers, peers
from nlhf_kernels.testing import OPS, Case
from nlhf_kernels.testing.cases import HEADS, SAMPLERS
from tests.conftest import LIMITS
from tests.test_bench import contender, problem

ROW = {
    "kind", "op", "shape", "dims", "dtype", "mode", "variant", "peer", "status", "note", "ms",
    "calls", "gbps", "tflops", "limit", "share", "cpu_us", "peak_mb", "cached",
}  # fmt: skip
STAMP = {"run", "commit", "dirty", "device", "threads", "versions"}

pytestmark = pytest.mark.usefixtures("small_bench")


def run_json(capsys, *flags) -> list[dict]:
    assert cli.main([*flags, "--json"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_rows_have_every_field(op, capsys):
    rows = run_json(capsys, "--op", op, "--quick", "--no-peers")
    assert all(row.keys() >= STAMP for row in rows)
    limits, found = ([row for row in rows if row["kind"] == kind] for kind in ("limit", "op"))
    assert {row["name"]: (row["value"], row["unit"]) for row in limits} == LIMITS
    mode = "fwd" if op in SAMPLERS else "fwd+bwd"
    for row in found:
        assert row.keys() == ROW | STAMP
        assert (row["op"], row["shape"], row["mode"]) == (op, "tiny-1b, first", mode)
        assert row["dims"]["V"] == 1100
        assert (row["status"], row["note"], row["peer"]) == ("ok", "", False)
        assert row["ms"] == sorted(row["ms"])
        rate = row["tflops" if op in HEADS else "gbps"]
        assert rate == pytest.approx(row["share"] * LIMITS[row["limit"]][0], rel=1e-3)
    others = {"eager, in place", "cpp, in place"} if mode != "fwd" else set()
    others = {"matmul + cpp", "matmul + cpp, in place"} if op in HEADS else others
    assert {row["variant"] for row in found} == {"eager", "cpp"} | others


def test_shapes_are_named_by_their_beginnings(capsys):
    flags = ["--op", "mixture_sample", "--backend", "cpp", "--no-peers"]
    assert [row["shape"] for row in run_json(capsys, *flags) if row["kind"] == "op"] == [
        "tiny-1b, first", "other-2b, second",
    ]  # fmt: skip
    rows = run_json(capsys, *flags, "--shape", "other-2b")
    assert [row["shape"] for row in rows if row["kind"] == "op"] == ["other-2b, second"]


def test_a_whole_name_is_no_beginning(monkeypatch):
    cases = tuple(Case("mixture_sample", f"tiny-1b, B={B}", (B, 50)) for B in (16, 1))
    entry = dataclasses.replace(OPS["mixture_sample"], bench={"cpu": cases})
    monkeypatch.setitem(OPS, "mixture_sample", entry)

    def shapes(*wanted):
        flags = ["--op", "mixture_sample", "--no-peers", "--shape", *wanted]
        return [p.shape for p in cli.select(cli.parser().parse(flags))]

    assert shapes("tiny-1b, B=1") == ["tiny-1b, B=1"]
    assert shapes("tiny") == ["tiny-1b, B=16", "tiny-1b, B=1"]
    assert shapes("tiny-1b, B=1", "tiny-1b, B=16") == ["tiny-1b, B=16", "tiny-1b, B=1"]


def test_the_first_shape_of_every_op_comes_first():
    chosen = cli.select(cli.parser().parse(["--no-peers"]))
    assert [p.op for p in chosen[: len(OPS) + 1]] == [*OPS, layers.OP]
    assert [p.shape for p in chosen[: len(OPS)]] == ["tiny-1b, first"] * len(OPS)


def test_quick_compiles_nothing_and_no_peers_means_none(monkeypatch):
    def rivals(case, device):
        return (contender("torch.compile"), contender("another"))

    monkeypatch.setattr(peers, "contenders", rivals)

    def names(*flags):
        (found,) = cli.select(cli.parser().parse(["--op", "mixture_sample", "--quick", *flags]))
        return [c.name for c in found.contenders]

    assert names() == ["eager", "cpp", "another"]
    assert names("--no-peers") == ["eager", "cpp"]
    assert names("--no-peers", "--backend", "cpp") == ["cpp"]


def test_a_chosen_backend_is_there_after_a_product_too():
    flags = ["--op", HEADS[0], "--no-peers", "--backend", "cpp"]
    (of_head, *_) = cli.select(cli.parser().parse(flags))
    ours = ["cpp", "matmul + cpp", "matmul + cpp, in place"]
    assert [c.name for c in of_head.contenders] == ours


def test_quick_heads_have_fewer_tokens():
    case = Case(HEADS[0], "tiny-1b, N=4,096", (16, 256, 8, 1100))
    few = heads.quick(case)
    assert (few.why, few.shape) == ("tiny-1b, N=512", (2, 256, 8, 1100))
    other = Case("token_logprobs", "tiny-1b, 16 x 256", (16, 256, 1100))
    assert heads.quick(other) is other


def test_a_backend_that_cannot_run_here_is_named_as_missing(monkeypatch, capsys):
    flags = ["--op", "mixture_sample", "--backend", "cuda", "--no-peers", "--quick"]
    (row,) = (row for row in run_json(capsys, *flags) if row["kind"] == "op")
    assert row["status"] == "missing"
    assert "no cuda implementation" in row["note"]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--op", "nope"], "mixture_sample"),
        (["--backend", "nope"], "eager"),
        (["--shape", "nope"], "tiny-1b, other-2b"),
        (["--mode", "nope"], "fwd+bwd"),
        (["--op", "mixture_sample", "--mode", "bwd"], "fwd only"),
        (["--device", "cuda"], "no CUDA device"),
        (["--rounds", "3"], "--base"),
        (["--profile", "x", "--save"], "--save"),
        (["nope"], "unrecognized"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_bad_flags_end_in_one_line(flags, named, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(flags) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1
    assert named in printed.err


def test_the_module_runs():
    command = [sys.executable, "-m", "bench", "--op", "nope"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert layers.OP in result.stderr


def test_parts_get_their_own_flags(monkeypatch):
    from bench import report

    monkeypatch.setattr(report, "main", lambda argv: ("report", argv))
    assert cli.main(["report", "--check"]) == ("report", ["--check"])


@pytest.mark.parametrize("base", [["--base", "main"], ["--base=main"]], ids=" ".join)
def test_a_comparison_gets_the_other_flags(base, monkeypatch):
    monkeypatch.setattr(compare, "main", lambda ref, argv: (ref, argv))
    flags = ["--op", "mixture_sample", "--rounds", "3"]
    assert cli.main([*flags[:2], *base, *flags[2:]]) == ("main", flags)


def test_profile_leaves_a_trace_of_each_contender(tmp_path, capsys):
    flags = ["--op", "token_logprobs", "--shape", "tiny", "--no-peers", "--profile", str(tmp_path)]
    assert cli.main(flags) == 0
    trace = (tmp_path / "trace.json").read_text()
    for name in ("eager", "cpp"):
        assert f'"token_logprobs[{name}]"' in trace
        assert f'"token_logprobs[{name}] backward"' in trace


def test_what_a_peer_prints_stays_off_the_rows(monkeypatch, capsys):
    def talk(args, kwargs):
        sys.stdout.write("hello\n")
        return args[0] * 2

    monkeypatch.setattr(cli, "select", lambda arguments: [problem(contender(run=talk))])
    rows = run_json(capsys)
    assert {row["kind"] for row in rows} == {"limit", "op"}
