"""What ``mixture_sample`` owes beyond single calls: its distribution, its independence, its words.

Thresholds are at five standard deviations, and seeds are fixed: a failure is no bad luck.
"""

import math

import pytest
import torch

import nlhf_kernels as nk
from nlhf_kernels import eager, registry
from nlhf_kernels.testing.compare import compare
from nlhf_kernels.testing.draw import Draw, kept_ids
from tests.sampling import INF, rows, seeds_for, surprise


def test_agrees_with_eager_token_for_token(compiled):
    target = compiled
    B = rows(target, 3000, 80)
    policy, ref = 3 * torch.randn(2, B, 1100, device=target.device)
    settings = {"mixture_coef": 0.3, "temperature": 0.9, "position": 11}
    seed = seeds_for(B, target.device)
    got = nk.mixture_sample(policy, ref, **settings, seed=seed, backend=target.backend)
    want = nk.mixture_sample(policy, ref, **settings, seed=seed, backend="eager")
    differ = (got.tokens != want.tokens).nonzero()[:, 0]
    assert len(differ) <= B // 1000
    Draw(policy[differ], ref[differ], **settings, seed=seed[differ]).require_winners(
        got.tokens[differ]
    )
    same = got.tokens == want.tokens
    for name in ("policy_logprobs", "ref_logprobs", "sampling_logprobs"):
        x, y = (getattr(draw, name)[same] for draw in (got, want))
        compare(name, x, y, torch.float32)


def test_distribution_is_exact(target):
    """Eleven tokens in three tiles, with the geometric mixture's exact probabilities."""
    B, V = rows(target, 4000, 150), 2060
    ids = torch.tensor([0, 1, 5, 700, 1023, 1024, 1025, 2000, 2047, 2048, 2059])
    policy, ref = torch.full((2, V), -INF)
    generator = torch.Generator().manual_seed(3)
    policy[ids] = torch.randn(len(ids), generator=generator)
    ref[ids] = torch.randn(len(ids), generator=generator)
    ref[5] = -INF
    mixture = (0.75 * policy + 0.25 * ref).div(0.8)
    probs = mixture.softmax(-1)
    tokens = nk.mixture_sample(
        policy.to(target.device).expand(B, V),
        ref.to(target.device).expand(B, V),
        mixture_coef=0.25,
        temperature=0.8,
        seed=7,
        position=1,
        backend=target.backend,
    ).tokens
    counts = tokens.cpu().bincount(minlength=V)
    assert surprise(counts, probs) < 5


def test_rare_tokens_come_at_their_rate(target):
    """2,040 tokens of probability 5e-7 each, in the first tile's tail and in a second tile: what a
    capped or coarse noise would lose. On eager 5e-6, and 1e-4 in the interpreter, which has time
    for few draws. ``cases`` has exact cases for all: "the far tail".
    """
    V = 2041
    B, tail = (100_000, 1e-3) if target.backend != "eager" else (3_000, 1e-2)
    if target.interpreted:
        B, tail = 100, 0.25
    logits = torch.full((V,), math.log(tail / (V - 1)), device=target.device)
    logits[0] = math.log1p(-tail)
    hits = []
    for seed in range(2):
        tokens = nk.mixture_sample(
            logits.expand(B, V), seed=seed, position=5, backend=target.backend
        ).tokens
        hits.append(tokens[tokens > 0])
    hits = torch.cat(hits)
    expected = 2 * B * tail
    assert abs(len(hits) - expected) < 5 * math.sqrt(expected)
    # and evenly: by the tile they lie in
    inside = int((hits < 1024).sum())
    share = 1023 / (V - 1)
    assert abs(inside - share * len(hits)) < 5 * math.sqrt(len(hits) * share * (1 - share))


@pytest.mark.parametrize(
    "filters",
    [{"top_k": 4}, {"top_p": 0.8}, {"min_p": 0.04}, {"top_k": 7, "top_p": 0.95, "min_p": 0.02}],
    ids=str,
)
def test_distribution_under_filters(filters, target):
    B, V = rows(target, 4000, 24), 12
    logits = torch.randn(V, generator=torch.Generator().manual_seed(5)).mul(1.5)
    ids = kept_ids(
        logits.tolist(),
        [filters.get("top_k", 0)],
        [filters.get("top_p", 1.0)],
        [filters.get("min_p", 0.0)],
    )
    assert 1 < len(ids) < V
    kept = torch.full((V,), -INF)
    kept[ids] = logits[ids]
    logits = logits.to(target.device)
    settings = {"seed": 1, "position": 0, "backend": target.backend}
    got = nk.mixture_sample(logits.expand(B, V), **settings, **filters)
    assert surprise(got.tokens.cpu().bincount(minlength=V), kept.softmax(-1)) < 5
    # log of the whole mixture = sampling log-probability + log of the kept mass
    whole = logits.log_softmax(-1)[got.tokens]
    torch.testing.assert_close(got.sampling_logprobs + got.log_kept_mass, whole)
    assert (got.log_kept_mass < 0).all()


