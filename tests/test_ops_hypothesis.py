"""Any call of a public op is answered rightly, or refused by a ``ValueError`` that names the thing.

``NLHF_FUZZ`` examples for each op and backend, and ``NLHF_FUZZ_SEED``, are for longer runs by hand.
"""

import inspect
import os
import re
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor

import nlhf_kernels as nk
from nlhf_kernels import eager, registry
from nlhf_kernels.testing.compare import TOLERANCE, poisoned_memory
from nlhf_kernels.testing.draw import FIELDS, Draw, linear_draw
from tests import wild_tensors as wild

pytestmark = pytest.mark.usefixtures("one_thread")

EXAMPLES = int(os.environ.get("NLHF_FUZZ", "50"))
SEED = int(os.environ.get("NLHF_FUZZ_SEED", "2024"))
ALL = (*registry.OPS, *registry.UPDATES, *registry.LAYERS)
SIZES = st.sampled_from([0, 1, 2, 3])
VOCABULARIES = st.sampled_from([1, 2, 5, 5, 17, 1025])
KL = ("reward_to_go", "sequence", "token", "exact")
LEAVES = ("logits", "hidden", "weight", "bias", "logprobs", "other_logprobs")


def maybe(draw, **strategies) -> dict:
    """Some of these arguments; the others are left at their defaults."""
    return {name: draw(x) for name, x in strategies.items() if draw(st.booleans())}


def scaling(draw) -> dict:
    above_0 = st.sampled_from([1.0, 0.7, 3, 1e-3, 1e3, 1e-30, 1e30])
    return maybe(draw, temperature=above_0, softcap=st.sampled_from([None, 30.0, 1e-3, 1e30]))


@st.composite
def per_token(draw, batch: tuple, V: int) -> dict:
    tokens = torch.randint(
        V, batch, generator=torch.Generator().manual_seed(draw(st.integers(0, 9)))
    )
    mask = torch.rand(batch, generator=torch.Generator().manual_seed(draw(st.integers(0, 9)))) < 0.6
    dtype = draw(st.sampled_from([torch.bool, torch.int64, torch.uint8]))
    layouts = st.sampled_from(["dense", "offset", "sliced", "last", "flipped"])
    if draw(st.booleans()):
        # ids under the mask are never read
        tokens[~mask] = -(2**40)
        dtype, whole = torch.bool, mask
    else:
        whole = torch.ones_like(mask) if draw(st.booleans()) else mask
    tokens = wild.laid_out(tokens, draw(layouts))
    return {"tokens": tokens, "mask": wild.laid_out(whole.to(dtype), draw(layouts))}


@st.composite
def samplers(draw, op: str) -> dict:
    B, V, D = draw(SIZES), draw(VOCABULARIES), draw(st.sampled_from([1, 4, 7]))
    has_ref = draw(st.booleans())
    made = {}
    for model in ("policy", "ref") if has_ref else ("policy",):
        if op == "mixture_sample":
            made[f"{model}_logits"] = draw(wild.floats((B, V)))
            continue
        made[f"{model}_hidden"] = draw(wild.floats((B, D)))
        dtypes = (made[f"{model}_hidden"].dtype,)
        made[f"{model}_weight"] = draw(wild.floats((V, D), dtypes))
        made |= maybe(draw, **{f"{model}_bias": wild.floats((V,), dtypes)})

    def rows(number, dtype):
        several = st.lists(number, min_size=B, max_size=B).map(
            lambda x: torch.tensor(x, dtype=dtype)
        )
        return st.one_of(number, several, number.map(lambda x: torch.tensor(x, dtype=dtype)))

    probability = st.sampled_from([0.0, 0.25, 1.0, 1e-30, 0.999999])
    made["seed"] = draw(rows(st.integers(-(2**63), 2**63 - 1), torch.int64))
    made["position"] = draw(rows(st.integers(0, 2**63 - 1), torch.int64))
    if has_ref:
        made["mixture_coef"] = draw(rows(probability, torch.float32))
    heat = st.sampled_from([0.0, 1.0, 0.5, 1e-30, 1e-45, 1e30])
    return made | maybe(
        draw,
        temperature=rows(heat, torch.float64),
        top_k=rows(st.sampled_from([0, 1, 2, 2**63 - 1]), torch.int64),
        top_p=rows(st.sampled_from([1.0, 0.5, 1e-6]), torch.float32),
        min_p=rows(probability, torch.float32),
        check=st.booleans(),
        extrapolate=st.booleans(),
        **({"softcap": st.sampled_from([None, 3.0])} if op.startswith("linear") else {}),
    )


