"""The path that was asked for is the one that ran: by the counters, and by who was called."""

import threading
import types

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

import nlhf_kernels as nk
from nlhf import losses, rollout
from nlhf_kernels import registry
from nlhf_kernels.ops.linear_mixture_sample import FUSED_ROWS
from tests import tiny
from tests.test_seams import ALL, given

pytestmark = pytest.mark.usefixtures("one_thread")

# what one call with its backward is made of, beside itself
_LOSS = {"pairwise_pg_coef": 1, "token_logprobs": 1, "token_logprobs_bwd": 1}
PARTS = {
    "token_logprobs": {"token_logprobs_bwd": 1},
    "token_kl": {"token_kl_bwd": 1},
    # a linear op makes its logits again in the backward, and has their kernels for each chunk
    "linear_token_logprobs": {
        "linear_token_logprobs_bwd": 1, "token_logprobs": 1, "token_logprobs_bwd": 1,
    },
    "linear_token_kl": {"linear_token_kl_bwd": 1, "token_kl": 1, "token_kl_bwd": 1},
    "pairwise_pg_loss": _LOSS,
    # coefficients of the chunk and, for the loss, of all tokens
    "linear_pairwise_pg_loss": _LOSS | {"pairwise_pg_coef": 2},
}  # fmt: skip
LEAVES = ("logits", "hidden", "logprobs")


def arguments(op: str, device: str) -> dict:
    values = given(op)
    if op == "ema_update_":
        values |= {key: [values[key]] for key in ("ema", "params")}

    def moved(x):
        if isinstance(x, list):
            return [moved(one) for one in x]
        return x.to(device) if isinstance(x, torch.Tensor) else x

    values = {key: moved(x) for key, x in values.items()}
    return {key: x.requires_grad_() if key in LEAVES else x for key, x in values.items()}


def run(op: str, device: str = "cpu", **settings) -> dict[tuple[str, str], int]:
    """The calls of one call of an op, and of its backward where it has one."""
    values = arguments(op, device) | settings
    nk.reset_calls()
    found = getattr(nk, op)(**values)
    if any(key in values for key in LEAVES):
        found[0].sum().backward()
    return nk.calls()


def expected(op: str, backend: str) -> dict[tuple[str, str], int]:
    parts = {} if backend == "eager" else PARTS.get(op, {})
    return {(name, backend): n for name, n in {op: 1, **parts}.items()}


def refused(op: str, target) -> bool:
    """Whether a layer of the CPU's is not for this target, and says so."""
    if op not in registry.LAYERS or (target.device == "cpu" and target.backend != "triton"):
        return False
    with pytest.raises(ValueError, match=op):
        run(op, target.device, backend=target.backend)
    return True


# ---- who was asked


@pytest.mark.parametrize("way", ["argument", "use_backend", "NLHF_BACKEND"])
@pytest.mark.parametrize("name", ALL)
def test_the_backend_asked_for_is_the_one_that_ran(name, way, target, monkeypatch):
    backend, device = target
    if refused(name, target):
        return
    if way == "argument":
        # whatever else is asked for
        monkeypatch.setenv("NLHF_BACKEND", "cuda")
        ran = run(name, device, backend=backend)
    elif way == "use_backend":
        monkeypatch.setenv("NLHF_BACKEND", "cuda")
        with nk.use_backend(backend):
            ran = run(name, device)
    else:
        monkeypatch.setenv("NLHF_BACKEND", backend)
        ran = run(name, device)
    assert ran == expected(name, backend)


@pytest.mark.parametrize("name", ALL)
def test_a_choice_of_nobody_is_the_first_of_the_order(name):
    assert run(name) == expected(name, registry.ORDER["cpu"][0])


class Spy:
    """A module that writes down which of its functions are called."""

    def __init__(self, inner, called: list):
        self._inner, self._called = inner, called

    def __getattr__(self, name):
        found = getattr(self._inner, name)
        if isinstance(found, types.ModuleType):
            return Spy(found, self._called)

        def noted(*values):
            self._called.append(name)
            return found(*values)

        return noted


@pytest.fixture
def called(monkeypatch):
    """Functions of the compiled module and kernels of Triton, as they are called."""
    names = []
    if not registry.reason("token_kl", "cpp", "cpu"):
        from nlhf_kernels.backends import native

        monkeypatch.setattr(native, "_native", Spy(native._native, names))
    if not registry.reason("token_kl", "triton", "cpu") or torch.cuda.is_available():
        from nlhf_kernels.backends.triton import common

        launch = common.launch

        def noted(kernel, *values, **options):
            names.append(kernel.fn.__name__)
            return launch(kernel, *values, **options)

        monkeypatch.setattr(common, "launch", noted)
    return names


