"""Preference models on tiny random trunks: exact antisymmetry, learning, folders, checks."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from nlhf import preference_fit
from nlhf.data import Preferences, read_preferences
from nlhf.preference import (
    CONFIG,
    JoinPrompt,
    PairwiseModel,
    RewardModel,
    as_preference,
    load_preference,
    load_trunk,
)
from nlhf.preference_fit import evaluate, fit, preference_loss

HANDS = ("rock", "paper", "scissors")
WORDS = ["<pad>", "<eos>", "<unk>", "<bos>", *HANDS, "good", "bad", "fine", "so", "it", "is"]
SHORT = "{prompt} {first} so {second}"


@pytest.fixture(scope="module")
def tokenizer():
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        bos_token="<bos>",
    )


def trunk(context=64, vocabulary=13):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=context,
        pad_token_id=0,
        bos_token_id=3,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config).eval()


def with_head(model):
    torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(1))
    return model


TEXTS = ["good", "bad it is", "it is so fine so good", "", "rock paper", "so so so"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [PairwiseModel, RewardModel])
@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_antisymmetry_is_exact(tokenizer, kind, pooling, dtype):
    model = with_head(kind(trunk().to(dtype), tokenizer, pooling=pooling, batch_size=3))
    # far from one half, where rounding could show
    model.head.weight.data.mul_(30)
    first, second = zip(*itertools.product(TEXTS, TEXTS), strict=True)
    prompts = ["it is", "rock so"] * 18
    p = model(prompts, list(first), list(second))
    q = model(prompts, list(second), list(first))
    assert p.dtype == torch.float32
    assert torch.equal(p + q, torch.ones(36))
    assert (p[[0, 7, 14]] == 0.5).all()
    assert (p - 0.5).abs().max() > 0.1
    assert not p.requires_grad


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_features_leave_out_pads_and_the_prepended_token(tokenizer, pooling):
    model = RewardModel(trunk(), tokenizer, pooling=pooling, n_layers=2, template="{response}")
    rows = [model.token_ids({"prompt": "", "response": text}) for text in TEXTS[:3]]
    together = model.features(rows)
    for row, got in zip(rows, together, strict=True):
        hidden = model.trunk(torch.tensor([row])).last_hidden_state[0]
        want = hidden[-1] if pooling == "last" else hidden[1:].mean(0)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert rows[0][0] == tokenizer.bos_token_id
    assert len(model.trunk.layers) == 2


def cycle():
    """Paper beats rock, scissors beat paper, rock beats scissors: 0.9 each."""
    beats = [("paper", "rock"), ("scissors", "paper"), ("rock", "scissors")]
    first, second = zip(*beats, strict=True)
    return Preferences(["it is"] * 3, list(first), list(second), [0.9] * 3)


def test_pairwise_learns_a_cycle_and_a_reward_cannot(tokenizer):
    pairs = cycle()
    pairwise = PairwiseModel(trunk(), tokenizer, template=SHORT)
    losses = fit(pairwise, pairs, epochs=150, lr=3e-3, batch_size=3)
    p = pairwise(*pairs.texts())
    torch.testing.assert_close(p, torch.full((3,), 0.9), rtol=0, atol=0.02)
    floor = -(0.9 * math.log(0.9) + 0.1 * math.log(0.1))
    assert losses[-1] == pytest.approx(floor, abs=0.01)

    reward = RewardModel(trunk(), tokenizer)
    fit(reward, pairs, epochs=150, lr=3e-3, batch_size=3)
    figures = evaluate(reward, pairs)
    assert figures["cross_entropy"] > math.log(2) - 1e-3
    # rewards add up around a cycle, whatever was learned
    logits = torch.logit(reward(*pairs.texts()))
    assert abs(logits.sum()) < 1e-4


def ladder():
    order = ["bad", "rock", "fine", "it", "good"]
    pairs = list(itertools.permutations(range(5), 2))
    q = [1 / (1 + math.exp(j - i)) for i, j in pairs]
    first, second = ([order[p[k]] for p in pairs] for k in (0, 1))
    return Preferences(["so"] * len(pairs), first, second, q)


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_frozen_reward_recovers_soft_labels(tokenizer, pooling):
    pairs = ladder()
    model = RewardModel(trunk(), tokenizer, freeze_trunk=True, pooling=pooling)
    before = [w.clone() for w in model.trunk.parameters()]
    fit(model, pairs, l2=1e-6)
    p = model(*pairs.texts())
    torch.testing.assert_close(p, torch.tensor(pairs.probability), rtol=0, atol=0.02)
    assert all(torch.equal(a, b) for a, b in zip(before, model.trunk.parameters(), strict=True))
    figures = evaluate(model, pairs, margins=(0.0, 0.3))
    assert figures["accuracy_0"] == figures["accuracy_0.3"] == 1.0
    assert figures["calibration_error"] < 0.02
    r = model.reward(["so"] * 5, ["bad", "rock", "fine", "it", "good"])
    torch.testing.assert_close(r.diff(), torch.ones(4), rtol=0, atol=0.15)


@pytest.mark.parametrize("frozen", [True, False])
def test_fit_is_deterministic(tokenizer, frozen):
    runs = []
    for _ in range(2):
        model = RewardModel(trunk(), tokenizer, freeze_trunk=frozen)
        fit(model, ladder(), epochs=2, batch_size=3, lr=1e-3, seed=5)
        runs.append(model.head.weight.clone())
        torch.rand(3)
    assert torch.equal(*runs)


class Snapshots:
    """A recorder that copies everything after every step."""

    def __init__(self):
        self.steps = []

    def restore(self, state, steps):
        pass

    def record(self, state, steps):
        tensors = {name: x.clone() for name, x in state.tensors().items() if name[0] != "r"}
        self.steps.append((tensors, state.metrics[-1], state.skipped_in_a_row))


def spoil(monkeypatch, bad, gradient):
    """Lets the steps of these numbers have a loss, or a gradient, that is not finite."""
    steps, whole = itertools.count(1), preference_fit.preference_loss

    def loss(logits, probability):
        value = whole(logits, probability)
        if next(steps) not in bad:
            return value
        # the square root of 0 has no finite gradient
        return value + (0 * logits.sum()).sqrt() if gradient else value * float("nan")

    monkeypatch.setattr(preference_fit, "preference_loss", loss)


@pytest.mark.parametrize("gradient", [False, True])
def test_a_step_that_is_not_finite_changes_nothing(tokenizer, monkeypatch, caplog, gradient):
    spoil(monkeypatch, {3, 5, 6}, gradient)
    model, kept = RewardModel(trunk(), tokenizer), Snapshots()
    options = {"epochs": 2, "batch_size": 5, "lr": 1e-3}
    losses = fit(model, ladder(), **options, max_skipped=2, recorder=kept)
    assert len(losses) == 5
    assert [row["skipped"] for _, row, _ in kept.steps] == [0, 0, 1, 1, 2, 3, 3, 3]
    assert [row.get("loss") for _, row, _ in kept.steps if "loss" in row] == losses
    assert [in_a_row for *_, in_a_row in kept.steps] == [0, 0, 1, 0, 1, 2, 0, 0]
    for step, (before, after) in enumerate(itertools.pairwise(kept.steps), start=2):
        same = all(torch.equal(x, after[0][name]) for name, x in before[0].items())
        assert same == (step in {3, 5, 6})
    why = "the norm of the gradient is nan" if gradient else "the loss is nan"
    assert [r.message for r in caplog.records] == [f"step {i} is skipped: {why}" for i in (3, 5, 6)]
    spoil(monkeypatch, {3, 4, 5}, gradient)
    with pytest.raises(ValueError, match=f"3 steps in a row were skipped, up to step 5: {why}"):
        fit(RewardModel(trunk(), tokenizer), ladder(), **options, max_skipped=2)
    spoil(monkeypatch, {1}, gradient)
    with pytest.raises(ValueError, match=f"fit: step 1: {why}; lower lr"):
        fit(RewardModel(trunk(), tokenizer), ladder(), **options)


def test_weights_that_are_lost_in_the_last_step_are_no_result(tokenizer, monkeypatch):
    model = RewardModel(trunk(), tokenizer)
    lose = model.head.weight.data.fill_
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: lose(math.inf))
    with pytest.raises(ValueError, match="the loss is not finite"):
        fit(model, ladder(), batch_size=100)
    with pytest.raises(ValueError, match="the preference of pair 2 is nan"):
        evaluate(lambda *texts: torch.tensor([0.5, 1.0, float("nan")]), cycle())


def test_soft_label_loss_and_measures():
    logits = torch.tensor([0.0, 2.0], requires_grad=True)
    loss = preference_loss(logits, torch.tensor([0.3, 0.6]))
    loss.backward()
    p = torch.sigmoid(logits.detach())
    torch.testing.assert_close(logits.grad, (p - torch.tensor([0.3, 0.6])) / 2)

    pairs = Preferences(["x"] * 4, ["a"] * 4, ["b"] * 4, [1.0, 0.6, 0.0, 1.0])
    figures = evaluate(as_preference(lambda *_: [0.9, 0.2, 0.2, 0.5]), pairs, margins=(0.0, 0.2))
    assert figures["accuracy_0"] == pytest.approx((1 + 0 + 1 + 0.5) / 4)
    assert figures["accuracy_0.2"] == pytest.approx((1 + 1 + 0.5) / 3)
    # bins of both orders: .9 and .1 miss by .1, the bins at .2 and .8 by .1, .5 by 0
    assert figures["calibration_error"] == pytest.approx((0.1 + 0.1 + 0.2 + 0.2) / 8)


@pytest.mark.parametrize("kind", [PairwiseModel, RewardModel])
@pytest.mark.parametrize("by_reference", [False, True])
def test_round_trip(tokenizer, tmp_path, kind, by_reference):
    base = tmp_path / "base"
    trunk().save_pretrained(base)
    tokenizer.save_pretrained(base)
    body, words = load_trunk(base)
    model = with_head(kind(body, words, n_layers=2, freeze_trunk=by_reference))
    texts = (["it is"] * 3, TEXTS[:3], TEXTS[2:5])
    folder = tmp_path / "saved"
    for _ in range(2):
        model.save_pretrained(folder, trunk_path=base if by_reference else None)
    assert (folder / "trunk").exists() != by_reference
    loaded = load_preference(folder)
    assert type(loaded) is kind
    assert loaded.settings == model.settings
    assert torch.equal(loaded(*texts), model(*texts))
    assert torch.equal(as_preference(str(folder))(*texts), model(*texts))

    joined = JoinPrompt(model, "so")
    joined.save_pretrained(tmp_path / "joined", trunk_path=base if by_reference else None)
    ends = (["it "] * 2, ["good", "is"], ["bad", "so"])
    whole = (["so"] * 2, ["it good", "it is"], ["it bad", "it so"])
    assert torch.equal(load_preference(tmp_path / "joined")(*ends), model(*whole))

    if by_reference:
        weights = base / "model.safetensors"
        weights.write_bytes(weights.read_bytes() + b" ")
        with pytest.raises(ValueError, match="moved or changed"):
            load_preference(folder)
    else:
        with pytest.raises(ValueError, match="needs a frozen trunk"):
            model.save_pretrained(folder, trunk_path=base)


def test_corrupt_folders(tokenizer, tmp_path):
    model = with_head(RewardModel(trunk(), tokenizer))

    def broken(name, change, words):
        folder = tmp_path / name
        model.save_pretrained(folder)
        change(folder)
        with pytest.raises(ValueError, match=words) as caught:
            load_preference(folder)
        assert "\n" not in str(caught.value)

    def config(folder, **changes):
        old = json.loads((folder / CONFIG).read_text())
        # as before there were hashes
        del old["sha256"]
        (folder / CONFIG).write_text(json.dumps(old | {"format": 1} | changes))

    broken("a", lambda f: (f / CONFIG).unlink(), "preference.json is missing")
    broken("b", lambda f: (f / CONFIG).write_text("{"), "preference.json is corrupt")
    broken("c", lambda f: config(f, kind="oracle"), "lacks or misstates 'oracle'")
    broken("d", lambda f: config(f, settings={"pool": 1}), "cannot be loaded: .*'pool'")
    weights = "trunk/model.safetensors"
    names = ("head.safetensors", "trunk/config.json", weights)
    for i, name in enumerate(names):
        broken(f"e{i}", lambda f, name=name: (f / name).unlink(), f"{name} is missing")
    broken("f", lambda f: (f / names[0]).write_bytes(b"x" * 40), f"{names[0]} has changed")
    broken(
        "i", lambda f: (f / weights).write_bytes((f / weights).read_bytes()[:999]), "has changed"
    )
    with pytest.raises(ValueError, match="holds no preference model"):
        as_preference(tmp_path / "nothing")

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(ValueError, match="something else"):
        model.save_pretrained(tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_long_texts(tokenizer):
    model = RewardModel(trunk(context=6), tokenizer)
    with pytest.raises(ValueError, match="7 tokens and the context 6"):
        model(["it is so"], ["good bad fine"], ["good"])
    model = RewardModel(trunk(context=6), tokenizer, truncate=True)
    ids = model.token_ids({"prompt": "rock it is so", "response": "good bad fine"})
    assert tokenizer.decode(ids[1:]) == "is so good bad fine"
    with pytest.raises(ValueError, match="shorten the responses"):
        model(["it"], ["good bad fine so it is"], ["good"])


def test_bad_settings(tokenizer):
    with pytest.raises(ValueError, match=r"template must contain \{prompt\}, \{first\}"):
        PairwiseModel(trunk(), tokenizer, template="{prompt}")
    with pytest.raises(ValueError, match="stray brace or field"):
        RewardModel(trunk(), tokenizer, template="{response} {other}")
    with pytest.raises(ValueError, match="pooling"):
        RewardModel(trunk(), tokenizer, pooling="max")
    with pytest.raises(ValueError, match="n_layers must be 1 to 3, got 4"):
        RewardModel(trunk(), tokenizer, n_layers=4)
    with pytest.raises(ValueError, match="the trunk embeds 5"):
        RewardModel(trunk(vocabulary=5), tokenizer)
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match="neither pad nor eos"):
        RewardModel(trunk(), bare)
    model = RewardModel(trunk(), tokenizer)
    with pytest.raises(ValueError, match="must have one length"):
        model(["a"], ["b"], [])
    with pytest.raises(ValueError, match="second must be strings, got list at index 1"):
        model(["a", "a"], ["b", "b"], ["c", []])
    with pytest.raises(ValueError, match="fit: the preferences are empty"):
        fit(model, Preferences([], [], [], []))
    with pytest.raises(ValueError, match="lr above 0"):
        fit(model, cycle(), lr=0.0)
    assert model([], [], []).shape == (0,)


def first_is_longer(prompts, first, second):
    """A callable that a test names as module:function."""
    return np.array([float(len(a) > len(b)) for a, b in zip(first, second, strict=True)])


def test_callables():
    texts = (["x"] * 3, ["aa", "b", "cc"], ["a", "bb", "c"])
    checked = as_preference(first_is_longer)
    assert checked(*texts).tolist() == [1.0, 0.0, 1.0]
    assert checked(*texts).dtype == torch.float32
    assert as_preference(checked) is checked
    assert as_preference(f"{__name__}:first_is_longer")(*texts).tolist() == [1.0, 0.0, 1.0]
    answers = {
        "got 1.5 at index 1": [0.0, 1.5, 2.0],
        "got nan at index 2": torch.tensor([0.0, 1.0, math.nan]),
        "got -0.1": [-0.1, 0.0, 0.0],
        r"must return \(3,\), got \(2,\)": [0.5, 0.5],
        r"got \(3, 1\)": np.zeros((3, 1)),
        "must return 3 numbers": ["a", "b", "c"],
        "must return 3 number": None,
    }
    for words, answer in answers.items():
        with pytest.raises(ValueError, match=words):
            as_preference(lambda *_, answer=answer: answer)(*texts)
    for source, words in {
        "no_such_module:f": "cannot be imported",
        f"{__name__}:no_such": "cannot be imported",
        "/no/such/folder": "holds no preference model",
        3: "must be a callable",
    }.items():
        with pytest.raises(ValueError, match=words):
            as_preference(source)


def test_real_pairs(tokenizer, real_pairs):
    pairs = read_preferences(real_pairs)
    pairs = pairs.select(range(0, len(pairs), 10))
    model = PairwiseModel(trunk(context=2048), tokenizer, freeze_trunk=True)
    losses = fit(model, pairs, l2=1e-4)
    assert losses[0] == pytest.approx(math.log(2))
    assert min(losses) < 0.68
    assert math.isfinite(evaluate(model, pairs)["cross_entropy"])
