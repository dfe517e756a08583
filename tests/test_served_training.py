"""Training on what a server drew: a whole run, and a step whose weights are worked out by hand."""

import dataclasses
import math

import pytest
import torch

import nlhf_kernels as nk
from nlhf import http, learner, losses, parts, rollout, train
from tests import serving as local
from tests import tiny
from tests.serving import chat, explicit
from tests.test_train import folder, metrics, settings  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread")


def judged(path, body):
    """More even words win."""

    def even(text):
        found = text.split()
        return sum(int(w[1:]) % 2 == 0 for w in found) / max(len(found), 1)

    _, first, second = local.texts_of(body)
    p = 1 / (1 + math.exp(-6 * (even(first) - even(second))))
    return chat("A" if p > 0.5 else "B", {"A": math.log(p), "B": math.log1p(-p)})


@pytest.fixture
def engine(folder):  # noqa: F811
    model = tiny.llama(dtype=torch.float32)
    with local.serve(local.Engine(model, logprobs="raw")) as server:
        yield server


def test_a_run_with_a_server_and_a_judge(folder, tmp_path, engine):  # noqa: F811
    """y from the engine, y' from here, P from the judge, weights for what the engine has drawn."""
    with local.serve(judged) as judge:
        path = tmp_path / "judge.yaml"
        path.write_text(
            f"url: {judge.url}\nmodel: toy\ntemplate: '{{prompt}}|{{first}}|{{second}}'\n"
            f"cache: {tmp_path / 'cache.db'}\n"
        )
        chosen = settings(
            folder,
            tmp_path / "run",
            preference=str(path),
            server=engine.url,
            importance="sequence",
            steps=3,
            eval_every=0,
            eval_samples=2,
            report_samples=8,
        )
        train.run(chosen)
        # eight prompts a step, and nothing of the report
        assert len(engine.seen) == 3 * 8
        paid = len(judge.seen)
        assert paid > 0
        # once more is the same run, and no answer of the judge is paid for twice
        train.run(dataclasses.replace(chosen, output=str(tmp_path / "again")))
        assert len(judge.seen) == paid
    assert metrics(tmp_path / "run") == metrics(tmp_path / "again")
    rows = metrics(tmp_path / "run")
    assert len(rows) == 3
    # before the first update the engine has the policy's own weights
    assert rows[0]["importance_mean"] == pytest.approx(1, abs=1e-4)
    assert rows[0]["importance_ess"] == pytest.approx(1, abs=1e-4)
    assert rows[0]["importance_bias_bound"] < 1e-4
    assert rows[2]["importance_ess"] < 0.9999
    assert rows[2]["importance_max"] > 1.001
    for row in rows:
        assert 0 <= row["importance_truncated"] <= 1
        assert 0 < row["preference"] < 1


def step_gradient(folder, tmp_path, name, **changes):  # noqa: F811
    chosen = settings(
        folder, tmp_path / name, eval_prompts="", lora_r=0, max_grad_norm=0.0, tau=0.1, **changes
    )
    pieces = parts.build(chosen)
    learn = learner.Learner(pieces)
    kept = {}

    def update(step):
        kept.update({n: p.grad.clone() for n, p in pieces.policy.named_parameters()})
        return torch.ones(())

    learn.update = update
    row = learn.step(0)
    return pieces, row, kept


@pytest.mark.parametrize("algorithm", ["nash_md_pg", "self_play", "best_response"])
def test_y_comes_from_the_server_and_mixtures_from_here(folder, tmp_path, engine, algorithm):  # noqa: F811
    pieces, _, _ = step_gradient(
        folder, tmp_path, "a", server=engine.url, algorithm=algorithm, importance="sequence"
    )
    sides = 2 if algorithm == "self_play" else 1
    assert len(engine.seen) == 8 * sides
    seeds = [body["seed"] for body in engine.bodies()]
    assert len(set(seeds)) == len(seeds)
    # measurements are of the policy itself, never of what is served
    draw = parts.seeds(0, -1, [0, 1], pieces.device)
    pieces.generate_pair(["w1 w2", "w3"], draw, mixture_coef=0.0)
    assert len(engine.seen) == 8 * sides


def test_served_responses_carry_what_policy_and_reference_say_of_them(folder, tmp_path, engine):  # noqa: F811
    chosen = settings(
        folder, tmp_path / "run", server=engine.url, micro_batch_size=3, mixture_coef=0.0
    )
    pieces = parts.build(chosen)
    prompts = pieces.prompts[:5]
    draw = parts.seeds(0, 0, list(range(5)), pieces.device)
    sides = [rollout.Side(pieces.policy), rollout.Side(pieces.policy, 0.0, 2)]
    pair, _ = pieces.generate(prompts, [sides[0], sides[0], sides[1]], draw, served=True)
    more = pieces.generate(prompts, [sides[0], sides[0], sides[1]], draw, served=True)[1][0]
    assert len(more.tokens) == 10
    assert not torch.equal(pair.y.tokens, pair.y_other.tokens)
    ids, mask = pieces.encode(prompts)
    policy, base = pieces.policy, tiny.llama(dtype=torch.float32)
    for y, n in ((pair.y, 1), (pair.y_other, 1), (more, 2)):
        for model, found in ((policy, y.policy_logprobs), (base, y.ref_logprobs)):
            wanted = explicit(model, ids, mask, y, 1.0, n)
            torch.testing.assert_close(found.double(), wanted, atol=1e-4, rtol=1e-4)


