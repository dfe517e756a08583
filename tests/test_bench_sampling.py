"""``bench sampling``: what it measures, what it says of targets, and what it does not let pass."""

import json

import pytest
import torch

import nlhf_kernels as nk
from bench import gates, gpu_parts, logits, ops, peers, sampling, sampling_memory, sampling_tables
from bench.gpu_summary import summary
from bench.logits import FLAT, PEAKED, REAL
from bench.sampling_tables import Figure
from nlhf_kernels.testing.case import VOCABULARY
from nlhf_kernels.testing.check import check_by
from nlhf_kernels.testing.compare import Answers
from tests.test_bench_report import GPU, cpu_rows, limit_row, memory_row, sampling_row, stamp

HF, LSE = "Hugging Face path", "yardstick: two logsumexp (no draw)"


@pytest.fixture
def tiny(small_bench, monkeypatch):
    """Vocabularies of a thousand, a real model that need not be fetched, little time."""
    for at, model in enumerate((*sampling.MODELS, logits.REAL_MODEL)):
        monkeypatch.setitem(VOCABULARY, model, 1100 + at)
    monkeypatch.setattr(sampling, "SECONDS", {"cpu": 0.005})
    monkeypatch.setattr(sampling, "QUICK_SECONDS", 0.005)
    generator = torch.Generator().manual_seed(0)
    real = 3 * torch.randn(2, 64, VOCABULARY[logits.REAL_MODEL], generator=generator)
    monkeypatch.setattr(logits, "real", lambda: tuple(real))


def run_json(capsys, *flags, status=0) -> list[dict]:
    assert sampling.main([*flags, "--json"]) == status
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


# ---- what it measures


def test_every_part_has_rows_behind_gates(tiny, capsys):
    rows = run_json(capsys, "--quick", "--only", "plain,top-p,repeated,filters,dtypes")
    assert {row["kind"] for row in rows} == {"limit", "sampling"}
    found = [row for row in rows if row["kind"] == "sampling"]
    assert {row["status"] for row in found} == {"ok"}, [r["note"] for r in found if r["note"]]
    assert {row["filters"] for row in found} == set(logits.FILTERS)
    assert {row["logits"] for row in found} == {FLAT, PEAKED, REAL}
    assert {row["dtype"] for row in found} == {"float32", "bfloat16"}
    automatic = nk.resolve("mixture_sample", "cpu")
    of_one = [r for r in found if (r["shape"], r["filters"]) == ("llama2-7b, B=1", "no filter")]
    for again in (False, True):
        assert [r["variant"] for r in of_one if r["repeated"] == again] == [automatic, HF, LSE]
    for row in found:
        assert row["of_copy"] == pytest.approx(row["gbps"] / 8.0, rel=1e-3)
        assert row["dims"]["V"] == VOCABULARY[row["shape"].split(",")[0]]


def test_the_standing_run_has_what_is_asked_for():
    found = sampling.cases("cpu", quick=False)
    assert {case.shape for case in found["plain"]} == {
        (B, V) for V in (32_000, 128_256, 151_936, 256_000) for B in (1, 16, 64)
    }
    kinds = {(case.shape[1], case.logits) for case in found["top-p"]}
    assert (49_152, REAL) in kinds
    assert {(V, x) for V in (32_000, 256_000) for x in (FLAT, PEAKED)} <= kinds
    on_gpu = sampling.cases("cuda", quick=False)
    assert {case.dtype for case in on_gpu["plain"]} == {torch.bfloat16}
    few = sampling.cases("cuda", quick=True)
    assert {case.shape for case in few["plain"]} == {(1, 151_936), (128, 151_936)}
    (case, *_) = few["plain"]
    assert not any("compile" in x.name for x in sampling.problem(case, "cpu", True).contenders)
    largest = {case.shape[1]: case.shape[0] * case.shape[1] for case in on_gpu["plain"]}
    assert all(size >= sampling_tables.LARGE for size in largest.values())


def test_the_peers_that_it_looks_for_are_there():
    case = logits.case("llama2-7b", 1, torch.bfloat16)
    names = {x.name for device in ("cpu", "cuda") for x in peers.contenders(case, device)}
    assert names >= {*sampling.RIVALS["cpu"], *sampling_tables.RIVALS} - {"eager"}
    assert {sampling_tables.HUGGING_FACE, sampling_tables.LOGSUMEXP} == {HF, LSE}


def test_rows_that_cannot_be_fetched_say_why(tiny, capsys, monkeypatch):
    def real():
        raise ValueError("quickstart: pip could not download it")

    monkeypatch.setattr(logits, "real", real)
    rows = run_json(capsys, "--quick", "--only", "top-p")
    missing = [row for row in rows if row.get("status") == "missing"]
    assert {row["logits"] for row in missing} == {REAL}
    assert all("could not download" in row["note"] and row["ms"] is None for row in missing)
    assert "could not download" in sampling_tables.text(rows)