@st.composite
def losses(draw, op: str) -> dict:
    packed = draw(st.booleans())
    batch = (draw(SIZES),) if packed else (draw(SIZES), draw(SIZES))
    V, D = draw(VOCABULARIES), draw(st.sampled_from([1, 4, 7]))
    linear, made = op.startswith("linear_"), {}

    def head(prefix: str, dtypes: tuple = wild.FLOATS) -> dict:
        if not linear:
            return {f"{prefix}logits": draw(wild.floats((*batch, V), dtypes))}
        hidden = draw(wild.floats((*batch, D), dtypes))
        of_model = {"hidden": hidden, "weight": draw(wild.floats((V, D), (hidden.dtype,)))}
        of_model |= maybe(draw, bias=wild.floats((V,), (hidden.dtype,)))
        return {prefix + name: x for name, x in of_model.items()}

    made |= head("") | draw(per_token(batch, V)) | scaling(draw)
    if linear:
        made |= maybe(
            draw, logit_scale=st.sampled_from([1.0, -0.5, 0, 1e30]), memory_budget=st.just(1)
        )
    else:
        made |= maybe(draw, inplace_backward=st.booleans())
    if op.endswith("token_kl"):
        made |= head("ref_")
    if not op.endswith("pairwise_pg_loss"):
        if draw(st.booleans()) and (made["tokens"] >= 0).all():
            del made["mask"]
        return made
    B = batch[0]
    if packed:
        B = 2
        middle = draw(st.integers(0, batch[0]))
        made["cu_seqlens"] = torch.tensor([0, middle, batch[0]])
    made["preference"] = draw(wild.floats((B,)))
    made |= maybe(draw, kl=st.sampled_from(KL), baseline=st.sampled_from([0.5, 0.0, -3e38]))
    made["tau"] = draw(st.sampled_from([0.0, 0.1, 1e30]))
    exact = made.get("kl") == "exact"
    way = "model" if exact else draw(st.sampled_from(["none", "one", "two", "model"]))
    if way == "model":
        made |= head("ref_")
    elif way == "none":
        made["tau"] = 0
    elif way == "one":
        made["ref_logprobs"] = draw(wild.floats(batch))
    else:
        made |= {"ref_logprobs": [draw(wild.floats(batch)) for _ in range(2)], "tau": [0.1, 0.0]}
    return made if exact else made | maybe(draw, policy_logprobs=wild.floats(batch))


@st.composite
def pairs(draw, op: str) -> dict:
    B, method = draw(SIZES), draw(st.sampled_from(list(nk.PAIR_METHODS)))
    entry = nk.PAIR_METHODS[method]
    J = len(entry.anchors) or draw(st.integers(1, 3))
    anchored = (B,) if J == 1 and draw(st.booleans()) else (J, B)
    made = {name: draw(wild.floats((B,))) for name in ("logprobs", "other_logprobs")}
    for name in ("anchor_logprobs", "other_anchor_logprobs"):
        made[name] = draw(wild.floats(anchored))
    shares = st.sampled_from([0.0, 1.0, 0.3, 5e-324])
    names = ["preference", *(["other_preference"] * entry.two_preferences)]
    for name in names:
        made[name] = torch.tensor([draw(shares) for _ in range(B)], dtype=torch.float64)
    made |= {name: draw(st.sampled_from([0.1, 0.5, 1, 1e-30])) for name in entry.parameters}
    if len(entry.parameters) == 2:
        made["eta"] = max(made["tau"], made["eta"])
    if not entry.anchors:
        made |= maybe(
            draw, weights=st.lists(st.sampled_from([0, 0.5, -3e38]), min_size=J, max_size=J)
        )
    return made | {"method": method}


