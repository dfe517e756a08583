"""The peers of the bench: each is there or says why not, and each gate finds what is wrong."""

import dataclasses
import functools
import importlib.util
import itertools
import subprocess
import sys
import types
import warnings

import pytest
import torch

import nlhf_kernels as nk
from bench import gates, heads, layers, peers
from nlhf_kernels.testing.case import BF16, F32, Case
from tests.test_sampling import surprise

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
UNMASKED = {"masked": "none"}
# a gate wants 64 draws, so it asks these samplers several times
SAMPLE = Case("mixture_sample", "plain", (17, 300), F32)
LOGPROBS = Case(
    "token_logprobs", "soft cap", (2, 5, 130), F32, {"softcap": 5.0, "temperature": 0.7}
)
PG_LOSS = Case("pairwise_pg_loss", "plain", (3, 5, 130), F32, UNMASKED)
KL = Case("token_kl", "temperature", (2, 5, 130), F32, {"temperature": 0.7})
EXACT = Case(
    "pairwise_pg_loss", "exact", (3, 5, 130), F32, {**UNMASKED, "ref": "logits", "kl": "exact"}
)
# logits of more than one sequence do not all fit into what the oracle makes at a time
HEAD = Case("linear_token_logprobs", "tiny", (5, 14, 16, 300), F32)
HEAD_KL = Case("linear_token_kl", "tiny", (5, 14, 16, 300), F32, {"ref": "own"})
HEAD_PG_LOSS = Case("linear_pairwise_pg_loss", "tiny", (5, 14, 16, 300), F32, UNMASKED)
PROBLEMS = (
    SAMPLE,
    Case("mixture_sample", "16 bits", (2, 300), BF16, {"ref_dtype": BF16}),
    Case("mixture_sample", "filters", (9, 300), F32, {"filters": {"top_k": 40, "top_p": 0.8}}),
    Case("mixture_sample", "min-p", (9, 300), F32, {"filters": {"min_p": 0.1}}),
    LOGPROBS,
    Case("token_logprobs", "16 bits, two dimensions", (70, 130), BF16),
    PG_LOSS,
    Case("pairwise_pg_loss", "16 bits", (3, 5, 130), BF16, {**UNMASKED, "softcap": 5.0}),
    KL,
    Case("token_kl", "16 bits", (2, 5, 130), BF16),
    EXACT,
    dataclasses.replace(EXACT, why="exact, 16 bits", dtype=BF16),
    HEAD,
    dataclasses.replace(HEAD, why="16 bits", dtype=BF16),
    HEAD_KL,
    dataclasses.replace(HEAD_KL, why="one head", options={"ref": "shared"}),
    HEAD_PG_LOSS,
    dataclasses.replace(HEAD_PG_LOSS, why="16 bits", dtype=BF16),
)
EACH = (SAMPLE, LOGPROBS, KL, PG_LOSS, HEAD, HEAD_KL, HEAD_PG_LOSS)


def contenders(problem, device=DEVICE):
    return peers.contenders(problem, device)


@pytest.fixture(autouse=True)
def sequence_by_sequence(monkeypatch):
    monkeypatch.setattr(gates, "_LOGITS", 1)


# ---- who is there

