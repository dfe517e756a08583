"""The bench: what it refuses to time, what it times, and what its limits and flags mean."""

import functools
import gc
import itertools
import json
import time

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import bench.__main__ as cli
from bench import gates, heads, measure, ops, peers
from bench.measure import Rotation, Timing, Variant, interleave
from bench.problem import Contender, Problem
from nlhf_kernels.testing import OPS
from nlhf_kernels.testing.cases import HEADS
from nlhf_kernels.testing.compare import Answers
from tests.conftest import LIMITS
from tests.wrong_kernels import BUGS, Kernels

pytestmark = pytest.mark.usefixtures("small_bench")


def contender(name="someone", run=None, gate=lambda: None, **more) -> Contender:
    return Contender(name, more.pop("peer", True), run or (lambda a, k: a[0] * 2), gate, **more)


def problem(*contenders, size=64) -> Problem:
    return Problem(
        op="token_logprobs",
        shape="tiny-1b, made up",
        dims={"N": 1, "V": size},
        dtype="float32",
        modes=ops.MODES,
        inputs=lambda: ((torch.ones(size),), {}),
        leaves=(0,),
        contenders=contenders,
        traffic=lambda mode: (4 * size, size, "read"),
    )


def rows_of(problem, modes=("fwd",), seconds=0.01, verdicts=None) -> dict:
    verdicts = verdicts or ops.judge(problem)
    rows = ops.measure(problem, verdicts, modes, "cpu", seconds, LIMITS)
    return {(row["mode"], row["variant"]): row for row in rows}


# ---- gates


@pytest.mark.parametrize("peer", [True, False])
def test_a_liar_gets_no_number_and_ours_an_exit_status(peer, monkeypatch, capsys):
    def gate():
        raise AssertionError("off by 3\nand so on")

    liar = contender("liar", gate=gate, peer=peer)
    monkeypatch.setattr(cli, "select", lambda arguments: [problem(liar, contender("honest"))])
    assert cli.main(["--json"]) == (0 if peer else 1)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for row in (row for row in rows if row["kind"] == "op"):
        if row["variant"] == "honest":
            assert row["status"] == "ok"
            assert row["ms"][1] > 0
        else:
            assert (row["status"], row["note"]) == ("wrong", "off by 3")
            assert row["ms"] is row["gbps"] is row["share"] is row["peak_mb"] is None


def test_wrong_kernels_of_ours_get_no_number(op, plant):
    case = OPS[op].tests[0]
    backend = plant(Kernels("").table())
    (row, *_) = rows_of(ops.problem(case, "cpu", [backend], [])).values()
    assert (row["status"], row["variant"]) == ("ok", backend)
    assert row["ms"]
    wrong = 0
    for bug in BUGS[op]:
        backend = plant(Kernels(bug).table())
        found = ops.problem(case, "cpu", [backend], [])
        verdicts = ops.judge(found)
        if verdicts[backend][0] == "wrong":
            wrong += 1
            assert all(row["ms"] is None for row in rows_of(found, verdicts=verdicts).values())
    assert wrong > 3


@pytest.mark.parametrize("where", ["gate", "run"])
def test_who_raises_is_named_with_the_reason(where):
    def fail(*_):
        raise RuntimeError("no memory\nleft")

    for peer, status in ((True, "missing"), (False, "wrong")):
        failing = contender("failing", peer=peer, **{where: fail})
        rows = rows_of(problem(failing, contender("other")))
        row = rows["fwd", "failing"]
        assert (row["status"], row["note"], row["ms"]) == (status, "fails: no memory", None)
        assert rows["fwd", "other"]["ms"]


def test_who_is_missing_is_not_asked():
    def fail(*_):
        raise AssertionError

    rows = rows_of(problem(contender("absent", run=fail, gate=fail, missing="not installed")))
    assert rows["fwd", "absent"]["status"] == "missing"
    assert rows["fwd", "absent"]["note"] == "not installed"


@pytest.fixture
def worked_out(monkeypatch) -> list[str]:
    """The names of what gates have worked out."""
    made, once = [], Answers.once

    def counted(self, name, make, by=None):
        return once(self, name, lambda *inputs: made.append(name) or make(*inputs), by)

    monkeypatch.setattr(Answers, "once", counted)
    return made


def test_what_is_right_is_worked_out_once(op, worked_out, monkeypatch):
    for module in (peers, heads):
        monkeypatch.setattr(module, "compiled", lambda function: function)
    case = OPS[op].bench["cpu"][0]
    found = ops.judge(ops.problem(case, "cpu", ["eager", "cpp"], peers.contenders(case, "cpu")))
    # two of our backends, and the peers
    least = 4 if op == "linear_mixture_sample" else 5
    assert len([status for status, _ in found.values() if status == "ok"]) >= least
    assert (
        worked_out
        == {
            "mixture_sample": ["draw", "mixture", "log-sum-exps"],
            "linear_mixture_sample": ["draw", "mixture"],
            "token_logprobs": ["log-probabilities", "oracle"],
            "token_kl": ["gradients", "oracle"],
            "pairwise_pg_loss": ["loss of 3", "oracle"],
            **{head: ["gradients"] for head in HEADS},
        }[op]
    )
    assert not gates._latest, "kept beyond the problem"