def test_normal_rows_have_their_variance():
    for kind, variance in ((FLAT, 1), (PEAKED, 16)):
        (policy, ref), _ = logits.case("llama2-7b", 2, torch.float32, "no filter", kind).inputs()
        for x in (policy, ref):
            assert float(x.var()) == pytest.approx(variance, rel=0.05)
        assert not torch.equal(policy, ref)


def test_flat_rows_keep_sixty_percent():
    args, kwargs = logits.case("llama2-7b", 2, torch.float32, sampling.TOP_P, FLAT).inputs()
    kept = gates.Mixture(args, kwargs).sampling > -torch.inf
    assert 0.55 < float(kept.double().mean()) < 0.65


# ---- gates


def test_a_wrong_sampler_gets_no_number(tiny, capsys, monkeypatch):
    right = nk.mixture_sample

    def wrong(*args, **kwargs):
        draw = right(*args, **kwargs)
        return draw._replace(log_kept_mass=draw.log_kept_mass - 1e-4)

    monkeypatch.setattr(nk, "mixture_sample", wrong)
    rows = run_json(capsys, "--quick", "--only", "plain,top-p", status=1)
    ours = [row for row in rows if row["kind"] == "sampling" and not row["peer"]]
    assert {(row["status"], row["ms"]) for row in ours} == {("wrong", None)}
    assert "wrong" in sampling_tables.text(rows)


@pytest.mark.parametrize(
    ("miss", "count", "right"),
    [(-3e-7, 6, True), (-3e-7, 7, True), (-3e-7, 8, False),
     (3e-7, 7, True), (3e-7, 6, True), (3e-7, 5, False)],
)  # fmt: skip
def test_a_prefix_may_end_where_float32_cannot_tell(miss, count, right):
    """top_p misses the sum of 6 tokens by so little that 6 are as right as 7, and no others."""
    scores = torch.randn(1, 40).sort(descending=True).values
    reached = scores.double().softmax(1)[0].cumsum(0)
    kwargs = {"top_p": float(reached[5]) + miss, "seed": 1, "position": 0}

    def solve(args, kwargs):
        """Who keeps so many."""
        middle = float(reached[count - 2 : count].mean())
        return nk.mixture_sample(*args, **kwargs | {"top_p": middle}, backend="eager")

    got = solve((scores, None), kwargs)
    want = gates.contract(solve, (scores, None), kwargs).logprobs(got.tokens)["log_kept_mass"]
    assert bool((got.log_kept_mass.double() - want).abs() < 5e-6) == right


def test_the_fast_oracle_is_the_slow_one(tiny):
    for filters in logits.FILTERS:
        case = logits.case("llama2-7b", 4, torch.bfloat16, filters)
        problem = ops.problem(case, "cpu", ["eager"], [])
        assert ops.judge(problem) == {"eager": ("ok", "")}
        check_by(Answers(case.inputs()), case.op, "eager")


# ---- targets


def test_targets_stand_beside_figures():
    rows = [r for r in cpu_rows() if r["kind"].startswith("sampling")]
    shown = {table.title: table.cells() for table in sampling_tables.tables(rows)}
    assert shown["No filter"][0] == [
        "32,000", "16", PEAKED, "1.00", "101", "101 (met: 100)", "5.00", "5.00 (NOT met: 6)",
        "346 %",
    ]  # fmt: skip
    (worst, *_), (flat, *_) = (x for title, x in shown.items() if title.startswith("Top-p"))
    assert worst[5] == "149 (NOT met: 150)"
    assert flat[5] == "40.0"
    assert [line[-1] for line in shown["Memory beyond the inputs"]] == [
        "0.250 (met: 1)", "1.25 (NOT met: 1)",
    ]  # fmt: skip
    # of three shapes: 3 met and 3 not without filter, 3 and 3 with, 1 and 1 of the memory
    assert sampling_tables.verdict(rows) == "Targets met: 7 of 14"


def test_one_row_has_a_target_of_its_own():
    rows = [sampling_row("cpp", 1.0, B=1), sampling_row(HF, 61.0, B=1, peer=True)]
    (table,) = sampling_tables.tables(rows)
    assert str(table.body[0][5]) == "61.0 (met: 60)"


def test_the_slower_kind_of_rows_counts():
    at = {"filters": "top-p 0.9", "V": 49_152}
    rows = []
    for kind, ms in ((PEAKED, 200.0), (REAL, 140.0)):
        rows += [sampling_row("cpp", 1.0, logits=kind, **at)]
        rows += [sampling_row(HF, ms, logits=kind, peer=True, **at)]
    (table,) = sampling_tables.tables(rows)
    ((*_, kind, _, _, times, _, _, _),) = table.body
    assert (kind, str(times)) == (REAL, "140 (NOT met: 150)")


