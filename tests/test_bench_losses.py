"""``bench losses``: what it measures, what it says of targets, and what it does not let pass."""

import json
from types import SimpleNamespace

import pytest
import torch

import nlhf_kernels as nk
from bench import (
    ema,
    gates,
    gpu_parts,
    heads,
    losses,
    losses_memory,
    losses_tables,
    ops,
    page,
    peers,
    report,
)
from bench.gpu_summary import summary
from bench.problem import Problem
from nlhf_kernels.testing.case import BF16, F32, VOCABULARY, Case
from tests.conftest import LIMITS
from tests.test_bench_report import GPU, op_row, stamp

HEAD = {"hidden_size": 8, "vocab_size": 1100}


@pytest.fixture
def tiny(small_bench, monkeypatch):
    """Vocabularies of a thousand, few weights, little time, nothing compiled."""
    for at, model in enumerate(losses.BOTH):
        monkeypatch.setitem(VOCABULARY, model, 1100 + at)
    monkeypatch.setitem(losses.MODELS, losses.QUICKSTART, losses.MODELS["smollm2-135m"] | HEAD)
    monkeypatch.setattr(ema, "sizes", lambda model: [70, 5, 900])
    monkeypatch.setattr(losses, "ROWS", {"cpu": (2, 3), "cuda": (2, 3)})
    monkeypatch.setattr(losses, "SECONDS", {"cpu": 0.005})
    monkeypatch.setattr(losses, "QUICK_SECONDS", 0.005)
    small = (64, 8, losses.LARGEST, F32)
    monkeypatch.setattr(losses_memory, "SHAPES", {"cpu": small})
    monkeypatch.setattr(losses_memory, "QUICK", {"cpu": small})
    measured = {"mb": 3.0, "gradients_mb": 1.0}
    monkeypatch.setattr(losses_memory, "_measured", lambda row, device: measured)
    for module in (peers, heads):
        monkeypatch.setattr(module, "compiled", lambda function: function)
    # a peer that compiles by itself
    monkeypatch.setattr(heads, "cut_compiled", heads.torch_linear)


def run_json(capsys, *flags, status=0) -> list[dict]:
    assert losses.main([*flags, "--json"]) == status
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


# ---- rows


def loss_row(variant, ms, /, *, table="logits", V=151_936, **other):
    row = op_row(variant, ms, op="pairwise_pg_loss", V=V, mode="fwd+bwd", **other)
    return row | {"kind": "losses", "table": table, "limit": other.get("limit", "copy")}


def loss_memory_row(variant, mb, N=4096, **other):
    row = op_row(variant, mb, op="linear_pairwise_pg_loss", mode="fwd+bwd")
    shape = {"shape": f"model-151k, N={N:,}", "dims": {"N": N, "D": 576, "V": 151_936}}
    return row | shape | {"kind": "losses memory", "mb": mb, "gradients_mb": 100.0, **other}


def loss_rows() -> list[dict]:
    rows = []
    for V in (49_152, 151_936):
        rows += [
            loss_row("cpp, in place", 10.0, V=V, peak_mb=0.0),
            loss_row("cpp", 20.0, V=V, peak_mb=58.0),
            loss_row("eager", 160.0, V=V, peak_mb=290.0),
            loss_row("torch log_softmax (no entropy)", 30.0, V=V, peer=True),
            loss_row("torch.compile", 25.0, V=V, peer=True),
        ]
    rows += [
        *(loss_row(f"{path}, {who}", ms, table="step", V=49_152)
          for path, who, ms in (("logits", "cpp", 100.0), ("logits", "eager", 210.0),
                                ("chunks", "cpp", 70.0), ("chunks", "eager", 300.0))),
        loss_memory_row("cpp", 600.0), loss_memory_row("eager", 16_000.0),
        loss_memory_row("matmul + cpp, in place", 2_900.0),
    ]  # fmt: skip
    return rows


# ---- what it measures


