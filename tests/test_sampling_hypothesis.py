"""``mixture_sample`` on shapes, strides, dtypes and parameters that nobody chose."""

import torch
from hypothesis import HealthCheck, assume, given, seed, settings
from hypothesis import strategies as st

from nlhf_kernels.testing.case import lay_out
from nlhf_kernels.testing.check import check_by
from nlhf_kernels.testing.compare import Answers
from tests.sampling import KINDS, models, settle

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# what an interpreted backend has time for
FEW = 12
MANY = 120

vocabularies = st.one_of(
    st.sampled_from([1, 2, 3, 4, 5, 1023, 1024, 1025, 2047, 2048, 2049, 4099]), st.integers(1, 3000)
)
coefficients = st.one_of(st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.floats(0, 1))
temperatures = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0.1, 3.0))
top_ks = st.one_of(st.just(0), st.integers(1, 60), st.integers(1, 5000), st.just(2**40))
top_ps = st.one_of(st.just(1.0), st.floats(0.01, 0.99))
min_ps = st.one_of(st.just(0.0), st.floats(1e-4, 1.0))
seeds = st.integers(-(2**63), 2**63 - 1)
positions = st.integers(0, 2**40)


@st.composite
def calls(draw) -> tuple[tuple, dict]:
    """Arguments of the op: each parameter a scalar, or one for each row."""
    B, V = draw(st.integers(0, 5)), draw(vocabularies)
    kinds = tuple(draw(st.sampled_from(KINDS)) for _ in range(B))
    policy, ref = models(kinds, V, draw(st.integers(0, 99))) if B else torch.zeros(2, 0, V)
    tensors = []
    for x in (policy, ref):
        x = x.to(draw(st.sampled_from(DTYPES)))
        # an empty batch has no row to share
        layouts = ["dense", "strided", *(["shared"] if B else [])]
        tensors.append(lay_out(x, draw(st.sampled_from(layouts)), "cpu"))
    if not draw(st.booleans()):
        tensors[1] = None
    strategies = {
        "mixture_coef": (coefficients, torch.float32),
        "temperature": (temperatures, torch.float32),
        "top_k": (top_ks, torch.int64),
        "top_p": (top_ps, torch.float32),
        "min_p": (min_ps, torch.float32),
        "seed": (seeds, torch.int64),
        "position": (positions, torch.int64),
    }
    if tensors[1] is None:
        del strategies["mixture_coef"]
    kwargs = {}
    for name, (strategy, dtype) in strategies.items():
        if draw(st.booleans()):
            kwargs[name] = draw(strategy)
        else:
            kwargs[name] = torch.tensor([draw(strategy) for _ in range(B)], dtype=dtype)
    return tuple(tensors), kwargs


def test_any_call_is_right(target):
    @seed(2024)
    @settings(
        max_examples=FEW if target.interpreted else MANY,
        database=None,
        deadline=None,
        # rows that float32 cannot tell are as frequent as they are
        suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
    )
    @given(calls())
    def right(call):
        args, kwargs = call
        assume(bool(settle(*args, kwargs)[0].all()))
        device = target.device
        args = tuple(x if x is None else x.to(device) for x in args)
        kwargs = {k: x.to(device) if isinstance(x, torch.Tensor) else x for k, x in kwargs.items()}
        check_by(Answers((args, kwargs)), "mixture_sample", target.backend)

    right()