def test_who_writes_over_its_inputs_spoils_nobody_else():
    case = OPS["token_logprobs"].bench["cpu"][0]

    def spoil(args, kwargs):
        found = peers.log_softmax(args, kwargs)
        for x in args:
            x.data.zero_()
        return found[0] + 1, None

    def rival(name, solve):
        return contender(name, gate=functools.partial(gates.logprobs, solve, case, "cpu"))

    rivals = [rival("spoiler", spoil), rival("honest", peers.log_softmax), rival("again", spoil)]
    found = ops.judge(ops.problem(case, "cpu", ["eager", "cpp"], rivals))
    wrong = {name for name, (status, _) in found.items() if status == "wrong"}
    assert wrong == {"spoiler", "again"}


# ---- times


def test_slow_is_slower_than_fast():
    variants = {
        "slow": Variant(lambda _: time.sleep(0.02)),
        "fast": Variant(lambda _: time.sleep(0.004)),
    }
    found = interleave(variants, "cpu", 0.1)
    for name, least in (("slow", 20), ("fast", 4)):
        assert least <= found[name].ms[0] <= found[name].ms[1] <= found[name].ms[2]
        assert found[name].calls >= measure.LEAST_ROUNDS
        # a sleep is time, but no work
        assert found[name].cpu_us < 1e3 * found[name].ms[1]
    assert found["fast"].ms[1] < found["slow"].ms[1]