def test_every_part_has_rows_behind_gates(tiny, capsys):
    rows = run_json(capsys)
    assert {row["kind"] for row in rows} == {"limit", "losses", "losses memory"}
    found = [row for row in rows if row["kind"] == "losses"]
    own = [row for row in found if not row["peer"] and row["op"] != ema.OP]
    assert {row["status"] for row in own} == {"ok"}, [r["note"] for r in own if r["note"]]
    assert {row["table"] for row in found} == {"logits", "linear", "kl", "step", "ema"}
    assert {row["dtype"] for row in found} == {"float32", "bfloat16"}
    auto = nk.resolve("pairwise_pg_loss", "cpu")
    over_logits = [r for r in found if r["table"] == "logits" and r["dtype"] == "float32"]
    for model in losses.BOTH:
        some = [r for r in over_logits if r["shape"].startswith(model)]
        names = [r["variant"] for r in some if r["op"] == "pairwise_pg_loss" and not r["peer"]]
        assert names == [auto, f"{auto}, in place", "eager"]
        assert {"torch.compile", "torch log_softmax (no entropy)"} <= {r["variant"] for r in some}
    for row in found:
        rate = row["tflops"] if row["limit"].startswith("gemm") else row["gbps"]
        if row["ms"]:
            assert rate == pytest.approx(row["share"] * LIMITS[row["limit"]][0], rel=1e-3)
    text = losses_tables.text(rows)
    titles = {table: x for table, x in losses_tables.TITLES.items() if table != "ema"}
    assert all(title in text for title in titles.values())
    assert hasattr(nk, ema.OP) == (losses_tables.TITLES["ema"] in text)


def test_the_standing_run_has_what_is_asked_for():
    found = losses.cases("cpu", quick=False)
    for op in ("token_logprobs", "pairwise_pg_loss"):
        shapes = {x.shape for x in found["logits"] if x.op == op and x.dtype == F32}
        assert shapes == {(4, 24, 49_152), (4, 24, 151_936)}
    assert [(x.op, x.shape) for x in found["linear"]] == [
        ("linear_pairwise_pg_loss", (8, 64, 576, 49_152))
    ]
    assert {x.op: x.options.get("kl") for x in found["kl"]} == {
        "token_kl": None,
        "pairwise_pg_loss": "exact",
    }
    assert losses_memory.SHAPES["cpu"] == (4096, 576, "qwen2.5-1.5b", F32)
    assert losses_memory.SHAPES["cuda"] == (65_536, 4096, "qwen2.5-1.5b", BF16)
    for quick in (False, True):
        on_gpu = losses.cases("cuda", quick)
        assert {x.dtype for some in on_gpu.values() for x in some} == {BF16}
        assert all(x.shape[0] * x.shape[1] >= 8192 for some in on_gpu.values() for x in some)


def test_the_step_is_that_of_the_quickstart():
    found = losses.step("cpu")
    assert (found.dims, found.dtype) == ({"B": 32, "T": 16, "D": 576, "V": 49_152}, "bfloat16")
    # nobody asks for the gradient of a head that an adapter does not train
    assert found.leaves == (0,)
    assert found.traffic("fwd+bwd")[1] == 4 * 512 * 576 * 49_152
    auto = nk.resolve("pairwise_pg_loss", "cpu")
    assert [x.name for x in found.contenders] == [
        f"logits, {auto}", "logits, eager", f"chunks, {auto}", "chunks, eager",
    ]  # fmt: skip


def test_weights_are_as_many_as_the_model_has():
    assert sum(ema.sizes("smollm2-135m")) == 134_515_008


# ---- gates


def test_a_wrong_loss_gets_no_number(tiny, capsys, monkeypatch):
    right = nk.pairwise_pg_loss

    def wrong(*args, **kwargs):
        result = right(*args, **kwargs)
        return result._replace(loss=2 * result.loss)

    monkeypatch.setattr(nk, "pairwise_pg_loss", wrong)
    # the gates ask the same function in float64
    monkeypatch.setattr(gates, "nk", SimpleNamespace(pairwise_pg_loss=right))
    rows = run_json(capsys, "--quick", "--only", "logits", status=1)
    ours = [r for r in rows if r.get("op") == "pairwise_pg_loss" and not r["peer"]]
    assert {(row["status"], row["ms"]) for row in ours} == {("wrong", None)}
    assert "wrong" in losses_tables.text(rows)


