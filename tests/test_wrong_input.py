"""Wrong input ends in a ``ValueError`` that names the op and the argument, on every backend alike:
the checks come before the choice.
"""

import math
import re

import numpy
import pytest
import torch

import nlhf_kernels as nk

B, T, V, D = 2, 3, 7, 4
NAN, INF = math.nan, math.inf


def right(op: str, packed: bool = False) -> dict:
    logits, tokens = torch.zeros(B, T, V), torch.zeros(B, T, dtype=torch.int64)
    if op == "mixture_sample":
        return {
            "policy_logits": torch.zeros(B, V),
            "ref_logits": torch.zeros(B, V),
            "mixture_coef": 0.5,
            "seed": 0,
            "position": 0,
        }
    if op == "linear_mixture_sample":
        models = {f"{model}_hidden": torch.zeros(B, D) for model in ("policy", "ref")}
        models |= {f"{model}_weight": torch.zeros(V, D) for model in ("policy", "ref")}
        return models | {"mixture_coef": 0.5, "seed": 0, "position": 0}
    if op.startswith("linear_"):
        first = {"hidden": torch.zeros(B, T, D), "weight": torch.zeros(V, D)}
        refs = {"ref_hidden": torch.zeros(B, T, D), "ref_weight": torch.zeros(V, D)}
    else:
        first, refs = {"logits": logits}, {"ref_logits": logits.clone()}
    if op.endswith("token_logprobs"):
        return first | {"tokens": tokens}
    if op.endswith("token_kl"):
        return first | refs | {"tokens": tokens}
    loss = {
        **first,
        "tokens": tokens,
        "mask": torch.ones(B, T, dtype=torch.bool),
        "preference": torch.zeros(B),
        "tau": 0.1,
        "ref_logprobs": torch.zeros(B, T),
    }
    if packed:
        per_token = {k: v.flatten(0, 1) for k, v in loss.items() if k not in ("preference", "tau")}
        loss |= per_token | {"cu_seqlens": torch.tensor([0, 2, 6])}
    return loss


LOGITS = (
    torch.zeros(V),
    torch.zeros(1, B, T, V),
    torch.zeros(B, T, V, dtype=torch.int64),
    torch.zeros(B, T, V, dtype=torch.complex64),
    torch.zeros(B, T, 0),
    torch.zeros(V, T, B).transpose(0, 2),
    torch.zeros(B, T, V, device="meta"),
    [[0.0]],
    None,
)
ROW_LOGITS = tuple(x[0] if isinstance(x, torch.Tensor) and x.dim() == 3 else x for x in LOGITS)
HIDDEN = (
    torch.zeros(D),
    torch.zeros(B, 1, D),
    torch.zeros(B, D, dtype=torch.int64),
    torch.zeros(B, D, dtype=torch.float16),
    torch.zeros(B, D + 1),
    torch.zeros(B, 0),
    torch.zeros(D, B).T,
    torch.zeros(B, D, device="meta"),
    [[0.0]],
)
WEIGHT = (
    torch.zeros(V),
    torch.zeros(V, D, dtype=torch.float64),
    torch.zeros(V, D + 1),
    torch.zeros(0, D),
    torch.zeros(D, V).T,
    torch.zeros(V, D, device="meta"),
    0.5,
)
BIAS = (
    torch.zeros(V + 1),
    torch.zeros(1, V),
    torch.zeros(V).half(),
    torch.zeros(V).long(),
    torch.zeros(V, device="meta"),
    0.5,
)
TOKENS = (
    torch.zeros(B, T),
    torch.zeros(B, T, dtype=torch.int32),
    torch.zeros(B, T + 1, dtype=torch.int64),
    torch.zeros(T, B, dtype=torch.int64),
    torch.zeros(B, T, dtype=torch.int64, device="meta"),
    torch.full((B, T), V),
    torch.full((B, T), -1),
    0,
)
PER_TOKEN = (
    torch.zeros(B, T + 1),
    torch.zeros(B),
    torch.zeros(B, T, dtype=torch.int64),
    torch.zeros(B, T, device="meta"),
    0.5,
)
MASK = (
    torch.ones(B, T),
    torch.ones(B, T + 1).bool(),
    torch.ones(B, T, device="meta").bool(),
    0.5,
)
TOKEN_HIDDEN = (
    torch.zeros(D),
    torch.zeros(B, 1, T, D),
    torch.zeros(B, T, D, dtype=torch.int64),
    torch.zeros(B, T, D, dtype=torch.float16),
    torch.zeros(B, T, D + 1),
    torch.zeros(B, T, 0),
    torch.zeros(B, D, T).transpose(1, 2),
    torch.zeros(B, T, D, device="meta"),
    [[0.0]],
    None,
)
CHUNKS = {
    "logit_scale": (NAN, INF, -INF, None, "1", True),
    "memory_budget": (0, -1, 0.5, NAN, "1", True),
}
ABOVE_0 = (0, -1.0, NAN, INF, "1", torch.ones(()), True)

