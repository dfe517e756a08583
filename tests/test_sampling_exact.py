"""What ``mixture_sample`` keeps and draws under filters: exactly, on every backend.

What is right is ``Draw`` in float64. Rows whose kept set hangs on less than float32 can tell are
left out by a criterion of their own (``tests.sampling.settle``); no tolerance is wider for them.
"""

import functools
import itertools
import math
import os
import subprocess
import sys

import pytest
import torch

import nlhf_kernels as nk
from nlhf_kernels.testing import Case, check
from nlhf_kernels.testing.check import check_by
from nlhf_kernels.testing.compare import Answers
from nlhf_kernels.testing.draw import Draw
from tests.conftest import far_apart
from tests.sampling import INF, KINDS, models, rows, seeds_for, settle, surprise

# V stands for the size of the vocabulary
FILTERS = {
    "k = 1": {"top_k": 1},
    "k = 50": {"top_k": 50},
    "all but one": {"top_k": "V - 1"},
    "k = V": {"top_k": "V"},
    "k > V": {"top_k": "V + 7"},
    "half": {"top_p": 0.5},
    "p = 0.9": {"top_p": 0.9},
    "the least p": {"top_p": 1e-6},
    "nearly all": {"top_p": 1 - 1e-6},
    "min-p": {"min_p": 0.05},
    "min-p of 1": {"min_p": 1.0},
    "k and p": {"top_k": 50, "top_p": 0.6},
    "all three": {"top_k": 40, "top_p": 0.95, "min_p": 0.02},
}


def filters_of(name: str, V: int) -> dict:
    sizes = {"V - 1": max(V - 1, 1), "V": V, "V + 7": V + 7}
    return {key: sizes.get(x, x) for key, x in FILTERS[name].items()}


@functools.cache
def answers(V: int, names: tuple[str, ...], kinds: tuple[str, ...]) -> Answers:
    """Inputs with a filter, or the one for all, and a kind for each row."""
    policy, ref = models(kinds, V)
    B = len(kinds)
    found = [filters_of(name, V) for name in names]
    filters = found[0]
    if len(names) > 1:
        off = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
        filters = {
            key: torch.tensor([x.get(key, none) for x in found]) for key, none in off.items()
        }
    settings = {
        # with powers of two the sums of ties are exact
        "mixture_coef": torch.tensor([0.25, 0.5, 0.0, 1.0]).repeat(B)[:B],
        "temperature": 0.8,
        "seed": seeds_for(B, "cpu"),
        "position": torch.arange(B),
        **filters,
    }
    kept, top_p = settle(policy, ref, settings, move=True)
    assert kept.sum() >= 0.5 * B, "hardly any row can be told"
    if "top_p" in filters:
        settings["top_p"] = top_p
    settings = {name: x[kept] if isinstance(x, torch.Tensor) else x for name, x in settings.items()}
    return Answers(((policy[kept], ref[kept]), settings))


def on(target, answers: Answers) -> Answers:
    """The same on the target's device; on the CPU what is right is found once for all backends."""
    if target.device == "cpu":
        return answers
    args, kwargs = answers.inputs()
    moved = {
        name: x.to(target.device) if isinstance(x, torch.Tensor) else x
        for name, x in kwargs.items()
    }
    return Answers((tuple(x.to(target.device) for x in args), moved))


@pytest.mark.parametrize("V", [1, 2, 1023, 1024, 1025, 5000])
@pytest.mark.parametrize("name", FILTERS)
def test_keeps_what_float64_keeps(name, V, target):
    kinds = KINDS
    if target.interpreted:
        # all of them in turn
        at = list(FILTERS).index(name) + V
        kinds = (KINDS[at % 6], KINDS[(at + 3) % 6])
    check_by(on(target, answers(V, (name,), kinds)), "mixture_sample", target.backend)


def test_filters_of_their_own_in_a_large_vocabulary(target):
    names = tuple(FILTERS)
    kinds = tuple(itertools.islice(itertools.cycle(KINDS), len(names)))
    if target.interpreted:
        names, kinds = names[6::3], kinds[6::3]
    check_by(on(target, answers(49_152, names, kinds)), "mixture_sample", target.backend)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("filters", [{"top_k": 30}, {"top_p": 0.85}, {"min_p": 0.03}], ids=str)
def test_keeps_the_same_of_any_dtype(filters, dtype, target):
    """bfloat16 makes ties of its own, and they are broken by the lowest id."""
    policy, ref = (x.to(dtype) for x in models(KINDS[:2] * rows(target, 3, 1), 1300, seed=4))
    settings = {"mixture_coef": 0.5, "temperature": 0.8, "position": 2, **filters}
    settings["seed"] = seeds_for(len(policy), "cpu")
    kept, _ = settle(policy, ref, settings)
    assert kept.any()
    settings["seed"] = settings["seed"][kept]
    inputs = Answers(((policy[kept], ref[kept]), settings))
    check_by(on(target, inputs), "mixture_sample", target.backend)