NAMES = {
    "mixture_sample": (
        "Hugging Face path",
        "Hugging Face path, torch.compile",
        "FlashInfer (tokens only)",
        "yardstick: Gumbel per element (tokens only)",
        "yardstick: two logsumexp (no draw)",
    ),
    "token_logprobs": (
        "torch.compile",
        "torch log_softmax (no entropy)",
        "Liger cross entropy (no entropy)",
        "TRL selective_log_softmax (no entropy)",
    ),
    "pairwise_pg_loss": (
        "torch.compile",
        "torch log_softmax (no entropy)",
        "Liger cross entropy (no entropy)",
        "TRL selective_log_softmax (no entropy)",
        "Liger GRPO loss (T - 1 tokens, no entropy)",
    ),
    "token_kl": ("torch.compile",),
    "linear_token_kl": ("matmul + cpp", "torch.compile"),
    "linear_pairwise_pg_loss": (
        "matmul + cpp, in place",
        "torch.compile",
        "torch linear_cross_entropy, chunked",
        "TRL chunked log-probabilities",
        "Cut Cross Entropy",
        heads.LIGER_GRPO,
    ),
    "linear_token_logprobs": (
        "matmul + cpp",
        "torch.compile",
        "torch linear_cross_entropy",
        "torch linear_cross_entropy, chunked",
        "Liger fused linear cross entropy",
        "TRL chunked log-probabilities",
        "Cut Cross Entropy",
    ),
}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("problem", EACH, ids=str)
def test_every_peer_is_there_or_says_why_not(problem, device):
    found = {c.name: c for c in contenders(problem, device)}
    names = [x.replace("cpp", "triton") if device == "cuda" else x for x in NAMES[problem.op]]
    assert set(names) <= set(found)
    for name, contender in found.items():
        ours = name.startswith("matmul + ")
        assert contender.peer != ours
        if device == DEVICE == "cpu":
            gpu = name.startswith(("Liger", "FlashInfer")) or name == "Cut Cross Entropy"
            # its parts are plain PyTorch
            gpu = gpu and name != heads.LIGER_GRPO
            assert bool(contender.missing) >= gpu


def test_an_absent_package_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for package, command in peers.INSTALL.items():
        assert peers.absent.__wrapped__(f"{package}.module") == f"not installed: {command}"
    monkeypatch.undo()

    def broken(module):
        raise ImportError("needs\nanother torch")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(peers, "load", broken)
    assert peers.absent.__wrapped__("trl.x") == "cannot be imported: needs another torch"


def test_a_case_for_tests_alone_is_named_as_such():
    masked = Case("pairwise_pg_loss", "", (2, 3, 50))
    per_row = Case("mixture_sample", "", (4, 50), F32, {"rows": True})
    for case, option in ((masked, "masked"), (per_row, "rows")):
        for contender in contenders(case):
            assert option in contender.missing