# op -> argument -> values that it must refuse
WRONG = {
    "mixture_sample": {
        "policy_logits": ROW_LOGITS,
        "ref_logits": (*ROW_LOGITS[:-1], torch.zeros(B, V + 1), torch.zeros(B + 1, V)),
        "mixture_coef": (-0.1, 1.1, NAN, INF, None, "0", torch.zeros(B + 1), torch.zeros(B).long(),
                         torch.zeros(B, 1), torch.zeros(B, device="meta"), True),
        "temperature": (-1.0, NAN, INF, 1e39, None, torch.zeros(B + 1), torch.zeros(B).long()),
        "top_k": (-1, 1.5, 2.0, NAN, torch.zeros(B), True),
        "top_p": (0.0, -0.5, 1.1, NAN, torch.zeros(B).long()),
        "min_p": (-0.1, 1.1, NAN),
        "seed": (0.0, 2**63, -(2**63) - 1, None, torch.zeros(B), torch.zeros(B + 1).long()),
        "position": (-1, 2**63, 0.5, torch.zeros(B)),
        "backend": ("cudnn", "EAGER"),
    },
    "token_logprobs": {
        "logits": LOGITS,
        "tokens": TOKENS,
        "mask": MASK,
        "temperature": ABOVE_0,
        "softcap": ABOVE_0,
        "backend": ("cudnn",),
    },
    "pairwise_pg_loss": {
        "logits": (*LOGITS, torch.zeros(B * T, V)),
        "tokens": TOKENS,
        "mask": (*MASK, None),
        "preference": (torch.zeros(B + 1), torch.zeros(B, 1), torch.zeros(B).long(), 0.5),
        # several of them want several anchors
        "tau": (-0.1, NAN, INF, None, torch.ones(()), (0.1,), (0.1, 0.2), ()),
        "ref_logprobs": (*PER_TOKEN, None, [], [torch.zeros(B, T)]),
        "policy_logprobs": PER_TOKEN,
        "ref_logits": (torch.zeros(B, T, V),),
        # without logits of the reference
        "kl": ("exact", "", None, "REWARD_TO_GO"),
        "baseline": (NAN, INF, None),
        "temperature": ABOVE_0,
        "softcap": ABOVE_0,
        "cu_seqlens": (torch.tensor([0, 2, 6]),),
        "backend": ("cudnn",),
    },
}  # fmt: skip
WRONG["token_kl"] = WRONG["token_logprobs"] | {
    "ref_logits": (*LOGITS, torch.zeros(B, T, V + 1), torch.zeros(B, T + 1, V)),
}
_HEAD = {"hidden": TOKEN_HIDDEN, "weight": (*WEIGHT, None), "bias": BIAS} | CHUNKS
_REF_HEAD = {
    "ref_hidden": (*TOKEN_HIDDEN, torch.zeros(B, T + 1, D)),
    "ref_weight": (*WEIGHT, torch.zeros(V + 1, D)),
    "ref_bias": BIAS,
}
_SETTINGS = {k: x for k, x in WRONG["token_logprobs"].items() if k != "logits"}
WRONG["linear_token_logprobs"] = _HEAD | _SETTINGS
WRONG["linear_token_kl"] = _HEAD | _REF_HEAD | _SETTINGS
WRONG["linear_pairwise_pg_loss"] = {
    name: values for name, values in WRONG["pairwise_pg_loss"].items() if "logits" not in name
} | _HEAD
# beside ref_logprobs, or without what they belong to
WRONG["linear_pairwise_pg_loss"] |= {
    "ref_hidden": (torch.zeros(B, T, D),),
    "ref_weight": (torch.zeros(V, D),),
    "ref_bias": (torch.zeros(V),),
}
WRONG["linear_mixture_sample"] = {
    "policy_hidden": (*HIDDEN, None),
    "policy_weight": (*WEIGHT, None),
    "ref_hidden": (*HIDDEN, None, torch.zeros(B + 1, D)),
    "ref_weight": (*WEIGHT, torch.zeros(V + 1, D)),
    "policy_bias": BIAS,
    "ref_bias": BIAS,
    "softcap": ABOVE_0,
} | {
    name: WRONG["mixture_sample"][name]
    for name in (
        "mixture_coef",
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "seed",
        "position",
        "backend",
    )
}
PACKED = {
    "cu_seqlens": (torch.tensor([0, 2, 5]), torch.tensor([1, 2, 6]), torch.tensor([0, 7, 6]),
                   torch.tensor([0, -1, 6]), torch.tensor([0.0, 2.0, 6.0]), torch.tensor([0, 6]),
                   torch.tensor([], dtype=torch.int64), torch.tensor([[0, 2, 6]]), [0, 2, 6], None),
    "logits": (torch.zeros(B, T, V),),
    "ref_logprobs": (torch.zeros(B, T),),
}  # fmt: skip


