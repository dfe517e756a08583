"""The harness is tested too: every planted bug is rejected, and what has none is accepted."""

import itertools

import pytest
import torch
from torch.testing._internal.optests import OpCheckError

from nlhf_kernels import eager
from nlhf_kernels.testing import OPS, Case, check, traffic
from nlhf_kernels.testing.cases import HEADS, SAMPLERS
from nlhf_kernels.testing.check import check_by
from nlhf_kernels.testing.compare import (
    TOLERANCE,
    Answers,
    Snapshot,
    compare,
    poisoned_memory,
)
from nlhf_kernels.testing.gradients import oracle
from tests import wrong_chunks, wrong_kernels
from tests.conftest import why_not
from tests.wrong_kernels import Kernels

PLANTED = [(op, bug) for op, bugs in wrong_kernels.BUGS.items() for bug in bugs]
IN_CHUNKS = [(op, bug) for op, bugs in wrong_chunks.BUGS.items() for bug in bugs]
LOSSES = [case for op in OPS if op not in SAMPLERS for case in OPS[op].tests]


def rejections(op: str, backend: str, **how):
    """(case, what ``check`` said) for the cases that it rejects."""
    for case in OPS[op].tests:
        try:
            check(case, backend, **how)
        except AssertionError as error:
            yield case, str(error)


def test_the_honest_kernel_is_accepted(op, plant):
    assert not list(rejections(op, plant(Kernels("").table())))


@pytest.mark.parametrize(("of", "bug"), PLANTED, ids=lambda x: x)
def test_a_planted_bug_is_rejected(of, bug, plant):
    assert next(rejections(of, plant(Kernels(bug).table())), None), "every case accepts it"


@pytest.mark.parametrize("bug", wrong_kernels.BUGS["pairwise_pg_loss"])
def test_a_planted_bug_is_rejected_by_its_own_logprobs(bug, plant):
    found = rejections("pairwise_pg_loss", plant(Kernels(bug).table()), by_own_logprobs=True)
    assert next(found, None), "every case accepts it"


@pytest.mark.parametrize(("of", "bug"), IN_CHUNKS, ids=lambda x: x)
def test_a_bug_of_the_chunks_is_rejected(of, bug, monkeypatch):
    """Around right kernels, which are the fastest here."""
    if why := why_not("cpp"):
        pytest.skip(f"cpp: {why}")
    wrong_chunks.plant(monkeypatch, bug)
    assert next(rejections(of, "cpp"), None), "every case accepts it"


def test_every_op_has_bugs_to_reject():
    for op in OPS:
        assert len(wrong_kernels.BUGS[op]) + len(wrong_chunks.BUGS.get(op, ())) > 10, op


def cast(x):
    """The right values in the wrong dtype: autograd would cast it, so ``check`` cannot see it."""
    return x.float()


def alias(x):
    return x.view_as(x)


def overwrite(x):
    return x.add_(1).clone()


@pytest.mark.parametrize(
    ("body", "fake"),
    [(cast, torch.empty_like), (alias, torch.empty_like), (overwrite, torch.empty_like)],
    ids=["dtype", "alias", "mutation"],
)
def test_opcheck_rejects_what_check_cannot_see(body, fake):
    with torch.library._scoped_library("nlhf_wrong", "DEF") as library:
        library.define("op(Tensor x) -> Tensor")
        library.impl("op", body, "CPU")
        torch.library.register_fake("nlhf_wrong::op", fake, lib=library)
        x = torch.randn(3, 4).bfloat16()
        with pytest.raises(OpCheckError):
            torch.library.opcheck(torch.ops.nlhf_wrong.op.default, (x,))


# ---- the parts of check


@pytest.mark.parametrize(
    "got",
    [
        torch.tensor([1.0, torch.nan]),
        torch.tensor([1.0, 2.0001]),
        torch.tensor([1.0, 2.0]).double(),
        torch.tensor([[1.0, 2.0]]),
        torch.tensor([1.0]),
        torch.tensor([1.0, torch.inf]),
        torch.empty(2, device="meta"),
        [1.0, 2.0],
    ],
    ids=["nan", "value", "dtype", "shape", "size", "inf", "device", "type"],
)
def test_compare_rejects(got):
    want = torch.tensor([1.0, 2.0], dtype=torch.float64)
    compare("x", want.float(), want, torch.float32)
    with pytest.raises(AssertionError, match="x"):
        compare("x", got, want, torch.float32)


def test_compare_wants_nan_where_the_oracle_has_it():
    with pytest.raises(AssertionError):
        compare("x", torch.zeros(1), torch.full((1,), torch.nan).double(), torch.float32)


def test_tolerances_are_a_few_roundings():
    """Nobody loosens the table unseen: one or two ulps at 16 bits, about 100 in float32."""
    for dtype, (rtol, atol) in TOLERANCE.items():
        eps = torch.finfo(dtype).eps
        assert rtol <= {torch.float32: 100, torch.float64: 5e4}.get(dtype, 1) * eps
        assert atol <= 5e-6


def test_memory_is_poisoned_and_the_switch_put_back():
    before = torch.are_deterministic_algorithms_enabled()
    with poisoned_memory():
        assert torch.empty(1000).isnan().all()
        assert torch.randn(4).new_empty(7, dtype=torch.float64).isnan().all()
        assert (torch.empty(5, dtype=torch.int64) == torch.iinfo(torch.int64).max).all()
    assert torch.are_deterministic_algorithms_enabled() == before
    with pytest.raises(ZeroDivisionError), poisoned_memory():
        _ = 1 // 0
    assert torch.are_deterministic_algorithms_enabled() == before