def test_importing_peers_leaves_settings_alone():
    code = """
import os, warnings, torch, torch._dynamo, torch._inductor, transformers
from bench import peers
def settings():
    return (dict(os.environ), list(warnings.filters), torch._dynamo.config.get_config_copy(),
            torch._inductor.config.get_config_copy(), torch.get_default_dtype(),
            torch.get_num_threads(), torch.get_float32_matmul_precision(),
            torch.are_deterministic_algorithms_enabled(), torch.is_grad_enabled())
before = settings()
modules = "liger_kernel.ops", "liger_kernel.transformers.grpo_loss", "cut_cross_entropy"
for module in (*modules, "trl.trainer.utils", "flashinfer.sampling"):
    peers.absent(module)
for was, now in zip(before, settings(), strict=True):
    assert was == now, (was, now)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- gates


def scaled(x, factor=1.1):
    """The same value with another gradient."""
    return x * factor + (x - x * factor).detach()


def last_scaled(args):
    """The weight of a head, or the logits."""
    last = max(i for i, x in enumerate(args) if x is not None and x.requires_grad)
    return tuple(scaled(x) if i == last else x for i, x in enumerate(args))


def rolled(args):
    """Other tokens."""
    return tuple(x.roll(1) if x is not None and x.dtype == torch.int64 else x for x in args)


# what can be wrong with a solver
ERRORS = {
    gates.sample: {
        "tokens outside": lambda f: lambda a, k: (f(a, k)[0] + a[0].shape[1], *f(a, k)[1:]),
        "another temperature": lambda f: lambda a, k: f(a, k | {"temperature": 3.0}),
        "another distribution": lambda f: lambda a, k: (torch.zeros_like(f(a, k)[0]),),
    },
    gates.logsumexps: {
        "the value": lambda f: lambda a, k: tuple(x + 1e-3 for x in f(a, k)),
        "one model twice": lambda f: lambda a, k: (f(a, k)[0],) * 2,
    },
    gates.logprobs: {
        "the value": lambda f: lambda a, k: (f(a, k)[0] + 0.1, f(a, k)[1]),
        "the gradient": lambda f: lambda a, k: f((scaled(a[0]), a[1]), k),
        "another token": lambda f: lambda a, k: f((a[0], a[1].roll(1)), k),
        "not a number": lambda f: lambda a, k: (f(a, k)[0] * torch.nan, None),
    },
    gates.pg_loss: {
        "the value": lambda f: lambda a, k: f(a, k) + 10,
        "the gradient": lambda f: lambda a, k: f((scaled(a[0]), *a[1:]), k),
        "no tau": lambda f: lambda a, k: f(a, k | {"tau": 0.0}),
        "another preference": lambda f: lambda a, k: f((*a[:3], 1 - a[3]), k),
    },
    gates.gradients: {
        "the value": lambda f: lambda a, k: f(a, k) + 10,
        "the gradient": lambda f: lambda a, k: f((scaled(a[0]), *a[1:]), k),
        "the gradient of the last leaf": lambda f: lambda a, k: f(last_scaled(a), k),
        "another token": lambda f: lambda a, k: f(rolled(a), k),
    },
}


def rejects(gate) -> bool:
    try:
        gate()
    except AssertionError:
        return True
    return False


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_gates_accept_peers_and_reject_errors(problem, monkeypatch):
    # what is compiled is the same function, and each error would be compiled anew
    for module in (peers, heads):
        monkeypatch.setattr(module, "compiled", lambda function: function)
    # what others say of themselves is none of ours
    warnings.simplefilter("ignore")
    here = [c for c in contenders(problem) if not c.missing]
    assert here
    for contender in here:
        contender.gate()
        gate = contender.gate
        solve, *rest = gate.args
        for error, wrong in ERRORS[gate.func].items():
            planted = functools.partial(gate.func, wrong(solve), *rest, **gate.keywords)
            assert rejects(planted), f"{contender.name}: {error}"


def test_entropy_is_compared():
    def wrong(args, kwargs):
        logprobs, entropy = peers.formula(args, kwargs)
        return logprobs, entropy + 1e-3

    gates.logprobs(peers.formula, LOGPROBS, DEVICE)
    assert rejects(functools.partial(gates.logprobs, wrong, LOGPROBS, DEVICE))


def test_sampling_logprobs_are_compared_one_by_one():
    solve = peers.hugging_face(peers._hugging_face)
    for place in (1, 2, 3):

        def wrong(args, kwargs, place=place):
            return tuple(x + 1e-3 * (i == place) for i, x in enumerate(solve(args, kwargs)))

        assert rejects(functools.partial(gates.sample, wrong, SAMPLE, DEVICE))


def test_a_loss_may_leave_out_the_last_tokens_if_it_says_so():
    whole = peers.pg_loss(peers.log_softmax)

    def shorter(args, kwargs):
        logits, tokens, mask, preference = args
        kwargs = kwargs | {"ref_logprobs": kwargs["ref_logprobs"][:, :-1]}
        return whole((logits[:, :-1], tokens[:, :-1], mask[:, :-1], preference), kwargs)

    gates.pg_loss(shorter, PG_LOSS, DEVICE, unused=1)
    assert rejects(functools.partial(gates.pg_loss, whole, PG_LOSS, DEVICE, unused=1))
    assert rejects(functools.partial(gates.pg_loss, shorter, PG_LOSS, DEVICE))


def test_16_bit_results_may_be_off_by_their_rounding_only():
    want = torch.tensor([-13.03], dtype=torch.float64)
    gates.close("x", want.bfloat16(), want, 0.02)
    for got in (want.float() + 0.03, want.bfloat16() + 0.125, want.float() * torch.nan):
        assert rejects(functools.partial(gates.close, "x", got, want, 0.02))


@pytest.mark.parametrize("problem", [*EACH, EXACT], ids=str)
def test_compiled_peers(problem):
    (contender,) = (c for c in contenders(problem) if c.name.endswith("torch.compile"))
    contender.gate()


def test_each_problem_compiles_for_itself(monkeypatch):
    """Graphs are shared by code object: the ninth shape would run uncompiled, without a word."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    limit = torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True)

    def double(x):
        return x * 2

    def run(compile):
        torch._dynamo.reset()
        for size in range(2, 6):
            compile(double)(torch.ones(size))

    with limit:
        run(peers.compiled)
        with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            run(functools.partial(torch.compile, dynamic=False))
    torch._dynamo.reset()


