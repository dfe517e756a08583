"""Losses without padding: equal to those of padded rows, and no sequence sees another."""

import itertools

import pytest
import torch
from transformers import AttentionInterface

from bench import fast_paths
from nlhf import learner, losses, memory, packing, parts, policy, responses
from nlhf.rollout import Completion, Pair
from tests import tiny
from tests.test_losses import gradients, made
from tests.test_train import folder, settings  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread")

MODELS = {
    "llama": tiny.llama,
    "llama, tied": lambda seed: tiny.llama(seed, tie_word_embeddings=True),
    "gpt2": tiny.gpt2,
    "gemma2": tiny.gemma2,
    "mistral": tiny.mistral,
    "lora": lambda seed: tiny.with_lora(tiny.llama(seed)),
}


def ragged(prompts=(3, 6, 2, 1, 5), lengths=(7, 1, 0, 4, 2), seed=0):
    """Prompts with responses of given lengths, and with ids under the mask that are none."""
    ids, attention_mask = tiny.prompts(list(prompts), seed)
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), 8)
    answers = []
    for rows in (list(lengths), list(lengths)[::-1]):
        mask = torch.arange(shape[1]) < torch.tensor(rows)[:, None]
        tokens = torch.randint(3, tiny.V, shape, generator=generator)
        known = torch.where(mask, -3 * torch.rand(shape, generator=generator).double(), 0)
        answers.append(Completion(tokens.where(mask, -100), mask, known, known - 0.1 * mask))
    preference = torch.linspace(0.1, 0.9, len(ids), dtype=torch.float64)
    return Pair(ids, attention_mask, *answers), preference


def close(found, expected, name):
    tolerance = {"rtol": 1e-3, "atol": 1e-4} if name == "gemma2" else {"rtol": 0, "atol": 1e-9}
    torch.testing.assert_close(found, expected, **tolerance)


@pytest.mark.parametrize("kl", ["reward_to_go", "sequence", "token", "exact"])
@pytest.mark.parametrize("head", ["logits", "fused"])
@pytest.mark.parametrize("name", MODELS)
def test_loss_gradient_and_statistics_are_those_of_padded_rows(name, head, kl):
    model = MODELS[name](0)
    ref = None if name == "lora" else MODELS[name](1)
    pair, preference = ragged()
    unknown = Completion(pair.y.tokens, pair.y.mask)
    for y in (pair.y, unknown):
        either = Pair(pair.input_ids, pair.attention_mask, y, pair.y_other)
        found = []
        for packed in (False, True):
            with memory.untied(model), memory.recomputing(model, packed):
                result = losses.nash_md_pg(
                    model, ref, either, preference, tau=0.1, kl=kl, head=head, packing=packed
                )
            found.append((result, gradients(model, result.loss)))
        close(found[1], found[0], name)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "lora"])
def test_pair_losses_and_anchors_are_those_of_padded_rows(name):
    model = MODELS[name](0)
    pair, preference = ragged()
    found = []
    for packed in (False, True):
        both = (pair.y, pair.y_other)
        anchor = tuple(losses.frozen_logprobs(model, pair, y, 0.7, packing=packed) for y in both)
        assert (anchor[0][~pair.y.mask] == 0).all()
        result = losses.contrast(
            model, pair, preference, method="online_ipo", tau=0.1, anchors=[anchor], packing=packed
        )
        found.append((result, anchor, gradients(model, result.loss)))
    close(found[1], found[0], name)


def test_several_anchors_and_a_policy_without_a_reference():
    model, ref = tiny.llama(0), tiny.llama(1)
    pair, preference = ragged()
    anchors = [(pair.y.policy_logprobs - 0.3, 0.05)]
    without = Completion(pair.y.tokens, pair.y.mask)
    alone = Pair(pair.input_ids, pair.attention_mask, without, pair.y_other)
    found = [
        (
            losses.nash_md_pg(
                model, ref, pair, preference, tau=0.1, anchors=anchors, packing=packed
            ),
            losses.nash_md_pg(model, None, alone, preference, tau=0.0, packing=packed),
        )
        for packed in (False, True)
    ]
    assert found[1][1].kl.shape == (0,)
    close(found[1], found[0], "llama")