def test_a_snapshot_sees_the_memory_around_a_view():
    base = torch.full((3, 7), torch.nan)
    view = base[:, 1:5].copy_(torch.zeros(3, 4))
    before = Snapshot((view,), {})
    before.require_unchanged()
    base.data[1, 6] = 1
    with pytest.raises(AssertionError, match="memory around"):
        before.require_unchanged()
    # with a new version and its own values it may change, the rest may not
    view.add_(1)
    with pytest.raises(AssertionError, match="memory around"):
        before.require_unchanged(but=view)


@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_an_oracle_in_parts_is_the_whole(loss):
    """One sequence at a time, where the whole does not fit."""
    args, kwargs = loss.inputs()
    kwargs.pop("inplace_backward", None)
    whole, parts = oracle(loss.op, args, kwargs), oracle(loss.op, args, kwargs, at_once=1)
    assert len(whole.gradients) == 1
    assert len(parts.gradients) == (1 if "cu_seqlens" in kwargs else max(1, len(args[0])))
    assert parts.live == whole.live
    for x, y in zip(whole.outputs, parts.outputs, strict=True):
        compare("an output", y, x, x.dtype)
    one, other = (torch.cat([x for _, x in result.gradients]) for result in (whole, parts))
    compare("the gradient", other, one, torch.float64)


def test_answers_are_worked_out_once_and_given_in_copies():
    base = torch.full((3, 7), torch.nan)
    view = base[:, 1:5].copy_(torch.zeros(3, 4))
    answers, made = Answers(((view,), {"x": 3})), []

    def make(args, kwargs):
        made.append(args)
        return len(made)

    assert [answers.once("one", make) for _ in range(2)] == [1, 1]
    assert answers.once("another", make) == 2
    # what it depends on may be another tensor with the same values, or overwritten later
    for number, by in ((3, torch.zeros(2)), (4, torch.ones(2)), (5, torch.ones(2).double())):
        assert [answers.once("by", make, by.clone()) for _ in range(2)] == [number] * 2
        assert answers.once("by", make, by) == number
        by.fill_(7)
    assert answers.once("one", make) == 1

    (copy,), kwargs = answers.inputs()
    assert kwargs == {"x": 3}
    assert copy.stride() == view.stride()
    assert copy.storage_offset() == 1
    # with the memory around it
    around = torch.empty(0).set_(copy.untyped_storage())
    assert torch.equal(around.isnan(), base.flatten().isnan())
    copy.fill_(1)
    assert torch.equal(answers.inputs()[0][0], view)


@pytest.mark.parametrize("of", OPS)
def test_the_same_answers_judge_the_honest_and_the_wrong(of, plant):
    """In either order, and the wrong cannot spoil what the next is judged by."""
    case = OPS[of].tests[0]
    answers = Answers(case.inputs())
    rejected = 0
    for bug in wrong_kernels.BUGS[of]:
        for by_own in (False, True):
            wrong = plant(Kernels(bug).table())
            try:
                check_by(answers, of, wrong, by_own_logprobs=by_own)
            except AssertionError:
                rejected += 1
            check_by(answers, of, plant(Kernels("").table()), by_own_logprobs=by_own)
    assert rejected > 6


# ---- cases


def test_inputs_are_seeded(case):
    def flat(seed):
        args, kwargs = case.inputs(seed)
        return [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]

    once, again = flat(3), flat(3)
    for x, y in zip(once, again, strict=True):
        assert torch.equal(x.nan_to_num(), y.nan_to_num())
        assert x.stride() == y.stride()


def test_names_of_cases_are_unique(op):
    for cases in (OPS[op].tests, *OPS[op].bench.values()):
        names = [case.why for case in cases]
        assert len(set(names)) == len(names)


def test_the_far_tail_is_far():
    """Its tokens have probabilities below a millionth, and half of them win."""
    case = next(c for c in OPS["mixture_sample"].tests if c.why == "the far tail")
    (policy, _), kwargs = case.inputs()
    got = eager.mixture_sample(policy, **kwargs)
    rare = got.sampling_logprobs < -13.5
    assert rare.tolist() == [True] * 4 + [False] * 4


def check_head_traffic(case: Case, products: int) -> None:
    """A product is 2NVD: three of a trained head, one of a reference's, and a second pass."""
    (moved, forward), (moved_back, backward) = traffic(case), traffic(case, backward=True)
    expected = {
        "linear_token_logprobs": (1, 3),
        "linear_token_kl": (2, 3),
        "linear_pairwise_pg_loss": (1, 2),
    }[case.op]
    assert (forward, backward) == tuple(2 * products * n for n in expected)
    *batch, D, V = case.shape
    factors = (torch.Size(batch).numel() + V) * D * case.dtype.itemsize
    heads = 2 if case.op == "linear_token_kl" else 1
    assert (moved, moved_back) == (heads * factors, (heads + 1) * factors)


def test_traffic_of_bench_cases(op):
    for case in itertools.chain(*OPS[op].bench.values()):
        assert isinstance(case, Case)
        size = torch.Size(case.shape).numel()
        moved, flops = traffic(case)
        if op in HEADS:
            check_head_traffic(case, size)
            continue
        assert flops >= 4 * size
        if op == "linear_mixture_sample":
            # not the logits: one head, or two, and little beside
            head = case.shape[1] * case.shape[2] * case.dtype.itemsize
            assert moved // head == (1 if "one head" in case.why else 2)
            continue
        assert moved % size == 0
        if op not in SAMPLERS:
            passes = 3 if op == "token_kl" else 2
            assert traffic(case, backward=True)[0] == passes * size * case.dtype.itemsize
