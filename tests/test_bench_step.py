"""The bench of a whole step: that its contestants do the same work, and all of it."""

import collections
import dataclasses
import json
import time

import pytest
import torch

from bench import cli, contestants, reading, scaling, train_step
from bench.phases import Phases, gradient_mb, measure_step
from bench.setting import EOS, MODELS, Setting
from bench.text import number
from nlhf.rollout import Completion, Pair

SMALL = Setting("tiny", B=3, P=5, T=4, dtype="float64")
STAMP = {"run", "commit", "dirty", "device", "threads", "versions"}
# of a row of kind "step"
FIELDS = {
    "kind", "setting", "variant", "status", "note", "seconds", "peak_mb", "state_mb", "tokens",
} | STAMP  # fmt: skip


def gradients(model) -> dict[str, torch.Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found
    return found


def louder(model) -> None:
    """Weights that tell the models apart: as they are initialised, all say nearly the same."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.1)


@pytest.fixture
def stop_update(monkeypatch):
    """The optimiser does nothing, so that the gradients can be looked at."""
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: None)
    monkeypatch.setattr(torch.optim.AdamW, "zero_grad", lambda self: None)


@pytest.mark.parametrize("lora_r", [0, 2])
def test_nlhf_and_the_plain_loop_do_the_same_work(lora_r, stop_update):
    setting = dataclasses.replace(SMALL, lora_r=lora_r)
    ours, plain = contestants.Nlhf(setting), contestants.PlainLoop(setting)
    for contestant in (ours, plain):
        torch.manual_seed(1)
        louder(contestant.policy)
        if contestant.ref is not None:
            louder(contestant.ref)
    pair = ours.rollout(setting.prompts(), setting.T, 1)
    # a response that ends: what is behind it must count for neither
    pair.y.mask[1, 2:] = False
    preference = ours.score(pair)
    assert torch.equal(preference, plain.score(pair))

    losses = [c.loss(pair, preference) for c in (ours, plain)]
    torch.testing.assert_close(losses[0].double(), losses[1].double(), rtol=1e-5, atol=1e-6)
    for contestant in (ours, plain):
        contestant.update(pair, preference)
    found, wanted = gradients(ours.policy), gradients(plain.policy)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5 * scale, msg=name)


def test_they_draw_from_the_same_distributions():
    """The first token of y and of y', often enough that another mixture would show."""
    B = 1024
    setting = Setting("tiny", B=B, P=1, T=1)
    ours, plain = contestants.Nlhf(setting), contestants.PlainLoop(setting)
    for contestant in (ours, plain):
        for model, seed in ((contestant.policy, 1), (contestant.ref, 2)):
            torch.manual_seed(seed)
            louder(model)
    ids = torch.full((B, 1), 7)
    with torch.no_grad():
        logits = [m(ids[:1]).logits[0, -1] for m in (ours.policy, ours.ref)]
    mixed = (1 - setting.mixture_coef) * logits[0] + setting.mixture_coef * logits[1]
    pairs = [contestant.rollout(ids, 1, 3) for contestant in (ours, plain)]
    for side, wanted in (("y", logits[0]), ("y_other", mixed)):
        logprobs = (wanted / setting.temperature).log_softmax(-1)
        weights = logprobs.exp()
        mean = (weights * logprobs).sum()
        deviation = (weights * (logprobs - mean) ** 2).sum().sqrt()
        for pair in pairs:
            seen = logprobs[getattr(pair, side).tokens[:, 0]].mean()
            assert abs(seen - mean) < 5 * deviation / B**0.5, side


def test_micro_batches_are_all_rows_and_change_nothing(monkeypatch, stop_update):
    ours = contestants.Nlhf(SMALL)
    pair = ours.rollout(SMALL.prompts(), SMALL.T, 1)
    preference = torch.tensor([0.1, 0.5, 0.9])
    found = []
    for most, parts in ((1000, 1), (20, 2), (1, 3)):
        monkeypatch.setitem(contestants._MICRO_BATCH, "cpu", most)
        assert len(contestants.micro_batches(SMALL)) == parts
        ours.policy.zero_grad()
        ours.update(pair, preference)
        found.append({name: g.clone() for name, g in gradients(ours.policy).items()})
    for other in found[1:]:
        for name, gradient in found[0].items():
            torch.testing.assert_close(other[name], gradient, rtol=1e-5, atol=1e-9, msg=name)


@pytest.mark.parametrize("name", ["nlhf", "plain", "rlhf"])
def test_all_recompute_their_layers_in_the_update(name, stop_update):
    contestant = contestants.CONTESTANTS[name](SMALL)
    pair = contestant.rollout(SMALL.prompts(), SMALL.T, 1)
    calls = []
    contestant.policy.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    contestant.update(pair, contestant.score(pair))
    assert len(calls) == 2 * len(contestants.micro_batches(SMALL))


def test_rlhf_generates_once_and_learns_from_the_reward():
    rlhf = contestants.Rlhf(SMALL)
    calls = counted(rlhf.policy, rlhf.ref)
    pair = rlhf.rollout(SMALL.prompts(), SMALL.T, 1)
    assert calls == {("policy", (3, 5)): 1, ("policy", (3, 1)): 3}
    reward = rlhf.score(pair)
    ids = torch.cat([pair.input_ids, pair.y.tokens], 1)
    with torch.no_grad():
        assert torch.allclose(reward, rlhf.reward(ids).logits[:, 0].float())
    loss = rlhf.loss(pair, reward)
    # the reference reads the response once, and so does the policy
    assert calls["ref", (3, 8)] == calls["policy", (3, 8)] == 1
    # the loss of Nash-MD has a baseline of one half
    wanted = contestants.PlainLoop(SMALL).loss(pair, reward + 0.5)
    torch.testing.assert_close(loss.double(), wanted.double(), rtol=1e-4, atol=1e-6)


def counted(policy, ref) -> collections.Counter:
    """How often each model reads ids of which shape."""
    calls = collections.Counter()
    for name, model in (("policy", policy), ("ref", ref)):

        def look(module, args, kwargs, name=name):
            calls[name, tuple(kwargs["input_ids"].shape)] += 1

        model.register_forward_pre_hook(look, with_kwargs=True)
    return calls


def test_bare_forwards_are_those_of_the_rollout():
    ours = contestants.Nlhf(SMALL)
    calls = counted(ours.policy, ours.ref)
    ids, B, P, T = SMALL.prompts(), SMALL.B, SMALL.P, SMALL.T
    contestants.bare_forwards(ours, ids, torch.full((2 * B, T), 3))
    wanted = {(m, s): n for m in ("policy", "ref") for s, n in (((B, P), 1), ((2 * B, 1), T - 1))}
    assert calls == wanted
    calls.clear()
    pair = ours.rollout(ids, T, 1)
    contestants.require_full(pair, T)
    assert calls == wanted


def test_a_step_that_ends_early_is_refused(monkeypatch):
    setting = dataclasses.replace(SMALL, dtype="float32")
    plain = contestants.PlainLoop(setting)
    drawn = []

    def rollout(self, ids, T, seed):
        drawn.append(seed)
        tokens, mask = torch.full((3, T), 5), torch.ones(3, T, dtype=torch.bool)
        if seed < 7:
            # in one case of the last row only, in the other of all
            tokens[2, 1], mask[2, 2:] = EOS, False
            tokens, mask = (tokens[:, :2], mask[:, :2]) if seed == 6 else (tokens, mask)
        whole = torch.full((3, T), 5), torch.ones(3, T, dtype=torch.bool)
        return Pair(ids, torch.ones_like(ids), Completion(*whole), Completion(tokens, mask))

    monkeypatch.setattr(contestants.PlainLoop, "rollout", rollout)
    phases = Phases("cpu")
    seeds = iter(range(5, 100))
    found = contestants.measure_full(plain, phases, setting.prompts(), seeds)
    assert drawn == [5, 6, 7]
    assert found["step"] >= found["rollout"] + found["scoring"]
    monkeypatch.setattr(contestants, "_TRIES", 3)
    with pytest.raises(SystemExit, match="ended before 4 tokens"):
        contestants.measure_full(plain, phases, setting.prompts(), iter([1] * 50))


@pytest.mark.parametrize("names", [["nlhf", "bare"], ["plain"], ["rlhf"], ["bare"]])
def test_a_run_measures_what_it_names(names, tmp_path):
    setting = dataclasses.replace(SMALL, dtype="float32")
    found = contestants.run(setting, 2, names)
    assert len(found["steps"]) == (0 if names == ["bare"] else 2)
    assert len(found["bare"]) == (2 if "bare" in names else 0)
    for step in found["steps"]:
        phases = [step[name] for name in ("rollout", "scoring", "update")]
        assert min(phases) > 0
        assert sum(phases) == pytest.approx(step["step"])
        assert step["peak_mb"] > 0
    for passes in found["bare"]:
        assert passes.keys() == {"rollout"}


def test_memory_of_a_step():
    """The peak sees what was there in between, and the state what a step cannot do without."""
    model = torch.nn.Linear(2**12, 2**12, bias=False)
    assert gradient_mb(model) == 64
    phases = Phases("cpu")
    idle = measure_step(lambda: None, phases, "cpu", model)
    assert gradient_mb(model.requires_grad_(False)) == 0
    busy = measure_step(lambda: torch.ones(2**25), phases, "cpu", model)
    assert 120 < busy["peak_mb"] - busy["state_mb"] < 140
    assert 56 < idle["state_mb"] - busy["state_mb"] < 72


# ---- the command


@pytest.fixture
def no_child(monkeypatch):
    """Children that answer at once; their arguments are kept."""
    asked = []

    def child(python, module, *arguments, show=False):
        asked.append((python, module, *arguments))
        step = {"rollout": 4.0, "scoring": 1.0, "update": 2.0, "step": 7.0}
        steps = [step | {"peak_mb": 90.0, "state_mb": 70.0}]
        if module == "bench.trl_faults":
            return {"wrong": True, "note": "by 5 nats", "versions": {"trl": "1.13.0"}}, ""
        bare = [{"rollout": 3.0}]
        return {"steps": steps, "bare": bare, "versions": {"trl": "1.13.0"}}, ""

    monkeypatch.setattr(train_step, "run_child", child)
    return asked


def json_rows(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def test_rows_have_the_fields_of_the_schema(no_child, capsys, tmp_path):
    trl_python = tmp_path / "python"
    trl_python.touch()
    flags = ["--model", "tiny", "--prompts", "2", "--json", "--trl-python", str(trl_python)]
    assert train_step.main([*flags, "--wrong-too"]) == 0
    found = {row["variant"]: row for row in json_rows(capsys.readouterr().out)}
    assert all(row.keys() == FIELDS for row in found.values())
    ours, bare, rlhf = (found[name] for name in ("nlhf", "bare forwards", "rlhf"))
    assert ours["seconds"]["step"] == [7.0, 7.0, 7.0]
    assert (ours["peak_mb"], ours["state_mb"], bare["peak_mb"]) == (90.0, 70.0, None)
    assert bare["seconds"] == {"rollout": [3.0, 3.0, 3.0]}
    assert ours["tokens"] == 2 * rlhf["tokens"] == 2 * 2 * ours["setting"]["T"]
    assert found["trl 1.13.0"]["versions"]["trl"] == "1.13.0"
    for name in ("trl 1.13.0, use_cache", "trl 1.13.0, LoRA"):
        row = found[name]
        assert (row["status"], row["seconds"], row["peak_mb"]) == ("wrong", None, None)
        assert "5 nats" in row["note"]
    # the bare forwards take turns with nlhf, so they share its process
    assert [a[4] for a in no_child if a[1] == "bench.contestants"] == ["nlhf,bare", "plain", "rlhf"]


def test_the_table_compares(no_child, capsys, tmp_path):
    trl_python = tmp_path / "python"
    trl_python.touch()
    assert train_step.main(["--model", "tiny", "--trl-python", str(trl_python)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "rollout x trl 1.13.0" in lines[0]
    ours = next(line for line in lines if line.startswith("nlhf ")).split()
    assert ours[1:] == [*map(number, (4.0, 1.0, 2.0, 7.0, 4 / 3, 1.0, 1.0, 90.0, 20.0))]


def test_a_profiled_run_profiles_nlhf_alone(no_child, capsys, tmp_path):
    assert (
        train_step.main(["--quick", "--json", "--profile", str(tmp_path / "x" / ".." / "y")]) == 0
    )
    assert [row["variant"] for row in json_rows(capsys.readouterr().out)] == ["nlhf"]
    ((_, module, _, *rest),) = no_child
    assert (module, *rest) == ("bench.contestants", "1", "nlhf", str(tmp_path / "y"))


def test_missing_is_a_row_with_a_reason(monkeypatch, no_child, capsys):
    monkeypatch.setattr(train_step, "find_trl", lambda given: None)
    assert train_step.main(["--quick", "--json", "--only", "trl", "--wrong-too"]) == 0
    for row in json_rows(capsys.readouterr().out):
        assert (row["status"], row["seconds"]) == ("missing", None)
        assert "make peers" in row["note"]


def test_a_contestant_of_ours_that_fails_fails_the_run(monkeypatch, capsys):
    monkeypatch.setattr(train_step, "run_child", lambda *_, **__: (None, "failed: out of memory"))
    assert train_step.main(["--quick", "--json", "--only", "nlhf,bare"]) == 1
    rows = json_rows(capsys.readouterr().out)
    assert [r["variant"] for r in rows] == ["nlhf", "bare forwards"]
    assert all((r["status"], r["note"]) == ("missing", "failed: out of memory") for r in rows)


def test_a_child_that_fails_says_why():
    found, note = train_step.run_child(train_step.sys.executable, "bench.contestants", "{}", "1")
    assert found is None
    assert note.startswith("failed: TypeError: ")
    assert "\n" not in note


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--model", "gpt-5"], "gpt-5"),
        (["--prompts", "0"], "above 0"),
        (["--new-tokens", "many"], "whole number"),
        (["--only", "nlhf,them"], "'them'"),
        (["--only", "graphs"], "--device cuda"),
        (["--prompt-tokens", "8000", "--new-tokens", "1000"], "9000"),
        (["--trl-python", "/nowhere/python"], "make peers"),
        (["--profile", "x", "--save"], "--save"),
        (["--fast"], "--fast"),
    ],
)
def test_bad_flags_of_step(flags, said, capsys):
    assert train_step.main(flags) == 2
    assert said in (error := capsys.readouterr().err)
    assert error.count("\n") == 1


def test_bad_flags_of_scaling(capsys):
    for flags in (["--only", "sample-X"], ["--steps", "3"]):
        assert scaling.main(flags) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_settings_of_flags():
    def of(*flags):
        return train_step.settings(train_step.parser().parse(flags))

    small, main = of()
    assert (small.model, small.T) == ("tiny", 64)
    assert (main.model, main.B, main.P, main.T) == ("smollm2-135m", 4, 32, 128)
    (changed,) = of("--new-tokens", "256", "--dtype", "bfloat16")
    assert changed == dataclasses.replace(main, T=256, dtype="bfloat16")
    assert [s.model for s in of("--efficiency")] == ["tiny", "llama-35m", "smollm2-135m"]
    assert of("--quick", "--lora-r", "4")[0].lora_r == 4


def test_bytes_that_a_rollout_reads():
    """Counted once more from the weights and caches themselves."""
    setting = Setting("tiny", B=2, P=3, T=4, dtype="bfloat16")
    model = setting.policy()
    weights = sum(p.numel() for p in model.parameters())
    config = model.config
    column = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    columns = 2 * 2 * sum((4, 5, 6))
    assert reading.rollout_bytes(setting) == 2 * 2 * (4 * weights + columns * column)
    untied = dataclasses.replace(setting, model="llama3-8b")
    looked_up = MODELS["llama3-8b"]["vocab_size"] * MODELS["llama3-8b"]["hidden_size"]
    # 8.03e9 weights, of which 0.53e9 are looked up
    assert reading.rollout_bytes(untied) == pytest.approx(
        2 * 2 * 4 * (8.03e9 - looked_up), rel=1e-3
    )


# ---- scaling


def test_exponents_of_power_laws():
    xs = scaling.powers(1, 64)
    assert xs == (1, 2, 4, 8, 16, 32, 64)
    for power in (-1.0, 0.0, 1.0, 2.5):
        assert scaling.exponent(xs, [3 * x**power for x in xs]) == pytest.approx(power, abs=1e-12)
    # a fixed cost below, and the law above
    assert scaling.exponent(xs, [8, 8, 8, 8, 16, 32, 64]) == pytest.approx(1)
    assert scaling.exponent((1, 4), (1, 2)) == pytest.approx(0.5)
    assert scaling.exponent((1, 4, 8), (1, 0, 2)) is None


def test_growth_worse_than_linear_is_marked():
    def line(power):
        ys = [x**power for x in (1, 2, 4)]
        return scaling.table([scaling.row("a against B", "B", (1, 2, 4), "ms", ys, "us")])

    assert "worse than linear" in line(1.2)
    assert "worse than linear" not in line(1.05)


def test_all_points_of_a_curve_are_timed():
    made = []

    def start(x):
        def run(_):
            made.append(x)
            time.sleep(x * 1e-3)

        return run

    curve = scaling.Curve("naps against ms", "ms", "us", (2, 4, 8), start, seconds=0.0)
    found = scaling.milliseconds(curve, "cpu")
    assert set(made) == {2, 4, 8}
    assert all(x <= y < 4 * x for x, y in zip(curve.xs, found, strict=True))


@pytest.mark.parametrize("name", [name for name in scaling.NAMES if name != scaling.MEMORY])
def test_a_point_of_each_curve_runs(name):
    curve = scaling.curves("cpu", quick=True)[name]
    assert curve.xs == tuple(sorted(curve.xs))
    assert len(curve.xs) > 1
    result = curve.start(curve.xs[0])(None)
    if name.startswith("rollout"):
        # every token is paid for
        assert result.y.mask.all()
        assert result.y_other.mask.all()
        assert curve.xs[0] in result.y.tokens.shape
    else:
        assert result[0].isfinite().all()


def test_curves_of_memory_and_their_rows(monkeypatch, capsys):
    monkeypatch.setattr(scaling, "memory", lambda setting, name: float(setting.T))
    assert scaling.main(["--quick", "--json", "--only", "memory-T"]) == 0
    rows = json_rows(capsys.readouterr().out)
    assert [row["variant"] for row in rows] == ["nlhf", "plain loop"]
    for row in rows:
        assert row.keys() == {"kind", "title", "x", "xs", "y", "ys", "variant", "exponent"} | STAMP
        assert (row["kind"], row["x"], row["y"]) == ("scaling", "T", "MB")
        assert row["xs"] == row["ys"]
        assert row["exponent"] == pytest.approx(1.0)


def test_a_curve_of_memory_asks_for_a_step(monkeypatch):
    row = {"peak_mb": 30.0, "state_mb": 10.0, "variant": "nlhf", "note": ""}
    asked = []

    def ours(setting, names, steps):
        asked.append((setting.T, names, steps))
        return [row]

    monkeypatch.setattr(train_step, "ours", ours)
    assert scaling.memory(SMALL, "nlhf") == 20.0
    assert asked == [(4, ["nlhf"], 1)]
    row |= {"peak_mb": None, "note": "failed: it"}
    with pytest.raises(SystemExit, match="failed: it"):
        scaling.memory(SMALL, "nlhf")


def test_rows_are_saved(monkeypatch, tmp_path):
    path = tmp_path / "device.jsonl"
    monkeypatch.setattr(cli.rows, "results_file", lambda device: path)
    arguments = cli.Parser("x", "").parse(["--save"])
    out = cli.Rows(arguments)
    out.add({"kind": "a"})
    out.add({"kind": "b"})
    assert [row["kind"] for row in cli.rows.read(path)] == ["a", "b"]
    assert all("commit" in row for row in out.found)