def test_flashinfer_is_given_the_mixture(monkeypatch):
    """In place of the package, which needs a GPU: the signatures that it documents."""

    def sampling_from_logits(logits, indices=None, deterministic=True, generator=None):
        return torch.multinomial(logits.softmax(-1), 1)[:, 0].int()

    def top_k_top_p_sampling_from_logits(
        logits, top_k, top_p, indices=None, filter_apply_order="top_k_first"
    ):
        keep = gates.kept(logits.double(), top_k, top_p, 0.0)
        return sampling_from_logits(logits.masked_fill(~keep, -torch.inf))

    module = types.SimpleNamespace(
        sampling_from_logits=sampling_from_logits,
        top_k_top_p_sampling_from_logits=top_k_top_p_sampling_from_logits,
    )
    monkeypatch.setattr(peers, "load", lambda name: module)
    for filters in ({}, {"top_k": 40}, {"top_p": 0.8}, {"top_k": 40, "top_p": 0.8}):
        options = {"filters": filters} if filters else {}
        gates.sample(peers.flashinfer, Case("mixture_sample", "", (9, 300), F32, options), DEVICE)


# ---- the yardstick in Triton


def test_gumbel_yardstick_draws_the_mixture():
    from bench import yardsticks

    # two blocks, the second not full, and in both ids that are drawn
    rows, calls, vocab = 125, 4, 73
    policy, ref = torch.full((2, 1, vocab), -60.0)
    ids = torch.arange(7) * 3 + 53
    policy[0, ids], ref[0, ids] = torch.linspace(-2, 2, 7), torch.linspace(3, -2, 7)
    policy, ref = policy.to(DEVICE, BF16), ref.to(DEVICE)
    # strides of 0: the rows share their memory
    logits = [x.expand(rows, vocab) for x in (policy, ref)]
    settings = {"mixture_coef": 0.25, "temperature": 0.6}
    drawn = [yardsticks.gumbel_sample(*logits, **settings, seed=i, block=64) for i in range(calls)]
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(drawn))

    counts = torch.cat(drawn).cpu().bincount(minlength=vocab)
    assert counts.nonzero()[:, 0].tolist() == ids.tolist()
    policy, ref = policy.double().cpu()[0, ids], ref.double().cpu()[0, ids]
    mixture = 0.75 * policy + 0.25 * ref
    assert surprise(counts[ids], (mixture / 0.6).softmax(-1)) < 5
    # another temperature, and one of the models alone, are told apart
    for other in (mixture, policy / 0.6, ref / 0.6):
        assert surprise(counts[ids], other.softmax(-1)) > 5


# ---- linear layers


LAYER = layers.Layer("small", 3, 128, 40)


@pytest.mark.parametrize("name", [c.name for c in layers.contenders(LAYER)])
def test_gates_of_layers_reject_a_wrong_output(name):
    (honest,) = (c for c in layers.contenders(LAYER) if c.name == name)
    assert honest.missing == ""
    honest.gate()

    def wrong(*args):
        output = honest.run(args, {}).clone()
        output[2, 127] += 1e-2
        return output

    with pytest.raises(AssertionError, match="outputs"):
        layers.require(wrong, LAYER)


def test_layers_are_the_cpus_and_what_is_not_here_is_named(monkeypatch):
    assert not layers.problems("cuda")
    monkeypatch.setattr(nk, "reason", lambda op, backend, device: f"no {backend}")
    ours = [c for c in layers.contenders(LAYER) if not c.peer]
    assert [c.missing for c in ours] == ["no cpp", "no eager"]