# ---- filters


def test_filters_come_in_order(target):
    """Every other order of the three keeps another set: worked out by hand."""
    probs = torch.tensor([0.4, 0.2, 0.15, 0.1, 0.1, 0.05], dtype=torch.float64)
    # top-k 4 leaves .4 .2 .15 .1 of .85: .47 .24 .18 .12; top-p .7 then needs two (.47 + .24);
    # top-p first needs three (.4 + .2 + .15); min-p .5 last keeps .2 = half of .4 (and not .19)
    settings = {"seed": 0, "position": 0, "backend": target.backend}
    B = rows(target, 500, 20)
    logits = probs.log().to(target.device).expand(B, 6)
    two = nk.mixture_sample(logits, top_k=4, top_p=0.7, **settings)
    assert set(two.tokens.tolist()) == {0, 1}
    three = nk.mixture_sample(logits, top_p=0.7, **settings)
    assert set(three.tokens.tolist()) == {0, 1, 2}
    # relative to the maximum, whatever the others left
    last = nk.mixture_sample(logits, top_k=5, top_p=0.99, min_p=0.37, **settings)
    assert set(last.tokens.tolist()) == {0, 1, 2}
    compare("log kept mass", last.log_kept_mass, logits.new_full((B,), 0.75).log(), torch.float64)


def test_exactly_k_survive_a_tie(target):
    B = rows(target, 400, 24)
    x = torch.zeros(B, 9, device=target.device)
    got = nk.mixture_sample(x, top_k=3, seed=0, position=0, backend=target.backend)
    assert set(got.tokens.tolist()) == {0, 1, 2}
    compare("of three", got.sampling_logprobs, x.new_full((B,), 1 / 3).log(), torch.float32)


def test_a_row_keeps_a_token_whatever_the_filters(target):
    """top_p below the largest probability, min_p of 1, top_k beyond V."""
    logits = torch.randn(rows(target, 20, 6), 9, device=target.device)
    settings = {"seed": 0, "position": 0, "backend": target.backend}
    best = logits.argmax(-1)
    for filters in ({"top_p": 1e-9}, {"min_p": 1.0}, {"top_k": 1}):
        got = nk.mixture_sample(logits, **settings, **filters)
        assert torch.equal(got.tokens, best)
        assert (got.sampling_logprobs == 0).all()
    got = nk.mixture_sample(logits, **settings, top_k=2**40)
    assert torch.equal(got.log_kept_mass, torch.zeros_like(got.log_kept_mass))


# ---- noise


@pytest.mark.parametrize("filters", [{}, {"top_k": 9, "top_p": 0.8}, {"min_p": 0.1}], ids=str)
def test_a_draw_does_not_depend_on_the_batch(filters, target):
    policy, ref = torch.randn(2, 9, 1100, device=target.device)
    seed = seeds_for(9, target.device)
    position = torch.arange(9, device=target.device)
    coef = torch.linspace(0, 1, 9, device=target.device)

    def draw(of):
        return nk.mixture_sample(
            policy[of], ref[of], mixture_coef=coef[of], temperature=0.9, seed=seed[of],
            position=position[of], backend=target.backend, **filters,
        )  # fmt: skip

    together = draw(torch.arange(9))
    for some in ([4], [8, 0, 3], [5, 5, 1, 2]):
        for x, y in zip(draw(some), together, strict=True):
            assert torch.equal(x, y[some])


def test_an_integer_seed_is_folded_into_the_rows(target):
    x = torch.randn(12, 50, device=target.device)
    seed = nk.fold_in(-9, torch.arange(12, device=target.device))
    one, other = (
        nk.mixture_sample(x, seed=s, position=2, backend=target.backend) for s in (-9, seed)
    )
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_tensor_without_dimensions_is_every_rows(target):
    policy, ref = torch.randn(2, 5, 50, device=target.device)
    values = {"mixture_coef": 0.25, "temperature": 0.5, "seed": 9, "position": 4}
    tensors = {name: torch.tensor(x, device=target.device) for name, x in values.items()}
    filled = {name: x.repeat(5) for name, x in tensors.items()}
    one, other = (
        nk.mixture_sample(policy, ref, **x, backend=target.backend) for x in (tensors, filled)
    )
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    # and parameters with gaps between them
    gaps = {name: x.repeat(10)[::2] for name, x in tensors.items()}
    other = nk.mixture_sample(policy, ref, **gaps, backend=target.backend)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_seeds_and_positions_are_independent(target):
    """With shared noise y and y' would be equal; with independent they meet at the rate sum p^2."""
    B, V = rows(target, 1500, 60), 6
    probs = torch.tensor([0.3, 0.2, 0.2, 0.1, 0.1, 0.1])
    logits = probs.log().to(target.device).expand(B, V)

    def draw(side, position):
        seed = eager.fold_in(seeds_for(B, target.device), side)
        return nk.mixture_sample(
            logits, seed=seed, position=position, backend=target.backend
        ).tokens

    first = draw(0, 0)
    assert torch.equal(first, draw(0, 0))
    rate = float((probs**2).sum())
    for other in (draw(1, 0), draw(0, 1), draw(1, 1)):
        meet = int((first == other).sum())
        assert abs(meet - rate * B) < 5 * math.sqrt(B * rate * (1 - rate))


