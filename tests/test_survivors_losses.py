"""What mutants of ``nlhf.losses`` got past every other test."""

from types import SimpleNamespace

import pytest
import torch

import nlhf_kernels as nk
from nlhf import losses
from nlhf.rollout import Completion, Pair
from tests import tiny
from tests.test_losses import made
from tests.test_rollout import shapes_of_calls

pytestmark = pytest.mark.usefixtures("one_thread")

LLAMA, OTHER = tiny.llama(0), tiny.llama(1)
# drawn at temperature 1, so its log-probabilities are those of the models as they are
PAIR, WINS = made(LLAMA, OTHER)
ANCHOR = (PAIR.y.ref_logprobs, PAIR.y_other.ref_logprobs)
IPO = {"method": "online_ipo", "tau": 0.1}


def test_the_temperature_is_1_where_none_is_given():
    for found in (
        losses.nash_md_pg(LLAMA, OTHER, PAIR, WINS, tau=0.1).logprobs,
        losses.contrast(LLAMA, PAIR, WINS, anchors=[ANCHOR], **IPO).logprobs,
        losses.score(LLAMA, OTHER, PAIR, PAIR.y)[0],
    ):
        torch.testing.assert_close(found, PAIR.y.policy_logprobs)


def test_a_contrast_is_the_op_on_the_sums_of_both_responses():
    result = losses.contrast(LLAMA, PAIR, WINS, anchors=[ANCHOR], **IPO)
    y, other = PAIR.y, PAIR.y_other
    wanted = nk.pair_loss(
        y.policy_logprobs.sum(1),
        other.policy_logprobs.sum(1),
        y.ref_logprobs.sum(1)[None],
        other.ref_logprobs.sum(1)[None],
        WINS,
        **IPO,
    )
    torch.testing.assert_close(result.loss, wanted.loss)
    torch.testing.assert_close(result.margins, wanted.margins)
    torch.testing.assert_close(result.kl, y.policy_logprobs - y.ref_logprobs)
    parts = (result.logprobs, result.ref_logprobs, result.entropy, result.kl, result.margins)
    assert not any(x.requires_grad for x in parts)
    assert (result.entropy[y.mask] > 0).all()


def test_an_anchor_of_a_contrast_is_of_both_responses():
    with pytest.raises(ValueError, match="shorter"):
        losses.contrast(LLAMA, PAIR, WINS, anchors=[ANCHOR, ANCHOR[:1]], **IPO)


@pytest.mark.parametrize("packing", [None, True])
def test_a_contrast_reads_padded_rows_unless_packing_is_on(packing):
    model = tiny.llama(0)
    shapes = shapes_of_calls(model)
    more = {} if packing is None else {"packing": packing}
    losses.contrast(model, PAIR, WINS, anchors=[ANCHOR], **IPO, **more)
    assert {rows for rows, _ in shapes} == ({1} if packing else {len(WINS)})


@pytest.mark.parametrize("more", [{}, {"inplace_backward": False}])
def test_a_contrast_writes_its_gradient_over_the_logits_unless_it_must_not(more):
    model, seen = tiny.llama(0), []
    model.register_forward_hook(lambda _, args, output: seen.append(output.logits))
    result = losses.contrast(model, PAIR, WINS, anchors=[ANCHOR], head="logits", **IPO, **more)
    before = [x.detach().clone() for x in seen]
    result.loss.backward()
    same = [torch.equal(x.detach(), y) for x, y in zip(seen, before, strict=True)]
    assert same == [bool(more)] * 2


def test_the_reference_is_packed_too_where_its_log_probabilities_are_missing():
    ref = tiny.llama(1)
    shapes = shapes_of_calls(ref)
    y = Completion(PAIR.y.tokens, PAIR.y.mask)
    pair = Pair(PAIR.input_ids, PAIR.attention_mask, y, PAIR.y_other)
    result = losses.nash_md_pg(LLAMA, ref, pair, WINS, tau=0.1, packing=True)
    torch.testing.assert_close(result.ref_logprobs, PAIR.y.ref_logprobs)
    assert {rows for rows, _ in shapes} == {1}


def test_anchors_need_the_log_probabilities_of_a_reference():
    anchors = [(PAIR.y.policy_logprobs, 0.1)]
    with pytest.raises(ValueError, match="anchors need a reference, and kl other than 'exact'"):
        losses.nash_md_pg(LLAMA, OTHER, PAIR, WINS, tau=0.1, kl="exact", anchors=anchors)


def test_preferences_are_taken_to_the_device_of_the_tokens():
    asked = []

    def to(device):
        asked.append(device)
        return WINS

    elsewhere = SimpleNamespace(to=to)
    losses.nash_md_pg(LLAMA, OTHER, PAIR, elsewhere, tau=0.1)
    losses.contrast(LLAMA, PAIR, elsewhere, anchors=[ANCHOR], **IPO)
    assert asked == [PAIR.y.tokens.device] * 2