def describe(x) -> str:
    if isinstance(x, torch.Tensor):
        return f"{str(x.dtype)[6:]}{tuple(x.shape)}{'' if x.device.type == 'cpu' else '-meta'}"
    return repr(x)


def entries():
    for op, arguments in WRONG.items():
        for name, values in arguments.items():
            for i, value in enumerate(values):
                yield pytest.param(op, False, name, value, id=f"{op}-{name}-{i}-{describe(value)}")
    for name, values in PACKED.items():
        for i, value in enumerate(values):
            yield pytest.param(
                "pairwise_pg_loss", True, name, value, id=f"packed-{name}-{i}-{describe(value)}"
            )


@pytest.mark.parametrize(("name_of_op", "packed", "name", "value"), list(entries()))
def test_wrong_input_is_named(name_of_op, packed, name, value):
    op = name_of_op
    given = right(op, packed)
    function = getattr(nk, op)
    function(**given)
    with pytest.raises(ValueError, match=rf"{op}: ") as error:
        function(**given | {name: value})
    said = str(error.value)
    others = {"ref_logprobs": "tau|ref_logprobs", "ref_logits": "ref_logits|mixture_coef"}
    others |= {"cu_seqlens": "cu_seqlens|preference", "tokens": "token"}
    others |= {"logits": "logits|tokens|preference"}
    # what does not go together is named by either
    others |= {"hidden": "hidden|tokens|weight", "weight": "weight", "tau": "tau|ref_logprobs"}
    others |= {"ref_weight": "ref_weight|ref_hidden", "ref_bias": "ref_bias"}
    assert re.search(others.get(name, name), said), said
    assert "\n" not in said


@pytest.mark.parametrize("name", ["pairwise_pg_loss", "linear_pairwise_pg_loss"])
def test_what_anchors_and_estimators_need(name):
    """What is right alone and wrong together."""
    given, function = right(name), getattr(nk, name)
    per_token = given.pop("ref_logprobs")
    refs = {"ref_logits": torch.zeros(B, T, V)}
    if name.startswith("linear_"):
        refs = {"ref_hidden": torch.zeros(B, T, D), "ref_weight": torch.zeros(V, D)}
    ref_name = next(iter(refs))
    two = {"ref_logprobs": (per_token, per_token), "tau": (0.1, 0.2)}
    exact = refs | {"kl": "exact"}
    for good in (refs, two, exact, {"ref_logprobs": [per_token], "tau": [0.1]}, {"tau": 0}):
        function(**given | good)
    wrong = [
        ({}, "tau must be 0 without ref_logprobs"),
        ({"kl": "exact"}, f"needs {ref_name}"),
        ({"kl": "exact", "ref_logprobs": per_token}, f"needs {ref_name}"),
        ({"kl": "exact"} | two, f"needs {ref_name}"),
        (exact | {"policy_logprobs": per_token}, "no use for policy_logprobs"),
        (exact | {"ref_logprobs": per_token}, f"give ref_logprobs or {ref_name}"),
        (exact | {"tau": (0.1, 0.2)}, "tau must be"),
        (two | {"tau": 0.1}, "tau must be a sequence of 2 numbers"),
        (two | {"tau": (0.1,)}, "tau must be a sequence of 2 numbers"),
        (two | {"tau": (0.1, -0.2)}, r"tau\[1\] must be"),
        (two | {"tau": (NAN, 0.2)}, r"tau\[0\] must be"),
        (two | {"ref_logprobs": (per_token, per_token[:, 1:])}, r"ref_logprobs\[1\] must be"),
        ({"ref_logprobs": (), "tau": ()}, "ref_logprobs must hold an anchor"),
    ]
    for values, said in wrong:
        with pytest.raises(ValueError, match=f"^{name}: .*{said}"):
            function(**given | values)


