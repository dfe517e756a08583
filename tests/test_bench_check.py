"""Figures against their bounds: what is named, and what cannot pass unnoticed."""

import dataclasses
import json
import math

import pytest

import nlhf_kernels as nk
from bench import aot, check, cli, counts, ratios
from bench.__main__ import main

BOUNDS = {"one": 100, "two": 0.5}
PART = check.Part(dict, above=1.02, below=0.95)


@pytest.fixture
def planted(monkeypatch, tmp_path):
    """``planted(figures, toolchain)``: the only part, its bounds those of BOUNDS by "gcc 12"."""
    path = tmp_path / "bounds.json"
    path.write_text(json.dumps({"counts": {"toolchain": "gcc 12", "bounds": BOUNDS}}))
    monkeypatch.setattr(check, "BOUNDS", path)

    def plant(figures: dict, toolchain: str = "gcc 12") -> None:
        part = check.Part(lambda: (toolchain, figures), above=1.02, below=0.95)
        monkeypatch.setattr(check, "PARTS", {"counts": part})

    return plant


@pytest.mark.parametrize(
    ("changed", "fault"),
    [
        ({"one": 102}, ""),
        ({"one": 95}, ""),
        ({"one": 102.1}, "one: 102.1 exceeds its bound 100"),
        ({"two": math.nan}, "two: nan exceeds its bound 0.5"),
        ({"one": 94}, "one: 94 is far below its bound 100: --save lowers it"),
        ({"three": 7}, "three: 7 has no bound: --save makes one"),
        ({"two": None}, "two: has a bound, and was not measured: --save takes it out"),
    ],
)
def test_what_is_wrong_is_named(changed, fault):
    found = {name: x for name, x in (BOUNDS | changed).items() if x is not None}
    assert check.judge(PART, found, BOUNDS) == ([fault] if fault else [])


def test_a_bound_of_zero_holds():
    part = check.PARTS["aot"]
    assert check.judge(part, {"faults": 0}, {"faults": 0}) == []
    assert check.judge(part, {"faults": 1}, {"faults": 0}) == ["faults: 1 exceeds its bound 0"]


def test_the_last_line_says_whether_it_passed(planted, capsys):
    planted(BOUNDS)
    assert main(["check"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "every figure is in its bound"
    planted(BOUNDS | {"one": 103})
    assert main(["check", "--only", "counts"]) == 1
    *_, said, fault = capsys.readouterr().out.splitlines()
    assert said == "FAILED: 1"
    assert fault == "counts: one: 103 exceeds its bound 100"


def test_another_toolchain_is_said_and_held_to_wider_bounds(planted, capsys):
    planted(BOUNDS | {"one": 130}, "gcc 13")
    assert main(["check"]) == 0
    said = capsys.readouterr().err
    assert said == "counts: the bounds are of gcc 12, this is gcc 13: held to 1.3 times them\n"
    planted(BOUNDS | {"one": 133}, "gcc 13")
    assert main(["check"]) == 1


def test_without_bounds_nothing_passes(planted, capsys):
    planted(BOUNDS)
    check.BOUNDS.unlink()
    assert main(["check"]) == 1
    assert "counts: one: 100 has no bound" in capsys.readouterr().out
    assert main(["check", "--save"]) == 0
    assert main(["check"]) == 0
    assert json.loads(check.BOUNDS.read_text())["counts"]["bounds"] == BOUNDS


def test_an_unknown_part_is_one_line_and_status_2(capsys):
    assert main(["check", "--only", "noise"]) == 2
    assert "knows counts, aot, ratios, got 'noise'" in capsys.readouterr().err


def test_a_missing_valgrind_is_no_pass(monkeypatch):
    monkeypatch.setattr(counts.shutil, "which", lambda name: None)
    with pytest.raises(cli.BadInput, match="there is no valgrind: apt-get install valgrind"):
        counts.measured()


def test_dumps_are_read_by_their_names():
    dump = "part: 1\ndesc: Trigger: Client Request: token_kl float32, avx2\nsummary: 90\ntotals: 91"
    end = "part: 2\ndesc: Trigger: Program termination\ntotals: 5"
    assert counts.read([dump, end]) == {"token_kl float32, avx2": 91}
    with pytest.raises(AssertionError, match="two dumps are called token_kl"):
        counts.read([dump, dump])


def test_kernels_are_not_compiled_again_unless_something_changed(monkeypatch, tmp_path):
    row = {"kernel": "tile", "variant": "plain", "dtype": "float32", "arch": "sm_90"}
    row |= {"registers": 40, "shared_bytes": 16, "faults": ["spills"]}
    monkeypatch.setattr(aot, "KEPT", tmp_path / "build" / "aot.json")
    assert aot.kept() == []
    aot.keep([row])
    name = "tile plain float32 sm_90"
    want = {f"{name}, registers": 40, f"{name}, shared_bytes": 16, f"{name}, faults": 1}
    assert check.PARTS["aot"].measure()[1] == want
    before = aot.fingerprint()
    monkeypatch.setattr(aot, "MAKERS", ("aot",))
    assert aot.fingerprint() != before
    assert aot.kept() == []


def test_bounds_of_ratios_are_those_of_the_slowest_processor(monkeypatch):
    here = dataclasses.replace(check.PARTS["ratios"], measure=lambda: ("", {"a": 0.2, "b": 0.2}))
    monkeypatch.setitem(check.PARTS, "ratios", here)
    elsewhere = {"ratios": {"toolchain": "", "bounds": {"a": 0.5, "b": 0.1, "gone": 0.1}}}
    assert check.save(["ratios"], elsewhere)["ratios"]["bounds"] == {"a": 0.5, "b": 0.3}


def test_every_op_has_a_count_and_a_ratio():
    saved = json.loads(check.BOUNDS.read_text(encoding="utf-8"))
    assert list(saved) == sorted(check.PARTS)
    timed = {name.split()[0] for name in saved["ratios"]["bounds"]}
    ops = {x for x in nk.__all__ if hasattr(getattr(nk, x), "__kwdefaults__")}
    ops = {x for x in ops if "backend" in (getattr(nk, x).__kwdefaults__ or {})}
    assert timed == ops
    # what runs as eager is at 1
    assert all(bound <= 0.9 for bound in saved["ratios"]["bounds"].values())
    counted = {name.split()[0] for name in saved["counts"]["bounds"]}
    # the others are made of these
    native = {"token_logprobs_grad", "token_kl_grad", "pairwise_pg_coef", "ema_update"}
    assert counted == native | {
        "mixture_sample", "linear_mixture_sample", "token_logprobs", "token_kl", "pair_loss",
        "skinny_linear",
    }  # fmt: skip


@pytest.mark.usefixtures("one_thread")
def test_an_op_that_runs_as_eager_exceeds_its_bound(monkeypatch):
    monkeypatch.setattr(ratios, "TURNS", 3)
    monkeypatch.setattr(ratios, "SECONDS", 0.005)
    (call,) = [call for name, call in ratios.calls() if name == "token_kl float32"]
    saved = json.loads(check.BOUNDS.read_text(encoding="utf-8"))["ratios"]["bounds"]
    bounds = {"token_kl float32": saved["token_kl float32"]}
    found = {"token_kl float32": ratios.ratio(lambda backend: call("eager"))}
    (fault,) = check.judge(check.PARTS["ratios"], found, bounds)
    assert "exceeds its bound" in fault