KERNELS = {
    "cpp": {
        "mixture_sample": ["mixture_sample"],
        "linear_mixture_sample": ["linear_mixture_sample"],
        "token_logprobs": ["token_logprobs", "token_logprobs_grad"],
        "linear_token_logprobs": ["token_logprobs", "token_logprobs_grad"],
        "token_kl": ["token_kl", "token_kl_grad"],
        "linear_token_kl": ["token_kl", "token_kl_grad"],
        "pairwise_pg_loss": ["token_logprobs", "pairwise_pg_coef", "token_logprobs_grad"],
        "linear_pairwise_pg_loss": [
            "token_logprobs", "pairwise_pg_coef", "token_logprobs_grad", "pairwise_pg_coef",
        ],
        "pair_loss": ["pair_loss"],
        "ema_update_": ["ema_update"],
        "skinny_linear": ["skinny_linear"],
    },
}  # fmt: skip


@pytest.mark.parametrize("name", ALL)
def test_what_is_counted_was_called(name, target, called):
    """Not by the counters: by the functions of the compiled module and the kernels themselves."""
    if refused(name, target):
        return
    run(name, target.device, backend=target.backend)
    if target.backend == "eager":
        assert called == []
    elif target.backend == "cpp":
        assert called == KERNELS["cpp"][name]
    else:
        assert called
        assert all(kernel.endswith("_kernel") for kernel in called), called


def test_every_entry_of_the_registry_is_the_function_of_its_name(called):
    here = {"cpp", "triton"} - set(registry._ABSENT)
    for raw_op, paths in registry._PATHS.items():
        for backend in here & set(paths):
            function = registry.load(raw_op, backend)
            part = {"cpp": "native", "triton": "triton"}[backend]
            assert function.__module__.startswith(f"nlhf_kernels.backends.{part}")
            assert function.__name__ == raw_op


# ---- paths within a backend