@st.composite
def averages(draw, op: str) -> dict:
    shapes = draw(st.lists(st.sampled_from([(), (0,), (3,), (2, 5), (4099,)]), max_size=3))
    layouts = st.sampled_from(["dense", "offset", "dense", "sliced", "expanded", "negated"])

    def one(shape):
        return wild.laid_out(draw(wild.floats(shape)).contiguous(), draw(layouts))

    ema, params = ([one(shape) for shape in shapes] for _ in range(2))
    decay = draw(st.sampled_from([0, 1.0, 0.5, 0.999, torch.tensor(0.9)]))
    seeds = st.one_of(st.integers(-(2**63), 2**63 - 1), st.just(torch.tensor(7)))
    return {"ema": ema, "params": params, "decay": decay} | maybe(draw, seed=seeds)


@st.composite
def layers(draw, op: str) -> dict:
    batch, N, D = draw(st.sampled_from([(), (1,), (2, 3), (0,)])), draw(SIZES), draw(SIZES)
    narrow = (torch.float32,)
    made = {"input": draw(wild.floats((*batch, D), narrow))}
    made["weight"] = draw(wild.floats((N, D), narrow))
    return made | maybe(draw, bias=wild.floats((N,), narrow))


STRATEGIES = {"pair_loss": pairs, "ema_update_": averages, "skinny_linear": layers}
STRATEGIES |= {op: samplers if op.endswith("mixture_sample") else losses for op in registry.OPS}


@st.composite
def calls(draw, op: str) -> dict:
    """Arguments that fit each other; then, of half the calls, one or two that are anything."""
    made = draw(STRATEGIES[op](op))
    for name in LEAVES:
        if isinstance(made.get(name), Tensor) and draw(st.booleans()):
            made[name] = made[name].detach().requires_grad_()
    names = [name for name in inspect.signature(getattr(nk, op)).parameters if name != "backend"]
    shapes = tuple({tuple(x.shape) for x in made.values() if isinstance(x, Tensor)})
    shapes += ((), (0,), (1,), (3,), (2, 3))
    for _ in range(draw(st.sampled_from([0, 0, 1, 2]))):
        name = draw(st.sampled_from(names))
        of_numbers = not isinstance(made.get(name), Tensor) and draw(st.booleans())
        made[name] = draw(wild.numbers() if of_numbers else wild.anything(shapes))
    return made


def said_well(op: str, error: ValueError) -> None:
    text, names = str(error), inspect.signature(getattr(nk, op)).parameters
    assert text.startswith(f"{op}: "), text
    # a row is what check=True says is wrong
    words = re.findall(r"\w+", text.removeprefix(op)) + ["row"] * (": row " in text)
    assert any(name in words for name in (*names, "token", "row", "anchors")), text
    assert "\n" not in text
    assert len(text) < 1000, text


def require_answer(op: str, made: dict, backend: str) -> None:
    try:
        getattr(nk, op)(**{name: copied(x) for name, x in made.items()}, backend=backend)
    except ValueError as error:
        said_well(op, error)
    else:
        require_right(op, made, backend)


# ---- right answers


def close(
    name: str, got: Tensor, same: Tensor, exact: Tensor, lost: float = 0.0, rounding: float = 0.0
) -> None:
    """Within the tolerance of ``exact``, in float64, or no worse than eager in its own dtype.

    ``lost``: relatively, by the rounding of numbers that are larger than the result; ``rounding``:
    that of the scores whose differences it is.
    """
    assert got.shape == exact.shape, f"{name} is {tuple(got.shape)}, must be {tuple(exact.shape)}"
    assert got.dtype == same.dtype, f"{name} is {got.dtype}, must be {same.dtype}"
    rtol, atol = TOLERANCE[got.dtype]
    x, y, z = (t.detach().double() for t in (got, same, exact))
    equal = (x == y) | (x.isnan() & y.isnan()) | (x == z) | (x.isnan() & z.isnan())
    # what eager in this dtype cannot say is anything's guess
    unknown = z.isfinite() & ~y.isfinite()
    finite = y.isfinite() & z.isfinite()
    error = (y - z).abs()[finite]
    slack = rounding + (16 * float(error.max()) if error.numel() else 0.0)
    if lost and finite.any():
        slack += 16 * lost * float(z[finite].abs().max() + 1)
    near = (x - z).abs() <= atol + rtol * z.abs() + slack
    right = equal | near | unknown
    if name.startswith("gradient"):
        # a factor of 0 makes NaN of an infinite one, and nothing of it, or the infinity, where it
        # is left out
        right |= ((x == 0) | x.isinf()) & z.isnan()
    # a score in powers of 2 is larger than one in powers of e: near the largest numbers, infinite
    largest = torch.finfo(got.dtype).max
    # so do the errors of what is multiplied by more than the dtype holds
    right |= x.isinf() & ((z.abs() >= largest / 1024) | (slack >= largest))
    assert right.all(), (
        f"{name}: {x[~right][:3]}, in this dtype {y[~right][:3]}, is {z[~right][:3]}"
    )