@pytest.mark.parametrize("update", ["_foreach", "_loop"])
def test_an_average_is_compared(update, monkeypatch):
    monkeypatch.setattr(ema, "DECAY", 0.9)
    parts = (70, 5, 900)

    def statuses() -> list[str]:
        problem = _problem(ema.contenders(parts, "cpu"), parts)
        return [status for status, _ in ops.judge(problem).values()]

    def late(averages, weights):
        # one that is left out
        for average, weight in zip(averages[1:], weights[1:], strict=True):
            average.lerp_(weight, 1 - ema.DECAY)

    monkeypatch.setattr(nk, ema.OP, lambda a, w, decay: ema._loop(a, w), raising=False)
    assert statuses() == ["ok"] * 3
    monkeypatch.setattr(ema, update, late)
    assert statuses().count("wrong") == (1 if update == "_foreach" else 2)


def _problem(contenders, parts) -> Problem:
    return Problem(
        ema.OP, "", {}, "float32", ("fwd",), lambda: ema.inputs(sum(parts), "cpu"), (), contenders,
        lambda mode: (1, 1, "copy"),
    )  # fmt: skip


# ---- memory


def test_memory_is_that_of_the_logits_or_of_a_chunk():
    spec = {"N": 512, "D": 16, "V": 20_000, "dtype": "float32", "device": "cpu"}
    eager, product, ours = (
        losses_memory.measure(spec | {"variant": x})
        for x in ("eager", "matmul + cpp, in place", "cpp")
    )
    logits = 4 * 512 * 20_000 / 2**20
    assert eager["mb"] > 3 * logits
    assert logits < product["mb"] < 2.5 * logits
    assert eager["mb"] < losses_memory.EAGER_COPIES * logits
    assert ours["gradients_mb"] == pytest.approx(4 * 16 * (512 + 20_000) / 2**20)
    assert ours["mb"] < product["mb"] + 8


def test_memory_is_measured_in_a_process_of_its_own():
    spec = {"dims": {"N": 64, "D": 16, "V": 2000}, "variant": "cpp", "dtype": "float32"}
    found = losses_memory._measured(spec, "cpu")
    assert found.keys() == {"mb", "gradients_mb"}
    wrong = losses_memory._measured(spec | {"variant": "nothing"}, "cpu")
    assert wrong["status"] == "wrong"
    assert "nothing" in wrong["note"]


def test_what_does_not_fit_is_measured_with_fewer_tokens(tiny, monkeypatch):
    V = VOCABULARY[losses.LARGEST]
    copies = losses_memory.EAGER_COPIES
    monkeypatch.setattr(losses_memory, "FEWEST", 1)
    free = 4 * copies * 32 * V / losses_memory.SHARE
    monkeypatch.setattr(losses_memory, "_free_bytes", lambda device: free + 1e3)
    rows = list(losses_memory.rows("cpu", quick=False))
    assert [(r["dims"]["N"], r["variant"] == "eager", r["status"]) for r in rows] == [
        (64, False, "ok"), (64, False, "ok"), (64, True, "missing"),
        (32, False, "ok"), (32, False, "ok"), (32, True, "ok"),
    ]  # fmt: skip
    assert "needs about" in rows[2]["note"]


# ---- targets