class RawOps(TorchDispatchMode):
    """The raw ops that the dispatcher is asked for."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "nlhf":
            self.names.append(func.name().removeprefix("nlhf::").split(".")[0])
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", ["token_logprobs", "token_kl", "pairwise_pg_loss"])
def test_a_backward_in_place_is_one(name, inplace, target):
    values = arguments(name, target.device)
    logits = values["logits"].detach().requires_grad_() * 1
    values["logits"] = logits
    before = logits.detach().clone()
    with RawOps() as asked:
        found = getattr(nk, name)(**values, inplace_backward=inplace, backend=target.backend)
        found[0].sum().backward()
    assert torch.equal(logits.detach(), before) != inplace
    backward = [op for op in asked.names if "_bwd" in op]
    suffix = "_bwd_" if inplace else "_bwd"
    assert [op.endswith(suffix) for op in backward] == [True] * (target.backend != "eager")


@pytest.mark.parametrize(
    ("changed", "fused"),
    [
        ({}, True),
        ({"softcap": 3.0}, True),
        ({"top_k": 2}, False),
        ({"top_p": torch.full((2,), 0.5)}, False),
        ({"min_p": 0.1}, False),
        ("float64", False),
        ("many", False),
    ],
    ids=str,
)
def test_a_draw_from_hidden_states_has_a_kernel_or_is_a_product_and_a_draw(
    changed, fused, compiled, called
):
    values = arguments("linear_mixture_sample", compiled.device)
    models = [key for key in values if "hidden" in key or "weight" in key]
    if changed == "float64":
        values |= {key: values[key].double() for key in models}
    elif changed == "many":
        rows = FUSED_ROWS[compiled.device] + 1
        values |= {key: values[key][:1].repeat(rows, 1) for key in models if "hidden" in key}
    else:
        moved = {k: x.to(compiled.device) if torch.is_tensor(x) else x for k, x in changed.items()}
        values |= moved
    nk.reset_calls()
    nk.linear_mixture_sample(**values, backend=compiled.backend)
    ran = {("linear_mixture_sample", compiled.backend): 1}
    assert nk.calls() == ran | ({} if fused else {("mixture_sample", compiled.backend): 1})
    assert any("linear" in name or "span" in name for name in called) == fused, called


@pytest.mark.parametrize("filters", [False, True])
def test_a_filter_is_a_kernel_of_its_own_on_triton(filters, compiled, called):
    settings = {"top_k": 3} if filters else {}
    run("mixture_sample", compiled.device, backend=compiled.backend, **settings)
    kernels = ["mixture_tile_kernel", *["mixture_filter_kernel"] * filters]
    assert called == (kernels if compiled.backend == "triton" else ["mixture_sample"])


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("backend", registry.ORDER["cpu"])
def test_ranks_that_share_a_vocabulary_use_the_same_kernels(backend, group):
    for op in registry.OPS:
        ran = run(op, group=group, backend=backend)
        parts = expected(op, backend)
        if op == "linear_mixture_sample" and backend == "cpp":
            parts |= {("mixture_sample", "cpp"): 1}
        assert ran == parts, op


def test_the_level_of_the_instruction_set_asked_for_is_the_one_that_ran():
    from nlhf_kernels.backends.native import _native

    levels = _native.tile_levels()
    assert levels[-1] == "plain"
    try:
        for level in levels:
            _native.use_tile_level(level)
            for op in registry.OPS:
                _native.take_tile_levels_run()
                run(op, backend="cpp")
                assert _native.take_tile_levels_run() == [level], op
                run(op, backend="eager")
                assert _native.take_tile_levels_run() == [], op
    finally:
        _native.use_tile_level(levels[0])


# ---- counting


def test_threads_lose_no_count(compiled):
    threads = [
        threading.Thread(
            target=lambda: [registry.load("token_kl_fwd", compiled.backend) for _ in range(20_000)]
        )
        for _ in range(4)
    ]
    nk.reset_calls()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert nk.calls() == {("token_kl", compiled.backend): 80_000}


def test_what_is_given_out_is_a_copy():
    run("token_kl", backend="cpp")
    nk.calls().clear()
    assert nk.calls() == expected("token_kl", "cpp")
    nk.reset_calls()
    assert nk.calls() == {}
    assert nk.calls_table({}) == "no op ran"


def test_the_table_has_a_line_for_each_op_and_backend():
    calls = {("token_kl", "cpp"): 1234, ("token_kl", "eager"): 2, ("pair_loss", "cpp"): 0}
    header, *rows = [line.split() for line in nk.calls_table(calls).splitlines()]
    assert header == ["op", "backend", "calls"]
    assert rows == [["token_kl", "cpp", "1234"], ["token_kl", "eager", "2"]]


@pytest.mark.parametrize("backend", ["cpp", "eager"])
def test_counting_breaks_and_restarts_no_graph(backend):
    """Kernels are counted at every call of a compiled function; eager is part of its graph."""
    torch._dynamo.reset()
    compiles = []

    def compiler(graph, example):
        compiles.append(graph)
        return graph.forward

    def loss(logits, tokens):
        return nk.token_logprobs(logits, tokens, backend=backend).logprobs.sum()

    compiled = torch.compile(loss, fullgraph=True, backend=compiler)
    logits, tokens = torch.randn(3, 5), torch.zeros(3, dtype=torch.int64)
    nk.reset_calls()
    with torch.no_grad():
        for _ in range(12):
            compiled(logits, tokens)
            # the numbers that a trace could guard on change in between
            nk.pair_loss(**given("pair_loss"), backend=backend)
    assert len(compiles) == 1
    seen = {("pair_loss", backend): 12}
    assert nk.calls() == seen | ({("token_logprobs", "cpp"): 12} if backend == "cpp" else {})


# ---- the loop


def test_a_rollout_and_a_step_on_the_cpu_run_compiled_ops_alone():
    model, ref = tiny.llama(0, torch.float32), tiny.llama(1, torch.float32)
    ids, mask = tiny.prompts([3, 5])
    nk.reset_calls()
    pair = rollout.generate_pair(
        model, ref, ids, mask, mixture_coef=0.3, max_new_tokens=5, seed=1, eos_token_id=[2]
    )
    assert nk.calls() == {("mixture_sample", "cpp"): pair.y.tokens.shape[1]}
    preference = torch.tensor([0.2, 0.8])
    for head, op in (("fused", "linear_pairwise_pg_loss"), ("logits", "pairwise_pg_loss")):
        nk.reset_calls()
        losses.nash_md_pg(model, ref, pair, preference, tau=0.1, head=head).loss.backward()
        assert nk.calls() == expected(op, "cpp")


def test_a_wide_layer_decodes_by_the_kernel_for_few_rows():
    wide = tiny.llama(0, torch.float32, intermediate_size=2**13)
    ids, mask = tiny.prompts([3, 5])
    nk.reset_calls()
    rollout.generate_pair(
        wide, wide, ids, mask, mixture_coef=0.3, max_new_tokens=3, seed=1, eos_token_id=[2]
    )
    assert {backend for _, backend in nk.calls()} == {"cpp"}
    assert nk.calls()["skinny_linear", "cpp"] > 0