def test_variants_take_turns():
    turns = []

    def variant(name):
        return Variant(lambda _: turns.append(name) or time.sleep(0.002))

    interleave({"a": variant("a"), "b": variant("b")}, "cpu", 0.02, warm=True)
    # the last call of each is for its memory
    assert turns == ["a", "b"] * (len(turns) // 2)
    assert len(turns) >= 2 * (measure.LEAST_ROUNDS + 1)


def test_short_calls_are_repeated_and_slow_ones_have_fewer_rounds():
    found = interleave({"short": Variant(lambda _: None)}, "cpu", 0.01)
    assert found["short"].calls > 100
    found = interleave({"slow": Variant(lambda _: time.sleep(0.02))}, "cpu", 0.01)
    assert found["slow"].calls == measure.LEAST_ROUNDS_IF_SLOW


def test_calls_over_a_second_have_two_samples(monkeypatch):
    monkeypatch.setattr(measure, "LONG_SECONDS", 0.01)
    variants = {
        "long": Variant(lambda _: time.sleep(0.02)),
        "short": Variant(lambda _: time.sleep(0.001)),
    }
    found = interleave(variants, "cpu", 0.005)
    assert (found["long"].calls, found["short"].calls >= measure.LEAST_ROUNDS) == (2, True)
    # a budget above a second is filled
    assert interleave(variants, "cpu", 0.1)["long"].calls >= measure.LEAST_ROUNDS


def test_the_collector_is_as_it_was_after_measuring():
    before = gc.get_freeze_count()
    seen = []
    interleave({"x": Variant(lambda _: seen.append(gc.get_freeze_count()))}, "cpu", 0.01)
    assert min(seen) > before
    assert gc.get_freeze_count() == before

    def fail(_):
        raise RuntimeError

    with pytest.raises(RuntimeError):
        interleave({"x": Variant(fail)}, "cpu", 0.01)
    assert gc.get_freeze_count() == before


def test_a_backward_is_timed_without_its_forward():
    def slow_forward(args, kwargs):
        time.sleep(0.03)
        return args[0] * 2

    rows = rows_of(problem(contender("slow", run=slow_forward)), ops.MODES)
    assert rows["fwd", "slow"]["ms"][0] >= 30
    assert rows["bwd", "slow"]["ms"][1] < 15
    assert rows["fwd+bwd", "slow"]["ms"][0] >= 30


def test_the_peak_is_that_of_a_call_alone():
    size = 2**23
    found = interleave({"big": Variant(lambda x: x + 1, lambda: torch.ones(size))}, "cpu", 0.01)
    assert found["big"].peak_mb == pytest.approx(32, abs=4)


def test_figures_follow_from_the_median():
    timing = Timing(ms=[1.0, 2.0, 9.0], calls=7, cpu_us=5.0, peak_mb=None)
    row = ops._figures(timing, 10**7, 10**8, "read", LIMITS)
    assert row["gbps"] == pytest.approx(5)
    assert row["tflops"] == pytest.approx(0.05)
    assert row["share"] == pytest.approx(0.5)
    assert row["peak_mb"] is None
    row = ops._figures(timing, 10**7, 10**8, "gemm bfloat16", LIMITS)
    assert row["share"] == pytest.approx(0.25)


# ---- inputs


def test_rotation_goes_around_more_than_the_cache():
    base = torch.arange(2.0 * 10_000).view(2, 10_000)
    inputs = ((base[:, 3:9000], 5), {"x": torch.ones(7)})
    rotation = Rotation(inputs, "cpu")
    assert len(rotation) * rotation.set_bytes > 2**18
    assert not rotation.cached
    turns = [rotation.next() for _ in range(2 * len(rotation))]
    seen = [args[0].data_ptr() for args, _ in turns]
    assert len(set(seen)) == len(rotation)
    assert base.data_ptr() + 12 not in seen
    for (args, kwargs), again in itertools.pairwise(turns):
        assert args[0].data_ptr() != again[0][0].data_ptr()
        assert torch.equal(args[0], inputs[0][0])
        assert args[0].stride() == inputs[0][0].stride()
        assert args[1] == 5
        assert torch.equal(kwargs["x"], torch.ones(7))


def test_rotation_says_when_the_cap_leaves_it_in_the_cache(monkeypatch):
    monkeypatch.setattr(measure, "CAP_BYTES", 2**12)
    rotation = Rotation(((torch.ones(2**11),), {}), "cpu")
    assert len(rotation) == 2
    assert rotation.cached
    assert rows_of(problem(contender()))["fwd", "someone"]["cached"]


@pytest.mark.parametrize("mode", ops.MODES)
def test_who_writes_over_the_logits_gets_them_anew(mode, monkeypatch):
    # two sets, so that their turns come again soon
    monkeypatch.setattr(measure, "CAP_BYTES", 2**9)

    class Overwrite(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            assert bool((x == 1).all()), "logits of an earlier call"
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            leaf.data.fill_(7)
            return grad

    def run(args, kwargs):
        nonlocal leaf
        (leaf,) = args
        return Overwrite.apply(leaf)

    leaf = None
    rows = rows_of(problem(contender(run=run, inplace=True)), (mode,))
    assert rows[mode, "someone"]["status"] == "ok", rows


def test_what_is_in_place_only_in_the_backward_has_no_row_of_its_own_forward():
    case = OPS["token_logprobs"].bench["cpu"][0]
    rows = rows_of(ops.problem(case, "cpu", ["eager"], []), ops.MODES)
    assert {key: row["status"] for key, row in rows.items()} == {
        ("fwd", "eager"): "ok",
        ("bwd", "eager"): "ok",
        ("bwd", "eager, in place"): "ok",
        ("fwd+bwd", "eager"): "ok",
        ("fwd+bwd", "eager, in place"): "ok",
    }


# ---- limits


class Touched(TorchDispatchMode):
    """How many bytes the arguments of the ops have that run."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.name() in ("aten::sum", "aten::amax", "aten::copy_", "aten::mm"):
            self.bytes += sum(x.nbytes for x in args if isinstance(x, torch.Tensor))
        return function(*args, **(kwargs or {}))


def test_limits_move_what_they_count(monkeypatch):
    """As if each call took a second: the value is then what was moved."""
    touched = []

    def best(call, device):
        with Touched() as mode:
            call()
        touched.append(mode.bytes)
        return 1.0

    monkeypatch.setattr(measure, "_best", best)
    monkeypatch.setattr(measure, "GEMM", {"cpu": 64})
    found = MEASURED_LIMITS("cpu")
    size = measure.buffer_bytes("cpu")
    assert found["read"] == found["copy"] == (size / 1e9, "GB/s")
    assert found["gemm float32"] == found["gemm bfloat16"] == (2 * 64**3 / 1e12, "TFLOP/s")
    assert touched == [size, size, size, 2 * 4 * 64**2, 2 * 2 * 64**2]


MEASURED_LIMITS = measure.limits.__wrapped__
CACHE_BYTES = measure.cache_bytes.__wrapped__


def test_limits_are_measured(monkeypatch):
    monkeypatch.setattr(measure, "GEMM", {"cpu": 128})
    before = torch.get_float32_matmul_precision()
    found = MEASURED_LIMITS("cpu")
    assert set(found) == set(LIMITS)
    assert all(value > 0 for value, _ in found.values())
    assert {name: unit for name, (_, unit) in found.items()} == {
        name: unit for name, (_, unit) in LIMITS.items()
    }
    assert torch.get_float32_matmul_precision() == before


def test_buffers_of_limits_are_larger_than_the_cache(monkeypatch):
    monkeypatch.setattr(measure, "cache_bytes", CACHE_BYTES)
    cache = CACHE_BYTES("cpu")
    assert cache >= 2**20
    assert measure.buffer_bytes("cpu") >= min(measure.CAP_BYTES - 2**13, 3 * cache)


# ---- the table


def test_the_table_names_who_is_missing_once():
    def gate():
        raise AssertionError("off by 3")

    found = problem(
        contender("eager", peer=False), contender("absent", missing="not installed"),
        contender("liar", gate=gate),
    )  # fmt: skip
    text = ops.table(list(rows_of(found, ops.MODES).values()))
    assert text.count("missing: absent: not installed") == 1
    assert text.count("wrong: liar: off by 3") == 1
    assert text.count("1.00") >= 3
    for mode in ops.MODES:
        assert f"\n{mode} " in text