def test_heads_of_a_reference_are_whole():
    given = right("linear_token_kl")
    nk.linear_token_kl(**given | {"ref_weight": None})
    with pytest.raises(ValueError, match="linear_token_kl: ref_bias must be left out"):
        nk.linear_token_kl(**given | {"ref_weight": None, "ref_bias": torch.zeros(V)})
    # the policy's head is not as wide as these
    wide = torch.zeros(B, T, D + 1)
    with pytest.raises(ValueError, match="linear_token_kl: ref_weight must be"):
        nk.linear_token_kl(**given | {"ref_weight": None, "ref_hidden": wide})


def test_what_is_under_the_mask_is_not_wrong():
    given = right("pairwise_pg_loss")
    given["mask"][0, 1] = False
    given["tokens"][0, 1] = -1
    assert nk.pairwise_pg_loss(**given).loss.isfinite()
    given["tokens"][0, 2] = V
    with pytest.raises(ValueError, match=rf"token {V} at \(0, 2\) is outside \[0, {V}\)"):
        nk.pairwise_pg_loss(**given)


def test_a_reference_is_all_there_or_not_at_all():
    """A head, or a bias, of a model that is not there."""
    given = right("linear_mixture_sample")
    alone = {"ref_hidden": None, "mixture_coef": 0.0}
    with pytest.raises(ValueError, match="linear_mixture_sample: ref_weight must be left out"):
        nk.linear_mixture_sample(**given | alone)
    nk.linear_mixture_sample(**given | alone | {"ref_weight": None})
    with pytest.raises(ValueError, match="linear_mixture_sample: ref_bias must be left out"):
        nk.linear_mixture_sample(**given | {"ref_weight": None, "ref_bias": torch.zeros(V)})
    with pytest.raises(ValueError, match="linear_mixture_sample: mixture_coef must be 0"):
        nk.linear_mixture_sample(**given | {"ref_hidden": None, "ref_weight": None})


@pytest.mark.parametrize("name", ["token_logprobs", "token_kl", "pairwise_pg_loss"])
def test_rows_that_share_memory_cannot_hold_gradients(name, target):
    given = {k: v.to(target.device) if torch.is_tensor(v) else v for k, v in right(name).items()}
    given["logits"] = torch.zeros(B, 1, V, device=target.device).expand(B, T, V)
    function = getattr(nk, name)
    function(**given, backend=target.backend)
    with pytest.raises(ValueError, match=f"{name}: inplace_backward needs"):
        function(**given, backend=target.backend, inplace_backward=True)


NESTED = torch.nested.nested_tensor([torch.zeros(T, V)] * B, layout=torch.jagged)
HUGE = 10**5000
PAIR = ("logprobs", "other_logprobs", "anchor_logprobs", "other_anchor_logprobs")


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("token_logprobs", {"logits": torch.zeros(B, T, V).to_sparse()}),
        ("token_logprobs", {"logits": NESTED}),
        ("token_logprobs", {"tokens": torch.zeros(B, T).long().to_sparse()}),
        ("token_logprobs", {"temperature": HUGE}),
        ("token_logprobs", {"backend": torch.zeros(2)}),
        ("token_kl", {"inplace_backward": torch.zeros(2)}),
        ("linear_token_kl", {"memory_budget": 100.5}),
        ("linear_token_kl", {"group": 0.5}),
        ("mixture_sample", {"seed": HUGE}),
        ("mixture_sample", {"check": torch.zeros(2)}),
        ("mixture_sample", {"extrapolate": "no"}),
        ("mixture_sample", {"group": 0.5}),
        ("mixture_sample", {"ref_logits": None, "mixture_coef": numpy.zeros(2)}),
        ("linear_mixture_sample", {"group": 0.5, "backend": "eager"}),
        ("pairwise_pg_loss", {"kl": torch.zeros(2)}),
        ("pairwise_pg_loss", {"tau": torch.zeros(2, 3)}),
        ("pair_loss", {"method": torch.zeros(2)}),
        ("pair_loss", {"weights": torch.zeros(2, 3), "method": "mnpo", "tau": None, "eta": 1.0}),
        ("pair_loss", {"eta": torch.zeros(2, 3)}),
        ("pair_loss", {"anchor_logprobs": torch.zeros(B).to_sparse()}),
        ("ema_update_", {"ema": None}),
        ("ema_update_", {"params": numpy.array(0.5)}),
        ("ema_update_", {"ema": [torch.zeros(3).to_sparse()]}),
        ("ema_update_", {"seed": 0.5}),
        ("skinny_linear", {"input": None}),
        ("skinny_linear", {"weight": 0.5}),
        ("fold_in", {"seed": "0"}),
        ("fold_in", {"seed": 2**63}),
        ("fold_in", {"k": 0.5}),
        ("fold_in", {"k": torch.zeros(3)}),
        ("fold_in", {"k": torch.zeros(4, dtype=torch.int64)}),
    ],
    ids=lambda x: x if isinstance(x, str) else next(iter(x)),
)
def test_what_torch_or_python_would_have_refused_is_named(name, wrong):
    """By errors of other kinds, or in the words of another library."""
    others = {
        "fold_in": {"seed": torch.zeros(3, dtype=torch.int64), "k": 1},
        "ema_update_": {"ema": [torch.zeros(3)], "params": [torch.zeros(3)], "decay": 0.5},
        "skinny_linear": {"input": torch.zeros(B, D), "weight": torch.zeros(V, D)},
        "pair_loss": dict.fromkeys(("preference", *PAIR), torch.zeros(B))
        | {"method": "online_ipo", "tau": 0.1},
    }
    given = others.get(name) or right(name)
    getattr(nk, name)(**given)
    with pytest.raises(ValueError, match=rf"^{name}: ") as error:
        getattr(nk, name)(**given | wrong)
    said = str(error.value)
    assert re.search("|".join(wrong), said), said
    assert "\n" not in said
    assert len(said) < 300


