"""Dispatch: who is chosen, and what an explicit choice says when it cannot be served."""

import functools
import os
import subprocess
import sys
import warnings

import pytest
import torch

import nlhf_kernels as nk
from nlhf_kernels import registry


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    clean = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "NLHF_BACKEND")}
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=clean | environment,
    )


def draw(**settings):
    return nk.mixture_sample(torch.randn(2, 5), seed=0, position=0, **settings)


def without(monkeypatch, *backends):
    monkeypatch.setattr(registry, "_ABSENT", {b: f"{b} is not here" for b in backends})


def test_argument_before_context_before_environment(monkeypatch):
    assert registry.resolve("mixture_sample", "cpu") == "cpp"
    monkeypatch.setenv("NLHF_BACKEND", "triton")
    assert registry.resolve("mixture_sample", "cpu") == "triton"
    with nk.use_backend("eager"):
        assert registry.resolve("mixture_sample", "cpu") == "eager"
        assert registry.resolve("mixture_sample", "cpu", "cpp") == "cpp"
        with nk.use_backend(""):
            assert registry.resolve("mixture_sample", "cpu") == "triton"
        assert registry.resolve("mixture_sample", "cpu") == "eager"
    assert registry.resolve("mixture_sample", "cpu") == "triton"


def test_context_ends_with_an_error():
    with pytest.raises(KeyError), nk.use_backend("eager"):
        raise KeyError
    assert registry.resolve("mixture_sample", "cpu") == "cpp"


def test_absence_moves_on_but_an_explicit_choice_does_not(monkeypatch):
    without(monkeypatch, "cpp")
    assert registry.resolve("mixture_sample", "cpu") == "eager"
    with pytest.raises(
        ValueError, match="mixture_sample: backend 'cpp' cannot be used: cpp is not"
    ):
        draw(backend="cpp")
    with nk.use_backend("cpp"), pytest.raises(ValueError, match="cpp is not here"):
        draw()
    monkeypatch.setenv("NLHF_BACKEND", "cpp")
    with pytest.raises(ValueError, match="cpp is not here"):
        draw()


@pytest.mark.parametrize("name", ["cuDNN", "CPP", "auto"])
def test_unknown_backends_are_named(name):
    with pytest.raises(ValueError, match=f"{name}' cannot be used: it is unknown"):
        draw(backend=name)
    with pytest.raises(ValueError, match=f"use_backend: '{name}' is unknown"), nk.use_backend(name):
        pass


@pytest.mark.parametrize("backend", ["cpp", "triton"])
def test_a_feature_that_a_backend_lacks(backend, monkeypatch):
    """An op that draws through another lacks what that one does."""
    lack = {backend: {"filters": "it has no top_k"}}
    monkeypatch.setattr(registry, "_LACKS", {"mixture_sample": lack})
    linear = functools.partial(
        nk.linear_mixture_sample, torch.randn(2, 3), torch.randn(5, 3), seed=0, position=0
    )
    for call in (draw, linear):
        for filters in ({"top_k": 2}, {"top_p": 0.5}, {"top_k": torch.tensor([0, 0])}):
            with pytest.raises(ValueError, match=f"'{backend}' cannot be used: it has no top_k"):
                call(backend=backend, **filters)
            assert (call(**filters).tokens >= 0).all()
        assert (call(backend=backend, top_k=0, top_p=1.0, min_p=0.0).tokens >= 0).all()


def test_reasons(op, monkeypatch):
    assert registry.reason(op, "eager", "cpu") == registry.reason(op, "eager", "cuda") == ""
    assert "CPU only" in registry.reason(op, "cpp", "cuda")
    assert "no cuda implementation" in registry.reason(op, "cuda", "cuda")
    monkeypatch.setattr(registry, "_INTERPRETED", False)
    assert "TRITON_INTERPRET=1" in registry.reason(op, "triton", "cpu")
    assert registry.reason(op, "triton", "cuda") == ""
    monkeypatch.setattr(registry, "_INTERPRETED", True)
    assert "for the CPU" in registry.reason(op, "triton", "cuda")


def test_eager_on_a_gpu_warns_once(monkeypatch):
    without(monkeypatch, "triton")
    monkeypatch.setattr(registry, "_warned", set())
    with pytest.warns(UserWarning, match="mixture_sample: falls back to eager on cuda: triton is"):
        assert registry.resolve("mixture_sample", "cuda") == "eager"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert registry.resolve("mixture_sample", "cuda") == "eager"
        # asked for, it is no fallback
        monkeypatch.setattr(registry, "_warned", set())
        assert registry.resolve("mixture_sample", "cuda", "eager") == "eager"


def test_a_broken_kernel_raises(plant):
    def broken(*_):
        raise ZeroDivisionError("planted")

    backend = plant({"mixture_sample_fwd": broken})
    with pytest.raises(ZeroDivisionError, match="planted"):
        draw(backend=backend)


def test_a_broken_backend_module_raises(monkeypatch):
    monkeypatch.setitem(registry._PATHS["mixture_sample_fwd"], "cpp", "nlhf_kernels.nowhere:f")
    registry._imported.cache_clear()
    with pytest.raises(ModuleNotFoundError, match="nowhere"):
        draw()
    registry._imported.cache_clear()


def test_importing_the_package_imports_no_triton_and_no_extension():
    code = "import sys, nlhf_kernels; print([m for m in sys.modules if 'triton' in m.split('.')[0]"
    done = python("-c", code + " or m == 'nlhf_kernels._native'])")
    assert done.stdout.strip() == "[]", done.stderr


def test_table_of_the_command():
    done = python("-m", "nlhf_kernels")
    assert done.returncode == 0, done.stderr
    lines = [line.split(maxsplit=3) for line in done.stdout.splitlines() if " uses " not in line]
    for op in registry.OPS:
        rows = {line[1]: line[3] for line in lines if line[::2][:2] == [op, "cpu"]}
        assert set(rows) == set(registry.BACKENDS)
        assert rows["eager"] == rows["cpp"] == "yes"
        assert "TRITON_INTERPRET" in rows["triton"]
        assert "no cuda implementation" in rows["cuda"]
        assert f"{op} on cpu uses cpp" in done.stdout
    ran = done.stdout.partition("what ran on cpu")[2].splitlines()[2:]
    counts = {tuple(line.split()[:2]): int(line.split()[2]) for line in ran}
    assert {backend for _, backend in counts} == {"cpp"}
    assert {op for op, _ in counts} >= {*registry.OPS, *registry.LAYERS, *registry.UPDATES}


def test_the_table_of_what_ran_follows_the_choice():
    done = python("-m", "nlhf_kernels", NLHF_BACKEND="eager")
    ran = [line.split() for line in done.stdout.partition("what ran on cpu")[2].splitlines()[2:]]
    assert {op for op, *_ in ran} == {*registry.OPS, *registry.LAYERS, *registry.UPDATES}
    assert {(backend, n) for _, backend, n in ran} == {("eager", "1")}


def test_a_forced_backend_that_cannot_run_does_not_break_the_table():
    done = python("-m", "nlhf_kernels", NLHF_BACKEND="triton")
    assert done.returncode == 0, done.stderr
    assert "cannot be used" in done.stdout