FROZEN = {
    "frozen_logprobs": lambda m, **more: losses.frozen_logprobs(m, PAIR, PAIR.y, 1.0, **more),
    "score": lambda m, **more: losses.score(m, OTHER, PAIR, PAIR.y, **more)[0],
    "ref_logits": lambda m, **more: losses.ref_logits(LLAMA, m, PAIR, PAIR.y, **more),
}


@pytest.mark.parametrize("name", FROZEN)
def test_what_is_frozen_is_read_in_padded_rows_without_a_graph_or_dropout(name):
    model = tiny.gpt2(0, attn_pdrop=0.5, resid_pdrop=0.5).train()
    shapes, graphs = shapes_of_calls(model), []
    model.register_forward_hook(lambda *_: graphs.append(torch.is_grad_enabled()))
    first, second = (FROZEN[name](model) for _ in range(2))
    assert torch.equal(first, second)
    assert graphs == [False] * 2
    assert {rows for rows, _ in shapes} == {len(WINS)}
    assert model.training
    assert not first.requires_grad
    if name != "ref_logits":
        torch.testing.assert_close(FROZEN[name](model, packing=True), first)
        assert shapes[-1][0] == 1


def test_a_score_is_of_the_reference_that_is_given_and_not_of_the_base():
    model = tiny.with_lora(tiny.llama(2))
    shapes = shapes_of_calls(model)
    for ref, base in ((OTHER, OTHER), (None, tiny.llama(2))):
        wanted = losses.frozen_logprobs(base, PAIR, PAIR.y, 1.0)
        torch.testing.assert_close(losses.score(model, ref, PAIR, PAIR.y)[1], wanted)
        shapes.clear()
        packed = losses.score(model, ref, PAIR, PAIR.y, packing=True)
        torch.testing.assert_close(packed[1], wanted)
        # packed, rows of policy and reference cannot be told from each other
        assert {rows for rows, _ in shapes} == {1}


@pytest.mark.parametrize("head", ["logits", "fused"])
def test_every_reading_takes_hidden_states_or_logits_as_it_is_told(head):
    model, ref, adapted = tiny.llama(0), tiny.llama(1), tiny.with_lora(tiny.llama(0))
    rows = []
    for one in (model, ref, adapted.base_model.model):
        one.lm_head.register_forward_hook(lambda *_: rows.append(1))
    y = Completion(PAIR.y.tokens, PAIR.y.mask)
    pair = Pair(PAIR.input_ids, PAIR.attention_mask, y, PAIR.y_other)
    readings = {
        "exact": (
            lambda: losses.nash_md_pg(model, ref, pair, WINS, tau=0.1, kl="exact", head=head),
            2,
        ),
        "first": (lambda: losses.nash_md_pg(model, ref, pair, WINS, tau=0.1, head=head), 2),
        "pair": (lambda: losses.contrast(model, PAIR, WINS, anchors=[ANCHOR], head=head, **IPO), 2),
        "frozen": (lambda: losses.frozen_logprobs(model, PAIR, y, 1.0, head=head), 1),
        "score": (lambda: losses.score(model, ref, PAIR, y, head=head), 2),
        "base": (lambda: losses.score(adapted, None, PAIR, y, head=head), 1),
    }
    for name, (reading, count) in readings.items():
        rows.clear()
        reading()
        # the model's own head runs for logits alone
        assert len(rows) == (count if head == "logits" else 0), name


def test_logits_of_a_response_are_those_that_its_tokens_were_drawn_from():
    y = PAIR.y
    for logits, wanted in (
        (losses.response_logits(LLAMA, PAIR, y), y.policy_logprobs),
        (losses.ref_logits(LLAMA, OTHER, PAIR, y), y.ref_logprobs),
    ):
        assert logits.shape == (*y.tokens.shape, tiny.V)
        found = logits.log_softmax(-1).gather(-1, y.tokens[..., None])[..., 0]
        torch.testing.assert_close(found[y.mask], wanted[y.mask])
    assert losses.response_logits(LLAMA, PAIR, y).requires_grad


def test_policy_and_base_are_scored_in_one_batch_without_a_graph():
    model, graphs = tiny.with_lora(tiny.llama(0)), []
    model.register_forward_hook(lambda *_: graphs.append(torch.is_grad_enabled()))
    losses.score(model, None, PAIR, PAIR.y)
    assert graphs == [False]


@pytest.mark.parametrize("kl", ["exact", "reward_to_go"])
def test_the_reference_has_neither_a_graph_nor_a_gradient(kl):
    ref, graphs = tiny.llama(1), []
    ref.register_forward_hook(lambda *_: graphs.append(torch.is_grad_enabled()))
    y = Completion(PAIR.y.tokens, PAIR.y.mask)
    pair = Pair(PAIR.input_ids, PAIR.attention_mask, y, y)
    losses.nash_md_pg(tiny.llama(0), ref, pair, WINS, tau=0.1, kl=kl).loss.backward()
    assert graphs == [False]
    assert all(x.grad is None for x in ref.parameters())