def test_only_the_low_word_of_a_position_counts(target):
    x = torch.randn(5, 50, device=target.device)
    one, other = (
        nk.mixture_sample(x, seed=3, position=p, backend=target.backend).tokens
        for p in (7, 7 + 2**33)
    )
    assert torch.equal(one, other)


# ---- particular rows


def test_temperature_zero_takes_the_first_maximum(target):
    x = torch.zeros(3, 2100, device=target.device)
    x[1, [5, 1030]] = 1
    x[2, [1500, 2099]] = 2
    got = nk.mixture_sample(x, temperature=0.0, seed=0, position=0, backend=target.backend)
    assert got.tokens.tolist() == [0, 5, 1500]
    assert (got.sampling_logprobs == 0).all()
    assert (got.log_kept_mass == 0).all()
    compare("at temperature 1", got.policy_logprobs,
            x.double().log_softmax(-1)[range(3), got.tokens], torch.float32)  # fmt: skip


def test_coefficients_0_and_1_leave_the_other_model_out(target):
    """0 * -inf would be NaN: the other model's infinities must not matter."""
    B = rows(target, 60, 12)
    policy, ref = torch.full((2, B, 4), -INF, device=target.device)
    policy[:, 0], policy[:, 1] = 0.5, 0.0
    ref[:, 2], ref[:, 3] = 0.5, 0.0
    settings = {"seed": 1, "position": 0, "backend": target.backend}
    for coef, ids in ((0.0, {0, 1}), (1.0, {2, 3})):
        for value in (coef, torch.full((B,), coef, device=target.device)):
            got = nk.mixture_sample(policy, ref, mixture_coef=value, **settings)
            assert set(got.tokens.tolist()) == ids
            own, other = got[1 : 3] if coef == 0 else got[2:0:-1]  # fmt: skip
            assert torch.equal(own, got.sampling_logprobs)
            assert (other == -INF).all()
    # in between no token is left
    got = nk.mixture_sample(policy, ref, mixture_coef=0.5, **settings)
    assert (got.tokens == -1).all()
    assert got.sampling_logprobs.isnan().all()


@pytest.mark.parametrize("model", ["policy", "ref"])
@pytest.mark.parametrize("value", [math.nan, INF, -INF])
def test_check_names_the_bad_row(model, value, target):
    policy, ref = torch.randn(2, 6, 1030, device=target.device)
    models = {"policy": policy, "ref": ref}
    models[model][4] = -INF if value == -INF else models[model][4]
    models[model][4, 1028] = value
    settings = {"mixture_coef": 0.5, "seed": 0, "position": 0, "backend": target.backend}
    got = nk.mixture_sample(*models.values(), **settings)
    assert (got.tokens == -1).tolist() == [False] * 4 + [True, False]
    for x in got[1:]:
        assert x.isnan().tolist() == [False] * 4 + [True, False]
    with pytest.raises(ValueError, match=r"mixture_sample: row 4 \(1 in all\)"):
        nk.mixture_sample(*models.values(), **settings, check=True)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("mixture_coef", 1.5),
        ("mixture_coef", math.nan),
        ("temperature", -1.0),
        ("temperature", INF),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("min_p", -0.1),
        ("position", -1),
    ],
)
def test_check_looks_into_tensors(name, value):
    settings = {"mixture_coef": 0.5, "seed": 0, "position": 0}
    rows = torch.tensor([settings.get(name, 1), value])
    rows = rows.long() if name in ("top_k", "position") else rows
    settings[name] = rows
    models = torch.randn(2, 2, 9)
    nk.mixture_sample(*models, **settings)
    with pytest.raises(ValueError, match=rf"mixture_sample: {name} must be .* in row 1"):
        nk.mixture_sample(*models, **settings, check=True)


def test_extrapolation_must_be_asked_for(target):
    policy, ref = torch.randn(2, 6, 30, device=target.device)
    settings = {"seed": 0, "position": 0, "mixture_coef": -1.0, "backend": target.backend}
    with pytest.raises(ValueError, match="mixture_sample: mixture_coef must be in"):
        nk.mixture_sample(policy, ref, **settings)
    got = nk.mixture_sample(policy, ref, extrapolate=True, **settings)
    contrast = nk.mixture_sample(2 * policy - ref, seed=0, position=0, backend=target.backend)
    assert torch.equal(got.tokens, contrast.tokens)


def test_an_automatic_choice_serves_every_call():
    """Without a backend named, filters go where they are served."""
    for features in ((), ("filters",)):
        assert registry.resolve("mixture_sample", "cpu", "", features) in registry.BACKENDS