def test_targets_stand_beside_figures_in_a_terminal_alone():
    rows = loss_rows()
    shown = {table.title: table.cells() for table in losses_tables.tables(rows, targets=True)}
    first = shown[losses_tables.TITLES["logits"]][0]
    assert first[3:9] == [
        "10.0", "16.0 (met: 15)", "20.0", "8.00 (met: 7)", "2.50",
        "3.00 (torch log\\_softmax (no entropy))",
    ]  # fmt: skip
    assert first[-2:] == ["0 % (met: 20 %)", "20.0 % (NOT met: 20 %)"]
    logits, chunks = shown[losses_tables.TITLES["step"]]
    assert logits[3:] == ["0.100", "0.210", "2.10", "2.10 (met: 2)"]
    assert chunks[3:] == ["0.0700", "0.300", "4.29", "3.00 (met: 2)"]
    (memory,) = shown["Memory of the loss from hidden states, beyond the inputs"]
    assert memory[2:7] == ["600", "100", "2,900", "16,000", "3.75 % (met: 10 %)"]
    assert losses_tables.verdict(rows) == "Targets met: 9 of 11"
    assert [report.fault(row) for row in rows] == [""] * len(rows)
    assert len(report.latest(rows * 2)) == len(rows)
    whole = page.page(rows, [])
    lines = whole[whole.index("## Losses") : whole.index("## The linear family")]
    assert "16.0" in lines
    assert "met" not in lines


def test_other_dtypes_and_few_tokens_have_no_target():
    rows = [loss_row(name, ms, dtype="bfloat16") for name, ms in (("cpp", 1.0), ("eager", 9.0))] + [
        loss_memory_row(name, mb, N=512) for name, mb in (("cpp", 600.0), ("eager", 900.0))
    ]
    assert not losses_tables.figures(rows)
    assert len(losses_tables.tables(rows)) == 2


def test_a_missing_rival_leaves_a_gap():
    rows = [loss_row("cpp", 1.0), loss_row("Liger", None, peer=True, note="needs a GPU")]
    (table,) = losses_tables.tables(rows)
    assert table.cells()[0][6:9] == ["-", "-", "-"]
    assert "needs a GPU" in losses_tables.text(rows)


def gpu_rows() -> list[dict]:
    at = stamp(GPU) | {"dtype": "bfloat16"}
    head = {"op": "linear_pairwise_pg_loss", "limit": "gemm bfloat16", "mode": "fwd+bwd", **at}
    linear = {"kind": "losses", "table": "linear"}
    return [
        loss_row("triton, in place", 1.0, share=0.87, **at),
        loss_row("eager", 20.0, **at),
        op_row("triton", 40.0, share=0.84, **head) | linear,
        op_row("Liger fused linear GRPO", 50.0, peer=True, **head) | linear,
        op_row("ema_update_", 0.5, op="ema_update_", share=0.93, limit="copy", **at)
        | {"kind": "losses", "table": "ema"},
        loss_memory_row("triton", 9_000.0, N=65_536, gradients_mb=2_000.0, **at),
    ]


def test_a_gpu_has_other_targets():
    rows = gpu_rows()
    shown = [line for table in losses_tables.tables(rows, targets=True) for line in table.cells()]
    assert shown[0][9] == "87.0 % (met: 85 %)"
    assert shown[1][7:9] == ["1.25 (Liger fused linear GRPO) (met: 1)", "84.0 % (NOT met: 85 %)"]
    assert shown[2][3] == "93.0 % (met: 90 %)"
    assert shown[3][-1] == "7.34 (met: 8)"


def test_a_gpu_run_has_it(tmp_path):
    (whole,), (part,) = (
        gpu_parts.losses("cuda", only, tmp_path).commands for only in ([], ["linear"])
    )
    assert whole.arguments[-1] == "--quick"
    assert part.arguments[-2:] == ["--only", "linear"]
    (line,) = (x for x in summary(gpu_rows(), [], tmp_path) if x.startswith("losses:"))
    assert "targets met: 4 of 5" in line
    assert "ema_update_ 93.0 % of copy" in line


# ---- flags


@pytest.mark.parametrize(
    ("flags", "named"),
    [(["--only", "nope"], "logits, linear"), (["--device", "cuda"], "no CUDA"), (["x"], "x")],
)
def test_bad_flags_end_in_one_line(flags, named, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert losses.main(flags) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1
    assert named in printed.err


def test_a_case_is_named_by_its_rows():
    found = losses.case("token_kl", losses.LARGEST, "cpu", F32, {})
    assert found == Case("token_kl", "qwen2.5-1.5b, 96 rows", (4, 24, 151_936), F32, {})