def test_responses_without_a_token():
    model, ref = tiny.llama(0), tiny.llama(1)
    pair, preference = ragged(lengths=(0, 0, 0, 0, 0))
    for head in ("logits", "fused"):
        result = losses.nash_md_pg(model, ref, pair, preference, tau=0.1, head=head, packing=True)
        assert result.loss == 0
        assert result.logprobs.shape == pair.y.tokens.shape
        result.loss.backward()


def test_a_model_sees_no_padding():
    model, pair = tiny.llama(0), ragged()[0]
    packing.check(model, torch.device("cpu"))
    seen = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True
    )
    reading = responses.read(model, pair, pair.y, "fused", packed=True)
    (kwargs,) = seen
    tokens = pair.attention_mask.sum() + (pair.y.mask.sum(-1) - 1).clamp(min=0).sum()
    assert kwargs["input_ids"].shape == (1, tokens)
    assert kwargs["attention_mask"] is None
    assert (kwargs["position_ids"] == 0).sum() == len(pair.input_ids)
    assert reading.x.shape == (pair.y.mask.sum(), 16)


def by_hand(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Attention inside of each sequence: what flash-attn's varlen kernels compute."""
    assert attention_mask is None
    starts = kwargs["cu_seq_lens_q"].tolist()
    assert torch.equal(kwargs["cu_seq_lens_q"], kwargs["cu_seq_lens_k"])
    assert kwargs["cu_seq_lens_q"].dtype == torch.int32
    longest = max(b - a for a, b in itertools.pairwise(starts))
    assert kwargs["max_length_q"] == kwargs["max_length_k"] == longest
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    pieces = [
        torch.nn.functional.scaled_dot_product_attention(
            *(x[:, :, a:b] for x in (query, key, value)), is_causal=True, scale=scaling
        )
        for a, b in itertools.pairwise(starts)
    ]
    return torch.cat(pieces, 2).transpose(1, 2), None


def test_flash_attention_is_told_where_sequences_start(monkeypatch):
    """A stand-in for its kernels, which need a GPU: what it is given must be enough."""
    monkeypatch.setitem(AttentionInterface._global_mapping, "flash_attention_2", by_hand)
    model, ref = tiny.llama(0), tiny.llama(1)
    pair, preference = ragged()
    expected = losses.nash_md_pg(model, ref, pair, preference, tau=0.1)
    wanted = gradients(model, expected.loss)
    model.config._attn_implementation = "flash_attention_2"
    result = losses.nash_md_pg(model, ref, pair, preference, tau=0.1, packing=True)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(gradients(model, result.loss), wanted, rtol=0, atol=1e-9)


def mamba(seed=0):
    return tiny._build(
        "Mamba", seed, torch.float32, hidden_size=16, num_hidden_layers=2, state_size=4
    )


def convolving(seed=0):
    """A layer of short convolutions before one of attention."""
    sizes = tiny.llama().config.to_dict()
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    kinds = ["conv", "full_attention"]
    sizes = {name: sizes[name] for name in names} | {"layer_types": kinds, "num_hidden_layers": 2}
    return tiny._build("Lfm2", seed, torch.float32, **sizes)


@pytest.mark.parametrize("build", [mamba, convolving])
def test_layers_with_a_state_are_refused(build):
    model = build()
    pair, preference = ragged()
    for _ in range(2):
        with pytest.raises(ValueError, match=r"packing: \w+ lets one sequence .* set packing"):
            losses.nash_md_pg(model, model, pair, preference, tau=0.1, packing=True)


@pytest.mark.parametrize("head", ["logits", "fused"])
@pytest.mark.parametrize("name", ["llama, tied", "lora"])
def test_a_row_of_too_many_tokens_becomes_a_few(name, head, monkeypatch):
    model = MODELS[name](0)
    ref = None if name == "lora" else MODELS[name](1)
    pair, preference = ragged()
    found, calls = [], []
    model.register_forward_hook(lambda *_: calls.append(1))
    for most in (1000, 9, 1):
        monkeypatch.setitem(packing.MOST, "cpu", most)
        losses.frozen_logprobs(model, pair, pair.y, 1.0, packing=True)
        calls.clear()
        with memory.untied(model):
            result = losses.nash_md_pg(
                model, ref, pair, preference, tau=0.1, head=head, packing=True
            )
        found.append((result, gradients(model, result.loss), len(calls)))
    # 10, 7, 2, 5 and 7 tokens
    assert [calls for *_, calls in found] == [1, 4, 5]
    for other in found[1:]:
        close(other[:2], found[0][:2], name)


class Counting(type(tiny.gpt2())):
    """Positions of its own making, from the beginning of the row."""

    def forward(self, *args, position_ids, **kwargs):
        own = torch.arange(position_ids.shape[1])[None]
        # the mask is still that of the sequences
        starts = (position_ids == 0).long().cumsum(-1) - 1
        return super().forward(*args, position_ids=own + 2 * starts, **kwargs)


def test_positions_that_do_not_start_anew_are_refused():
    model = Counting(tiny.gpt2().config).double().eval()
    model.load_state_dict(tiny.gpt2().state_dict())
    with pytest.raises(ValueError, match="otherwise than alone; set packing: false"):
        packing.check(model, torch.device("cpu"))


def test_a_changed_token_changes_no_other_sequence():
    model = tiny.mistral(0)
    ids = torch.randint(3, tiny.V, (1, 30))
    positions = torch.cat([torch.arange(n) for n in (11, 8, 11)])[None]
    other = ids.clone()
    other[0, 12] = (other[0, 12] + 1) % tiny.V
    a, b = (policy.last_logits(model, x, None, positions, 30)[0] for x in (ids, other))
    changed = (a != b).any(-1)
    assert changed[12:19].any()
    assert not changed[:12].any()
    assert not changed[19:].any()


def test_a_step_of_the_trainer_is_the_same(folder, tmp_path):  # noqa: F811
    """With anchors beside the reference, and in micro-batches."""
    found = []
    for changes in ({"head": "logits"}, {"head": "fused", "packing": True}):
        chosen = {"algorithm": "mnpo", "eta": 1.0, "inner_steps": 1, "dtype": "float64"}
        chosen |= {"micro_batch_size": 3, "eval_prompts": ""} | changes
        pieces = parts.build(settings(folder, tmp_path, **chosen))
        learns = learner.Learner(pieces)
        steps = [learns.step(step) for step in range(2)]
        found.append([
            {k: v for k, v in step.items() if "seconds" not in k and "per_second" not in k}
            for step in steps
        ])  # fmt: skip
    assert found[1] == [pytest.approx(step, rel=1e-9) for step in found[0]]


def test_the_bench_of_it_runs(capsys, monkeypatch):
    monkeypatch.setattr(fast_paths, "V", tiny.V)
    monkeypatch.setattr(fast_paths, "model", lambda: tiny.llama(0, torch.float32))
    fast_paths.packing_table((("tiny", 3, 16, 2),))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[5] for line in lines[2:]] == ["logits", "fused"]
    fast_paths.head_table(2, 3, 4)
    assert len(capsys.readouterr().out.splitlines()) == 6


def test_rollouts_of_their_own_give_the_log_probabilities_that_they_said():
    model = tiny.with_lora(tiny.llama(0))
    pair, _ = made(model, None, temperature=0.8)
    for packed in (False, True):
        scored = losses.score(model, None, pair, pair.y, 0.8, packing=packed)
        torch.testing.assert_close(scored[0], pair.y.policy_logprobs)
        torch.testing.assert_close(scored[1], pair.y.ref_logprobs)