@pytest.mark.parametrize("filters", [{"top_k": 200}, {"top_p": 0.9}, {"min_p": 0.01}], ids=str)
def test_agrees_with_eager_under_filters(filters, compiled):
    target = compiled
    B = rows(target, 1000, 8)
    policy, ref = 2 * torch.randn(2, B, 1100, device=target.device)
    settings = {"mixture_coef": 0.3, "temperature": 0.9, "position": 11, **filters}
    seed = seeds_for(B, target.device)
    got, want = (
        nk.mixture_sample(policy, ref, **settings, seed=seed, backend=backend)
        for backend in (target.backend, "eager")
    )
    differ = (got.tokens != want.tokens).nonzero()[:, 0]
    assert len(differ) <= max(1, B // 500)
    Draw(policy[differ], ref[differ], **settings, seed=seed[differ]).require_winners(
        got.tokens[differ]
    )


# ---- distribution

SPREAD = [
    (40, {}, 0.5, 0.7),
    (2500, {}, 0.25, 0.6),
    (1030, {"top_k": 30}, 0.25, 1.0),
    (2049, {"top_p": 0.6}, 0.75, 0.9),
    (3000, {"min_p": 0.05}, 1.0, 0.8),
    (1025, {"top_k": 200, "top_p": 0.9, "min_p": 0.02}, 0.0, 0.9),
    (1500, {"top_k": 60}, -0.5, 1.0),
]


@pytest.mark.parametrize(("V", "filters", "coef", "temperature"), SPREAD, ids=str)
def test_draws_as_often_as_float64_says(V, filters, coef, temperature, target):
    B = rows(target, 4000, 20)
    policy, ref = 2 * torch.randn(2, 1, V, device=target.device)
    settings = {"mixture_coef": coef, "temperature": temperature, "position": 0, **filters}
    settings["extrapolate"] = coef < 0
    probs = Draw(policy, ref, **settings, seed=0).kept.softmax(1)[0].cpu()
    tokens = nk.mixture_sample(
        policy.expand(B, V), ref.expand(B, V), **settings, seed=3, backend=target.backend
    ).tokens
    assert abs(surprise(tokens.cpu().bincount(minlength=V), probs)) < 5


@pytest.mark.parametrize("filters", [{"top_k": 1500}, {"top_p": 0.5}, {"min_p": 1e-9}], ids=str)
def test_rare_tokens_that_are_kept_come_at_their_rate(filters, target):
    """As without filters: 5e-7 each on compiled backends, in the tile of the dominant token too.

    All of the tail ties, so that top-k and top-p keep its lowest ids; ``top_p`` is of the tail.
    """
    V = 2041
    B, tail = (100_000, 1e-3) if target.backend != "eager" else (2_000, 1e-2)
    if target.interpreted:
        B, tail = 8, 0.25
    logits = torch.full((V,), math.log(tail / (V - 1)), device=target.device)
    logits[0] = math.log1p(-tail)
    each = tail / (V - 1)
    kept = V - 1
    if "top_k" in filters:
        kept = filters["top_k"] - 1
    if "top_p" in filters:
        kept = round(kept * filters["top_p"])
        # in the middle of the last
        filters = {"top_p": 1 - tail + (kept - 0.5) * each}
    hits = []
    for seed in range(2):
        got = nk.mixture_sample(
            logits.expand(B, V), seed=seed, position=5, backend=target.backend, **filters
        )
        hits.append(got.tokens[got.tokens > 0])
    hits = torch.cat(hits)
    # float32 may end a prefix of such tokens a few earlier or later
    assert hits.max() <= kept + 4
    rate = kept * each / (1 - tail + kept * each)
    expected = 2 * B * rate
    assert abs(len(hits) - expected) < 5 * math.sqrt(expected)
    inside, share = int((hits < 1024).sum()), min(1.0, 1023 / kept)
    assert abs(inside - share * len(hits)) <= 5 * math.sqrt(len(hits) * share * (1 - share))


def test_the_far_tail_under_filters(target):
    """Tokens of probability 1e-7 that just win: a filter that keeps all must not coarsen noise."""
    for filters in ({"top_k": 1024}, {"min_p": 1e-30}):
        options = {"ref_dtype": None, "special": "far tail", "temperature": 1.0, "filters": filters}
        case = Case("mixture_sample", "the far tail", (8, 1025), torch.float32, options)
        check(case, target.backend, device=target.device)


# ---- who else is in the batch, how many threads, which process


@pytest.mark.parametrize("filters", [{}, {"top_k": 50}, {"top_p": 0.9}, {"min_p": 0.01}], ids=str)
def test_a_row_alone_is_split_as_it_is_in_a_batch(filters, target):
    """Bit for bit, whoever works on which part of the vocabulary."""
    B, V = rows(target, 6, 2), rows(target, 49_152, 2100)
    policy, ref = 2 * torch.randn(2, B, V, device=target.device)
    seed = seeds_for(B, target.device)

    def draw(of):
        return nk.mixture_sample(
            policy[of], ref[of], mixture_coef=0.25, temperature=0.9, seed=seed[of], position=7,
            backend=target.backend, **filters,
        )  # fmt: skip

    before = torch.get_num_threads()
    try:
        together = draw(slice(None))
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for row in (0, B - 1):
                some = slice(row, row + 1)
                for x, y in zip(draw(some), together, strict=True):
                    assert torch.equal(x, y[some])
            for x, y in zip(draw(slice(None)), together, strict=True):
                assert torch.equal(x, y)
    finally:
        torch.set_num_threads(before)


PROCESS = """
import sys, torch, nlhf_kernels as nk
backend, device = sys.argv[1:]
policy, ref = torch.randn(2, 5, 2100, generator=torch.Generator().manual_seed(1)).to(device)
for filters in ({}, {"top_p": 0.8, "top_k": 100}):
    draw = nk.mixture_sample(policy, ref, mixture_coef=0.5, temperature=0.9, seed=-5, position=2,
                             backend=backend, **filters)
    print(draw.tokens.tolist(), [x.cpu().numpy().tobytes().hex() for x in draw[1:]])
"""


def test_two_processes_draw_the_same(target):
    said = []
    for threads in ("1", "2"):
        result = subprocess.run(
            [sys.executable, "-c", PROCESS, target.backend, target.device],
            capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": threads},
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        said.append(result.stdout)
    assert said[0].count("[") == 4
    assert said[0] == said[1]


# ---- size


@pytest.mark.parametrize("filters", [{}, {"top_p": 0.9, "top_k": 40}], ids=str)
def test_more_than_2_31_logits(filters, compiled):
    """Rows at the far end of such a batch draw what they draw alone."""
    target = compiled
    if target.interpreted:
        pytest.skip("needs a GPU: Triton's interpreter takes hours for 2^21 tiles")
    V = 32_768
    B = 2**31 // V + 9
    # the same rows again and again, but each with its seed
    rows_once = torch.randn(1024, V, device=target.device).bfloat16()
    policy = rows_once.repeat(-(-B // 1024), 1)[:B]
    seed = seeds_for(B, target.device)
    settings = {"temperature": 0.9, "position": 0, "backend": target.backend, **filters}
    far = slice(B - 12, None)
    got = nk.mixture_sample(policy, seed=seed, **settings)
    alone = nk.mixture_sample(policy[far].clone(), seed=seed[far], **settings)
    for x, y in zip(got, alone, strict=True):
        assert torch.equal(x[far] if len(x) else x, y)


@pytest.mark.parametrize("filters", [{"top_k": 3}, {"top_p": 0.7}, {"min_p": 0.1}], ids=str)
def test_rows_far_apart_under_filters(filters, target, tmp_path):
    """4 GiB between two rows: an offset in int32 reads somewhere else."""
    V = 1030
    near = torch.randn(2, V, device=target.device).bfloat16()
    far = far_apart(near, tmp_path)
    settings = {"mixture_coef": 0.5, "seed": 1, "position": 0, "backend": target.backend, **filters}
    for x, y in zip(nk.mixture_sample(far, far, **settings),
                    nk.mixture_sample(near, near, **settings), strict=True):  # fmt: skip
        assert torch.equal(x, y)


# ---- rows that nothing can be drawn from


@pytest.mark.parametrize("filters", [{"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}], ids=str)
def test_bad_rows_are_bad_under_filters(filters, target):
    policy, ref = torch.randn(2, 8, 1030, device=target.device)
    policy[1, 3], ref[2, 1029], policy[4, 0] = math.nan, math.nan, INF
    policy[5], ref[6] = -INF, -INF
    # each model has a token, the mixture none
    policy[7], ref[7] = -INF, -INF
    policy[7, 0], ref[7, 1029] = 0, 0
    settings = {"mixture_coef": 0.5, "seed": 0, "position": 0, "backend": target.backend}
    got = nk.mixture_sample(policy, ref, **settings, **filters)
    bad = [False, True, True, False, True, True, True, True]
    assert (got.tokens == -1).tolist() == bad
    for x in got[1:]:
        assert x.isnan().tolist() == bad
    with pytest.raises(ValueError, match=r"mixture_sample: row 1 \(6 in all\)"):
        nk.mixture_sample(policy, ref, **settings, **filters, check=True)


@pytest.mark.parametrize("filters", [{"top_k": 9}, {"top_p": 0.5}, {"min_p": 0.3}], ids=str)
def test_temperature_zero_has_no_use_for_filters(filters, target):
    x = torch.zeros(3, 2100, device=target.device)
    x[1, [5, 1030]] = 1
    x[2, [1500, 2099]] = 2
    settings = {"temperature": 0.0, "seed": 0, "position": 0, "backend": target.backend}
    got = nk.mixture_sample(x, **settings, **filters)
    assert got.tokens.tolist() == [0, 5, 1500]
    assert (got.sampling_logprobs == 0).all()
    assert (got.log_kept_mass == 0).all()