def test_inputs_just_used_stand_apart():
    both = (("cpp", 1.0), (HF, 9.0))
    rows = [sampling_row(*who, repeated=again) for again in (False, True) for who in both]
    shown = {table.title: table.cells() for table in sampling_tables.tables(rows)}
    assert list(shown) == ["No filter", "The same inputs again and again, no filter"]
    assert len(shown["No filter"]) == 1


def test_a_missing_rival_leaves_a_gap_and_no_verdict():
    rows = [sampling_row("cpp", 1.0), sampling_row(HF, None, peer=True, note="not here")]
    (table,) = sampling_tables.tables(rows)
    assert str(table.body[0][5]) == "-"
    assert sampling_tables.verdict(rows) == "Targets met: 0 of 0"
    assert "not here" in sampling_tables.text(rows)


def gpu_rows() -> list[dict]:
    at = stamp(GPU) | {"dtype": "bfloat16"}
    graph = {"graph_ms": [0.008, 0.009, 0.02]}
    return [
        limit_row("copy", 4_000.0, "GB/s", **stamp(GPU)),
        sampling_row("triton", 0.02, B=1, **at, **graph),
        sampling_row("triton", 0.02, B=128, of_copy=0.87, **at | {"peer": False}),
        sampling_row("eager", 0.3, B=128, **at),
        sampling_row("FlashInfer (tokens only)", 0.03, B=128, **at | {"peer": True}),
        sampling_row("triton", 0.04, B=128, filters="top-p 0.9", of_copy=0.5, **at),
    ]


def test_a_gpu_has_other_targets():
    rows = gpu_rows()
    shown = [line for table in sampling_tables.tables(rows) for line in table.cells()]
    assert shown[0][3:6] == ["20.0", "9.00 (met: 10)", "50.0 %"]
    assert shown[1][5:9] == ["87.0 % (met: 85 %)", "15.0 (met: 10)", "-", "1.50 (NOT met: 2)"]
    assert shown[2][5] == "50.0 % (NOT met: 60 %)"


def test_a_gpu_run_has_it(tmp_path):
    (whole,), (part,) = (
        gpu_parts.sampling("cuda", only, tmp_path).commands for only in ([], ["plain"])
    )
    assert whole.arguments[-1] == "--quick"
    assert part.arguments[-2:] == ["--only", "plain"]
    assert list(gpu_parts.PARTS).index("sampling") == 3


def test_the_summary_of_a_gpu_run_has_a_line(tmp_path):
    (line,) = (x for x in summary(gpu_rows(), [], tmp_path) if x.startswith("sampling:"))
    assert "targets met: 3 of 5" in line
    assert "no filter 87% of copy (model-151k, B=128)" in line
    assert "one row in a graph 9 us" in line


def test_figures_know_their_direction():
    assert Figure(0.9, 1.0, most=True).met
    assert not Figure(1.0, 1.0, most=True).met
    assert Figure(6.0, 6.0).met
    assert Figure(None, 6.0).met is None
    assert str(Figure(None, 6.0)) == "-"


# ---- memory


def test_memory_that_a_call_takes_is_seen(monkeypatch):
    right, kept = nk.mixture_sample, []

    def greedy(policy, *args, **kwargs):
        if len(policy):
            # what stays, and what is given back before the call ends
            kept.append(torch.ones(3 * 2**18))
            torch.ones(2 * 2**18).sum()
        return right(policy, *args, **kwargs)

    monkeypatch.setattr(nk, "mixture_sample", greedy)
    monkeypatch.setitem(VOCABULARY, "llama2-7b", 1100)
    spec = {"model": "llama2-7b", "B": 2, "filters": "no filter", "logits": PEAKED}
    found = sampling_memory.measure(spec | {"backend": "eager", "threads": 1})
    assert 4.5 < found["mb"] < 8
    assert found["floor_mb"] < 0.5


def test_memory_is_measured_in_a_process_of_its_own(capsys):
    (row, *_) = sampling.memory_cases(quick=True)
    found = sampling.memory(row)
    assert (found["status"], found["note"]) == ("ok", "")
    assert found["mb"] >= 0
    assert found["threads"] == 2
    assert memory_row(1.0).keys() >= found.keys()


def test_a_child_that_fails_is_named(monkeypatch):
    monkeypatch.setattr(sampling, "filters_of", lambda case: "no such filter")
    (case, *_) = sampling.memory_cases(quick=True)
    found = sampling.memory(case)
    assert found["status"] == "wrong"
    assert "no such filter" in found["note"]


# ---- flags


@pytest.mark.parametrize(
    ("flags", "named"),
    [(["--only", "nope"], "plain, top-p"), (["--device", "cuda"], "no CUDA"), (["x"], "x")],
)
def test_bad_flags_end_in_one_line(flags, named, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert sampling.main(flags) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1
    assert named in printed.err
