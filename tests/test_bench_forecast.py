"""The sum of limits: its parts by hand, and the page that shows it."""

import dataclasses

import pytest

from bench import forecast
from bench.__main__ import main

WORK = forecast.Work("qwen2.5-1.5b", B=32, P=512, T=512)


def test_the_page_has_what_the_commands_print(capsys):
    text = forecast.PAGE.read_text(encoding="utf-8")
    for flags in ([], ["--measured"]):
        assert main(["forecast", *flags]) == 0
        assert capsys.readouterr().out in text


def test_sizes_are_those_of_the_models():
    # published: 1.54 and 7.62 billion, of which .545 in a table that is only looked up
    assert forecast.sizes("qwen2.5-1.5b")[0] == pytest.approx(1.54e9, rel=0.01)
    all_of_it, looked_up = forecast.sizes("qwen2.5-7b")
    assert all_of_it == pytest.approx(7.62e9, rel=0.01)
    assert looked_up == 152_064 * 3_584


def test_memory_by_hand():
    N, _ = forecast.sizes(WORK.model)
    held = forecast.memory(dataclasses.replace(WORK, processes=4, preference=False))
    assert held["weights"] == 2 * N * 2 / 4
    assert held["gradients and optimiser"] == N * 14 / 4
    # keys and values of 2 heads of 128 in 28 layers, of both models
    caches = 2 * 64 * 1024 * (2 * 2 * 128 * 2 * 28)
    assert held["rollout"] == 2 * N * 2 + caches + 2 * 64 * 151_936 * 2
    state = held["weights"] + held["gradients and optimiser"]
    assert held["peak"] == state + max(held["rollout"], held["loss"])


def test_a_rollout_of_few_rows_is_the_reading_of_the_weights():
    machine = forecast.Machine("", read=1e12, flops=1e30)
    work = dataclasses.replace(WORK, B=1, P=1, preference=False)
    N, _ = forecast.sizes(work.model)
    seconds = forecast.time(work, machine)["rollout"]
    assert seconds == pytest.approx(512 * 2 * N * 2 / 1e12, rel=0.01)


def test_links_by_layer_carry_both_models_for_every_token():
    def links(gather):
        work = dataclasses.replace(WORK, processes=8, gather=gather)
        return forecast.time(work, forecast.H200)["links"]

    N, _ = forecast.sizes(WORK.model)
    extra = links("layer") - links("model")
    assert extra == pytest.approx((2 * 512 - 2) * N * 2 / forecast.H200.link)