def answers(op: str, made: dict, function) -> tuple[list[Tensor], list[Tensor]]:
    """(outputs, gradients) of copies: what is in place must not be seen by the next."""
    made = {name: copied(x) for name, x in made.items()}
    leaves = [made[name] for name in LEAVES if getattr(made.get(name), "requires_grad", False)]
    found = function(**made)
    if op == "ema_update_":
        return list(made["ema"]), []
    found = [found] if isinstance(found, Tensor) else list(found)
    live = [x for x in found if x.requires_grad]
    weights = [torch.linspace(0.5, 1.5, x.numel(), dtype=x.dtype).view(x.shape) for x in live]
    with warnings.catch_warnings():
        grads = torch.autograd.grad(live, leaves, weights, allow_unused=True) if live else []
    grads = [torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves, strict=False)]
    return [x.detach() for x in found], grads


def copied(x):
    """In memory of its own with the same strides; what shares memory still does."""
    if isinstance(x, list | tuple):
        return [copied(one) for one in x]
    plain = type(x) is Tensor and x.is_cpu and x.layout == torch.strided and not x.is_nested
    if not plain or x.is_quantized:
        return x
    if x.is_neg():
        opposite = copied(torch._neg_view(x.detach()))
        return torch._neg_view(opposite).requires_grad_(x.requires_grad)
    whole = x.detach().untyped_storage().clone()
    empty = torch.empty(0, dtype=x.dtype).set_(whole, x.storage_offset(), x.shape, x.stride())
    return empty.requires_grad_(x.requires_grad)


def wide(x):
    if isinstance(x, list):
        return [wide(one) for one in x]
    if isinstance(x, Tensor) and x.is_floating_point():
        return x.detach().to(torch.float64, copy=True).requires_grad_(x.requires_grad)
    return x


def require_right(op: str, made: dict, backend: str) -> None:
    def asked(**arguments):
        with poisoned_memory():
            return getattr(nk, op)(**arguments, backend=backend)

    if op.endswith("mixture_sample"):
        require_draw(op, made, asked(**made))
        return
    outputs, grads = answers(op, made, asked)
    plain = {name: x for name, x in made.items() if name not in ("inplace_backward", "group")}
    # an element in memory of an average has its own random word
    others = (
        (plain, plain) if op == "ema_update_" else (plain, {k: wide(x) for k, x in plain.items()})
    )
    function = getattr(eager, op, None) or torch.nn.functional.linear
    (same, same_grads), (exact, exact_grads) = (answers(op, x, function) for x in others)
    for i, triple in enumerate(zip(outputs, same, exact, strict=True)):
        eps = torch.finfo(triple[0].dtype).eps
        close(f"output {i}", *triple, rounding=2 * eps * largest_score(plain))
    lost = lost_digits(plain, outputs[0]) if grads else 0.0
    for i, (x, y, z) in enumerate(zip(grads, same_grads, exact_grads, strict=True)):
        if lost < 1e-5:
            close(f"gradient {i}", x, y, z, lost * largest_factor(plain))


def largest_score(made: dict) -> float:
    """Of both models, over the temperature; 0 without logits."""
    scores = 0.0
    for prefix in ("", "ref_"):
        logits = made.get(f"{prefix}logits")
        if f"{prefix}hidden" in made:
            hidden, weight, bias = (
                made.get(prefix + name) for name in ("hidden", "weight", "bias")
            )
            weight, bias = (made["weight"], made.get("bias")) if weight is None else (weight, bias)
            scale = made.get("logit_scale", 1.0)
            logits = eager.logits.linear_logits(
                hidden.detach(), weight.detach(), bias, None, torch.float64, scale
            )
        if logits is not None and logits.numel():
            capped = eager.logits.capped(logits.detach().double(), made.get("softcap"))
            scores = max(scores, float(capped.nan_to_num(0, 0, 0).abs().max()))
    return scores / made.get("temperature", 1.0)