def test_a_stale_server_is_corrected(folder, tmp_path):  # noqa: F811
    """The step's gradient is that of the weighted sum over what the server drew."""
    stale = tiny.llama(seed=0, dtype=torch.float32)
    with torch.no_grad():
        for parameter in stale.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape))
    with local.serve(local.Engine(stale, logprobs="raw")) as server:
        changes = {"server": server.url, "importance": "sequence", "importance_cap": 1.3}
        pieces, row, found = step_gradient(folder, tmp_path, "a", micro_batch_size=3, **changes)
        with pytest.raises(ValueError, match="apart on average, more than max_logp_difference"):
            step_gradient(folder, tmp_path, "c", server=server.url)
        changes = {"server": server.url, "max_logp_difference": 1.0}
        _, plain, uncorrected = step_gradient(folder, tmp_path, "b", **changes)
        ids = learner.prompt_ids(0, 0, 8, len(pieces.prompts))
        prompts = [pieces.prompts[i % len(pieces.prompts)] for i in ids]
        draw = parts.seeds(0, 0, ids, pieces.device)
        sides = [rollout.Side(pieces.policy), rollout.Side(pieces.policy, 0.125)]
        pair, _ = pieces.generate(prompts, sides, draw, served=True, check=True)
    y = pair.y
    texts = [pieces.decode(x) for x in (y, pair.y_other)]
    wins = pieces.preference(parts.plain(prompts), *texts)
    log_ratio = (y.policy_logprobs - y.sampling_logprobs).sum(-1)
    weights = log_ratio.exp().clamp(max=1.3)
    assert 0 < (log_ratio > math.log(1.3)).sum() < 8
    model = pieces.policy
    model.zero_grad()
    logits = losses.response_logits(model, pair, y)
    logs = nk.token_logprobs(logits, y.tokens, mask=y.mask).logprobs
    ell = (logs - y.ref_logprobs).detach() * y.mask
    total = 0.0
    for b in range(8):
        for n in range(int(y.mask[b].sum())):
            advantage = wins[b] - 0.5 - 0.1 * ell[b, n:].sum()
            total = total - weights[b] * advantage * logs[b, n] / 8
    total.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, atol=1e-5, rtol=1e-4)
    assert any((found[n] - uncorrected[n]).abs().max() > 1e-3 for n in found)
    assert row["importance_mean"] == pytest.approx(float(weights.mean()), rel=1e-4)
    assert row["importance_truncated"] == pytest.approx(
        float((log_ratio > math.log(1.3)).double().mean())
    )
    assert not any(name.startswith("importance") for name in plain)


@pytest.mark.parametrize(("algorithm", "both"), [("self_play", True), ("nash_md_pg", False)])
def test_where_the_server_draws_both_the_pair_is_weighted(folder, tmp_path, algorithm, both):  # noqa: F811
    stale = tiny.llama(seed=0, dtype=torch.float32)
    with torch.no_grad():
        stale.lm_head.weight.add_(0.05 * torch.randn(stale.lm_head.weight.shape))
    with local.serve(local.Engine(stale, logprobs="raw")) as server:
        changes = {"algorithm": algorithm, "server": server.url, "importance": "sequence"}
        # another reference, so that a mixture with it is not the policy
        tiny.llama(seed=1, dtype=torch.float32).save_pretrained(tmp_path / "ref")
        changes["ref"] = str(tmp_path / "ref")
        pieces, row, _ = step_gradient(folder, tmp_path, "a", **changes)
        learn = learner.Learner(pieces)
        ids = learner.prompt_ids(0, 0, 8, len(pieces.prompts))
        prompts = [pieces.prompts[i % len(pieces.prompts)] for i in ids]
        pair, _ = learn.generate(learn.algorithm.phases[0], prompts, ids, 0)
    logs = [(y.policy_logprobs - y.sampling_logprobs).sum(-1) for y in (pair.y, pair.y_other)]
    ratios = (logs[0] + both * logs[1]).exp()
    assert row["importance_max"] == pytest.approx(float(ratios.max()), rel=1e-4)
    assert row["importance_mean"] == pytest.approx(float(ratios.clamp(max=2).mean()), rel=1e-4)
    assert logs[1].abs().max() > 0.01


def test_a_run_may_go_on_with_a_server_somewhere_else(folder, tmp_path, engine):  # noqa: F811
    chosen = settings(
        folder, tmp_path / "run", server=engine.url, steps=2, eval_every=0, eval_prompts=""
    )
    train.run(chosen)
    train.run(dataclasses.replace(chosen, server="http://127.0.0.1:9"), resume=True)


def test_a_server_that_is_down_is_one_line(folder, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(http, "_LONGEST_WAIT", 0.01)
    chosen = settings(folder, tmp_path / "run", server="http://127.0.0.1:9/v1", steps=1)
    with pytest.raises(ValueError, match=r"server http://127.0.0.1:9: no connection"):
        train.run(chosen)
