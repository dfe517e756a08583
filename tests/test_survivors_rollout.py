"""What mutants of ``nlhf.rollout`` got past every other test."""

import contextlib

import pytest
import torch

import nlhf_kernels as nk
from nlhf import rollout
from nlhf.rollout import Completion, Side
from tests import tiny
from tests.test_decoding import Emulated, plain_and_recorded
from tests.test_rollout import EOS, agree, shapes_of_calls

pytestmark = pytest.mark.usefixtures("one_thread")

BATCH = tiny.prompts([3, 5])
SHORT = {"max_new_tokens": 4, "eos_token_id": EOS, "seed": 5}


def test_the_reference_of_several_models_is_the_base_of_the_first_that_has_one():
    plain, model = tiny.gpt2(1), tiny.with_lora(tiny.llama(0))
    sides = [Side(plain, 0.5), Side(model, 0.5)]
    answers = rollout.generate(sides, None, *BATCH, **SHORT)
    agree(answers, sides, tiny.llama(0), *BATCH, 5, 4)


def test_every_draw_is_checked_where_that_is_asked_for(monkeypatch):
    checked = []
    sample = nk.mixture_sample

    def seen(*args, **settings):
        checked.append(settings["check"])
        return sample(*args, **settings)

    monkeypatch.setattr(nk, "mixture_sample", seen)
    for check, wanted in (({}, False), ({"check": True}, True)):
        checked.clear()
        rollout.generate([Side(tiny.llama(0))], None, *BATCH, with_ref=False, **SHORT, **check)
        assert checked
        assert set(checked) == {wanted}


def test_a_recording_cannot_wait_for_other_processes():
    with pytest.raises(ValueError, match="cuda_graphs cannot wait for others"):
        rollout.generate(
            [Side(tiny.llama(0))],
            None,
            *BATCH,
            with_ref=False,
            cuda_graphs=Emulated(),
            together=lambda more: more,
            **SHORT,
        )


def test_a_model_runs_as_often_as_others_need_it():
    model, asked = tiny.llama(0), []
    shapes = shapes_of_calls(model)
    settings = SHORT | {"max_new_tokens": 9, "eos_token_id": list(range(tiny.V))}
    alone = rollout.generate([Side(model)], None, *BATCH, with_ref=False, **settings)
    assert len(shapes) == 1
    shapes.clear()

    def together(more):
        asked.append(more)
        return len(asked) < 5

    waited = rollout.generate(
        [Side(model)], None, *BATCH, with_ref=False, together=together, **settings
    )
    # every row ends with its first token here, and elsewhere one with its fifth
    assert asked == [False] * 5
    assert len(shapes) == 5
    assert torch.equal(waited[0].tokens, alone[0].tokens)


def test_with_adapters_as_their_own_reference_a_step_is_recorded_anew():
    model, graphs = tiny.with_lora(tiny.llama(0)), Emulated()
    for ref in (None, model):
        answers = plain_and_recorded([Side(model, 0.5)], ref, BATCH, graphs)[0]
        off = (answers.policy_logprobs - answers.ref_logprobs).abs().max()
        assert (off > 0.1) == (ref is None)


def test_a_tensor_that_is_refused_is_described():
    tokens = torch.zeros(2, 3, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"must be int64 \(R, T\), got int32 \(2, 3\) on cpu$"):
        Completion(tokens, tokens > 0)


def test_one_token_is_a_response():
    settings = SHORT | {"max_new_tokens": 1}
    y = rollout.generate([Side(tiny.llama(0))], None, *BATCH, with_ref=False, **settings)[0]
    assert y.tokens.shape == (2, 1)
    assert y.mask.all()


def test_a_hole_in_the_middle_of_a_prompt_is_refused():
    ids, mask = tiny.prompts([5, 6])
    mask[0, 3] = 0
    with pytest.raises(ValueError, match="prompt 0 must be padded to the left, got a 0 after a 1"):
        rollout.generate([Side(tiny.llama(0))], None, ids, mask, with_ref=False, **SHORT)


@pytest.mark.parametrize(
    ("word", "known"), [(0, True), (-1, False), (tiny.V - 1, True), (tiny.V, False)]
)
def test_every_word_of_the_vocabulary_may_stand_in_a_prompt_and_no_other(word, known):
    ids, mask = tiny.prompts([3, 5])
    ids[1, 2] = word
    refused = pytest.raises(ValueError, match=rf"input_ids must be in \[0, {tiny.V}\), got")
    with contextlib.nullcontext() if known else refused:
        rollout.generate([Side(tiny.llama(0))], None, ids, mask, with_ref=False, **SHORT)


def test_prompt_and_response_must_fit_and_may_fill_the_context():
    model = tiny.llama(0, max_position_embeddings=8)
    for count, refused in ((3, False), (4, True)):
        settings = SHORT | {"max_new_tokens": count, "with_ref": False}
        wanted = pytest.raises(ValueError, match="over the context of 8; shorten one of the two")
        with wanted if refused else contextlib.nullcontext():
            rollout.generate([Side(model)], None, *BATCH, **settings)


def test_models_must_have_one_vocabulary_and_be_where_the_prompts_are():
    larger = tiny.llama(1, vocab_size=tiny.V + 1)
    with pytest.raises(ValueError, match="vocabular"):
        rollout.generate([Side(tiny.llama(0))], larger, *BATCH, **SHORT)
    away = tiny.llama(0).to("meta")
    with pytest.raises(ValueError, match="input_ids must be on meta like the model, got int64"):
        rollout.generate([Side(away)], None, *BATCH, with_ref=False, **SHORT)