def lost_digits(made: dict, output: Tensor) -> float:
    """How much a probability errs, relatively, that is made with the log-sum-exp of ``output``'s
    dtype that the forward has saved.
    """
    heat = made.get("temperature", 1.0)
    return largest_score(made) / min(heat, 1) * torch.finfo(output.dtype).eps


def largest_factor(made: dict) -> float:
    """By what a loss multiplies a probability, at most; 1 or more."""
    refs, taus = (_sizes(made.get(name)) for name in ("ref_logprobs", "tau"))
    refs += _sizes(made.get("policy_logprobs"))
    tokens = made["tokens"].shape[-1] if "tokens" in made else 1
    ratio = max(taus, default=0.0) * sum(refs) * tokens
    return max(1.0, *_sizes(made.get("preference")), *_sizes(made.get("baseline")), ratio)


def _sizes(given) -> list[float]:
    """The largest number of each."""
    several = given if isinstance(given, list | tuple) else [given]
    wide = [torch.as_tensor(x).detach().double() for x in several if x is not None]
    return [float(x.nan_to_num(0, 0, 0).abs().max()) for x in wide if x.numel()]


def certain(draw: Draw) -> Tensor:
    """Rows whose products differ by too little to change what is kept, or any digit that counts.

    The last digit of one is all that there is to a cold or a huge one.
    """
    eps = torch.finfo(draw.dtype).eps
    known = draw.tie < 1e-3
    for size in draw.sums:
        known &= eps * size / draw.divisor[:, 0] < 1e-4
    out = draw.kept == -torch.inf
    lowest = draw.whole.masked_fill(out, torch.inf).amin(1)
    dropped = draw.whole.masked_fill(~out, -torch.inf).amax(1)
    return known & ~(lowest - dropped <= draw.tie)


def require_draw(op: str, made: dict, got: nk.MixtureSample) -> None:
    given = {k: x.detach() if isinstance(x, Tensor) else x for k, x in made.items() if k != "check"}
    given = {k: x for k, x in given.items() if x is not None and k != "group"}
    same = getattr(eager, op)(**given)
    assert torch.equal(got.tokens < 0, same.tokens < 0), "rows that are bad differ"
    if isinstance(given["seed"], Tensor):
        given["seed"] = given["seed"].expand(len(got.tokens))
    if op == "mixture_sample":
        models = (given.pop("policy_logits"), given.pop("ref_logits", None))
        draw = Draw(*models, **given)
    else:
        draw = linear_draw(**given)
    draw.bad |= got.tokens < 0
    known = certain(draw) if op.startswith("linear_") else draw.tie < torch.inf
    draw.bad |= ~known
    draw.require_winners(got.tokens)
    draw.bad = got.tokens < 0
    exact = draw.logprobs(got.tokens)
    rows = (got.tokens == same.tokens) & known
    for name in FIELDS:
        triple = [getattr(got, name), getattr(same, name), exact[name].to(torch.float64)]
        lost = float(draw.tie[rows].max()) if rows.any() else 0.0
        close(name, *(x[rows] if len(x) else x for x in triple), lost)


@pytest.mark.parametrize("backend", registry.ORDER["cpu"])
@pytest.mark.parametrize("name", ALL)
def test_any_call_is_right_or_refused(name, backend):
    @seed(SEED)
    @settings(
        max_examples=EXAMPLES,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(calls(name))
    def answered(made):
        require_answer(name, made, backend)

    answered()


@seed(SEED)
@settings(max_examples=4 * EXAMPLES, database=None, deadline=None)
@given(*[st.one_of(wild.numbers(), wild.anything(((), (0,), (1,), (3,), (2, 3))))] * 2)
def test_any_fold_is_right_or_refused(key, number):
    try:
        folded = nk.fold_in(key, number)
    except ValueError as error:
        said_well("fold_in", error)
        return
    if isinstance(key, int) and isinstance(number, int):
        assert -(2**63) <= folded < 2**63
    else:
        assert folded.dtype == torch.int64