def test_gradients_are_not_written_over_rows_that_overlap():
    given = right("token_logprobs")
    # each row starts where the second number of the one before it stands
    given["logits"] = torch.zeros(20).as_strided((B, T, V), (3, 1, 1))
    nk.token_logprobs(**given)
    with pytest.raises(
        ValueError, match="token_logprobs: inplace_backward needs logits whose rows"
    ):
        nk.token_logprobs(**given, inplace_backward=True)


def test_overlapping_rows_of_a_narrower_reference_are_read_in_their_order(target):
    """Beside float64 it is widened, into memory of its own."""
    given = right("pairwise_pg_loss") | {"ref_logprobs": None}
    rows = torch.randn(20, dtype=torch.float16).to(target.device)
    refs = rows.as_strided((B, T, V), (1, 1, 1))
    given = {k: x.to(target.device) if torch.is_tensor(x) else x for k, x in given.items()}
    given |= {"logits": given["logits"].double(), "backend": target.backend}
    found, want = (
        nk.pairwise_pg_loss(**given | {"ref_logits": x}).ref_logprobs
        for x in (refs, refs.double().contiguous())
    )
    torch.testing.assert_close(found, want, rtol=0, atol=1e-12)


def test_a_view_of_a_conjugate_is_read_as_what_it_says(target):
    """In memory stands the opposite of its numbers: ``.imag`` makes such views."""
    logits = torch.randn(B, V, device=target.device)
    view = torch._neg_view(-logits)
    assert view.is_neg()
    for refs in (None, view):
        settings = {"seed": 0, "position": 0, "backend": target.backend}
        settings |= {} if refs is None else {"mixture_coef": 0.5}
        plain = logits if refs is not None else None
        found = nk.mixture_sample(view, refs, **settings)
        for x, y in zip(found, nk.mixture_sample(logits, plain, **settings), strict=True):
            assert torch.equal(x, y)


def test_an_exact_kl_does_not_see_what_the_policy_never_says(target):
    """Its probability is 0 by underflow, the reference's by a ban."""
    logits = torch.tensor([[0.0, -2000.0, 1.0]], device=target.device)
    refs = torch.tensor([[0.0, -math.inf, 1.0]], device=target.device)
    tokens = torch.zeros(1, dtype=torch.int64, device=target.device)
    kl = nk.token_kl(logits, refs, tokens, backend=target.backend).kl
    assert kl.abs().max() < 1e-6


@pytest.mark.parametrize("backend", ["eager", "cpp"])
def test_cold_scores_do_not_overflow(backend):
    logits, tokens = torch.tensor([[-3e38, -3e38]]), torch.zeros(1, dtype=torch.int64)
    found = nk.token_logprobs(logits, tokens, temperature=0.01, backend=backend)
    assert found.logprobs.item() == pytest.approx(-math.log(2))


def test_positional_settings_are_refused():
    """Everything after the tensors is keyword-only: a temperature must not land in a softcap."""
    given = right("token_logprobs")
    with pytest.raises(TypeError):
        nk.token_logprobs(given["logits"], given["tokens"], 1.0)
