"""``bench.profile``: the trace has the ranges, and nothing is left behind."""

import json
import sys

import pytest
import torch

import nlhf_kernels as nk
from bench import profile

SAMPLE = {"seed": 1, "position": 0}


def names(path) -> list[str]:
    return [event.get("name") for event in json.loads(path.read_text())["traceEvents"]]


def test_a_session_leaves_a_trace_a_summary_and_the_commands(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "bench", "--shape", "two words"])
    before = {op: getattr(nk, op) for op in profile.OPS}
    assert "mixture_sample" in before
    assert not profile.active()
    with profile.session(tmp_path / "new"):
        assert profile.active()
        with profile.range("rollout"):
            # looked up at the call, as everywhere
            nk.mixture_sample(torch.randn(2, 40), **SAMPLE)
    assert not profile.active()
    assert all(getattr(nk, op) is function for op, function in before.items())

    events = names(tmp_path / "new" / "trace.json")
    assert events.count("rollout") == 1
    assert events.count("mixture_sample") == 1
    assert "nlhf::mixture_sample_fwd" in events
    said = capsys.readouterr()
    # rows alone belong there
    assert said.out == ""
    assert (tmp_path / "new" / "summary.txt").read_text() in said.err
    assert "mixture_sample" in said.err
    for tool in ("nsys profile -t cuda,nvtx", "--nvtx-include mixture_sample/"):
        (line,) = (x for x in said.err.splitlines() if tool in x)
        assert line.startswith("NLHF_PROFILE=nvtx ")
        assert line.endswith(" -m bench --shape 'two words'")


def test_functions_come_back_after_an_error(tmp_path):
    before = nk.token_logprobs

    def fail():
        with profile.session(tmp_path):
            assert nk.token_logprobs is not before
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        fail()
    assert nk.token_logprobs is before
    assert not profile.active()


def test_nvtx_ranges_nest_and_close_after_errors(tmp_path, monkeypatch):
    """With ``NLHF_PROFILE=nvtx`` no trace: Nsight is watching."""
    stack, seen = [], []

    def push(name):
        stack.append(name)
        seen.append(list(stack))

    monkeypatch.setattr(profile, "_nvtx", lambda: (push, stack.pop))
    monkeypatch.setenv("NLHF_PROFILE", "nvtx")
    refused = pytest.raises(ValueError, match="token_logprobs")
    with profile.session(tmp_path), profile.range("update"), refused:
        nk.token_logprobs(torch.zeros(3), torch.zeros(3))
    assert seen == [["update"], ["update", "token_logprobs"]]
    assert stack == []
    assert list(tmp_path.iterdir()) == []
    with profile.range("outside"):
        assert len(seen) == 2


def test_compiled_functions_still_compile(tmp_path):
    torch._dynamo.reset()
    x = torch.randn(3, 40)
    want = nk.mixture_sample(x, **SAMPLE)
    with profile.session(tmp_path):
        step = torch.compile(
            lambda x: nk.mixture_sample(x, **SAMPLE), fullgraph=True, backend="aot_eager"
        )
        assert torch.equal(step(x).tokens, want.tokens)
