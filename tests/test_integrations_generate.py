"""The mixture inside ``generate``: exact against whole prefixes, whatever happens to the rows."""

import pytest
import torch
from torch import Tensor

from nlhf_kernels import integrations
from tests import tiny
from tests.test_integrations import example

Mixture = integrations.transformers.MixtureLogitsProcessor
pytestmark = pytest.mark.usefixtures("one_thread")
MODELS = (tiny.llama, tiny.gpt2, tiny.gemma2, tiny.mistral)
NEW = 6


@torch.no_grad()
def logits(model, ids: Tensor, mask: Tensor) -> Tensor:
    """Of the last column, from all of the prefix and without a cache, in float64."""
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    output = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
    return output.logits[:, -1].double()


class Slow:
    """What the processor promises, from two forwards over the whole prefix."""

    def __init__(self, policy, ref, coef: float, mask: Tensor):
        self.models, self.coef, self.mask = (policy, ref), coef, mask

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        mask = self.mask.repeat_interleave(len(ids) // len(self.mask), 0)
        mask = torch.cat([mask, mask.new_ones(len(ids), ids.shape[1] - mask.shape[1])], 1)
        policy, ref = (logits(model, ids, mask) for model in self.models)
        mixed = ((1 - self.coef) * policy + self.coef * ref).log_softmax(-1)
        return mixed.to(scores.dtype)


def generate(policy, processor, ids: Tensor, mask: Tensor, **settings):
    torch.manual_seed(0)
    return policy.generate(
        ids,
        attention_mask=mask,
        logits_processor=[processor],
        max_new_tokens=NEW,
        return_dict_in_generate=True,
        output_scores=True,
        # no token ends a row
        eos_token_id=None,
        pad_token_id=0,
        **settings,
    )


def same(got, want) -> None:
    assert torch.equal(got.sequences, want.sequences)
    for x, y in zip(got.scores, want.scores, strict=True):
        torch.testing.assert_close(x, y, atol=2e-5, rtol=1e-5)


def widths(model) -> list:
    """The shapes of what the model is called with, from now on."""
    seen = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)),
        with_kwargs=True,
    )
    return seen


@pytest.mark.parametrize("coef", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("make", MODELS)
def test_scores_are_the_mixture_and_each_token_is_read_once(make, coef):
    policy, ref = make(0), make(1)
    ids, mask = tiny.prompts([3, 6, 1])
    want = generate(policy, Slow(policy, ref, coef, mask), ids, mask, do_sample=False)
    seen = widths(ref)
    got = generate(policy, Mixture(policy, ref, mixture_coef=coef), ids, mask, do_sample=False)
    same(got, want)
    # without a weight the reference is not run
    assert seen == ([(3, 6)] + [(3, 1)] * (NEW - 1)) * (coef > 0)
    for scores in got.scores:
        torch.testing.assert_close(scores.logsumexp(-1), torch.zeros(3), atol=1e-5, rtol=0)


@pytest.mark.parametrize("make", [tiny.llama, tiny.gemma2])
def test_samples_of_a_prompt_have_caches_of_their_own(make):
    policy, ref = make(0), make(1)
    ids, mask = tiny.prompts([2, 5])
    settings = {"do_sample": True, "num_return_sequences": 3, "temperature": 0.7, "top_k": 0}
    want = generate(policy, Slow(policy, ref, 0.4, mask), ids, mask, **settings)
    got = generate(policy, Mixture(policy, ref, mixture_coef=0.4), ids, mask, **settings)
    same(got, want)
    assert len({tuple(row) for row in got.sequences.tolist()}) > 2


@pytest.mark.parametrize("make", [tiny.llama, tiny.gemma2])
def test_beams_take_their_caches_along(make, monkeypatch):
    policy, ref = make(0), make(1)
    ids, mask = tiny.prompts([2, 5])
    settings = {"num_beams": 4, "num_return_sequences": 2, "do_sample": False}
    want = generate(policy, Slow(policy, ref, 0.4, mask), ids, mask, **settings)
    mixture, moves, seen = Mixture(policy, ref, mixture_coef=0.4), [], widths(ref)
    step = mixture._follow

    def follow(*arguments):
        cache, found = mixture._cache, step(*arguments)
        if cache is not None:
            moves.append(found)
        return found

    monkeypatch.setattr(mixture, "_follow", follow)
    same(generate(policy, mixture, ids, mask, **settings), want)
    assert all(moves)
    assert seen == [(8, 5)] + [(8, 1)] * (NEW - 1)


def test_the_base_of_an_adapted_policy_is_the_reference():
    policy, base = tiny.with_lora(tiny.llama(0)), tiny.llama(0)
    ids, mask = tiny.prompts([3, 6])
    frozen = next(p for name, p in policy.named_parameters() if "lora_" in name)
    frozen.requires_grad_(False)
    before = {name: p.requires_grad for name, p in policy.named_parameters()}
    want = generate(policy, Slow(policy, base, 0.5, mask), ids, mask, do_sample=False)
    got = generate(policy, Mixture(policy, mixture_coef=0.5), ids, mask, do_sample=False)
    same(got, want)
    assert {name: p.requires_grad for name, p in policy.named_parameters()} == before
    assert not torch.equal(logits(policy, ids, mask), logits(base, ids, mask))


def test_one_processor_serves_call_after_call():
    policy, ref = tiny.llama(0), tiny.llama(1)
    mixture = Mixture(policy, ref, mixture_coef=0.5)
    again = None
    # the same, others of the same shape, fewer, a prompt that goes on where another ended
    for lengths, seed in (([3, 6], 0), ([3, 6], 0), ([3, 6], 1), ([4], 2)):
        ids, mask = tiny.prompts(lengths, seed)
        want = generate(policy, Slow(policy, ref, 0.5, mask), ids, mask, do_sample=False)
        got = generate(policy, mixture, ids, mask, do_sample=False)
        same(got, want)
        again = got.sequences
    mask = torch.ones_like(again)
    want = generate(policy, Slow(policy, ref, 0.5, mask), again, mask, do_sample=False)
    same(generate(policy, mixture, again, mask, do_sample=False), want)
    mixture.reset()
    assert mixture._cache is None


def test_a_step_that_failed_is_not_half_done():
    policy, ref = tiny.llama(0), tiny.llama(1)
    mixture, ids = Mixture(policy, ref, mixture_coef=0.5), torch.tensor([[5, 6, 7]])
    scores = torch.zeros(1, tiny.V, dtype=torch.float64)
    mixture(ids[:, :2], scores)

    def fail(*_):
        raise MemoryError

    # after the first layer has written its keys
    hook = ref.model.layers[1].register_forward_hook(fail)
    with pytest.raises(MemoryError):
        mixture(ids, scores)
    hook.remove()
    for longer in (ids, torch.tensor([[5, 6, 7, 8]])):
        want = Mixture(policy, ref, mixture_coef=0.5)(longer, scores)
        torch.testing.assert_close(mixture(longer, scores), want)


def test_equal_tokens_under_another_mask_are_another_prompt():
    """Prompts may begin with what is the pad token elsewhere."""
    policy, ref = tiny.llama(0), tiny.llama(1)
    ids = torch.tensor([[0, 0, 7, 8], [0, 0, 7, 8]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    want = generate(policy, Slow(policy, ref, 0.5, mask), ids, mask, do_sample=False)
    mixture = Mixture(policy, ref, mixture_coef=0.5, attention_mask=mask)
    got = generate(policy, mixture, ids, mask, do_sample=False)
    same(got, want)
    assert not torch.equal(got.scores[0][0], got.scores[0][1])
    # a row further on, but with its padding read as tokens
    longer = torch.cat([mixture._ids, torch.full((2, 1), 5)], 1)
    assert mixture._follow(longer, mixture._attention_of(longer))
    assert not mixture._follow(longer, torch.ones_like(longer))


def test_a_banned_token_stays_banned():
    policy, ref = tiny.llama(0), tiny.llama(1)
    ids = torch.tensor([[5, 6, 7]])
    scores = logits(policy, ids, torch.ones_like(ids))
    best = int(logits(ref, ids, torch.ones_like(ids)).argmax())
    scores[0, best] = -torch.inf
    for coef in (0.0, 0.5, 1.0):
        mixed = Mixture(policy, ref, mixture_coef=coef)(ids, scores)
        assert mixed[0, best] == -torch.inf
        assert mixed.isnan().sum() == 0
        torch.testing.assert_close(mixed.logsumexp(-1), torch.zeros(1, dtype=mixed.dtype))


def test_the_example_runs():
    said = example("transformers_generate").splitlines()
    assert [line.split(":")[0] for line in said] == [f"mixture_coef {b}" for b in (0.0, 0.5, 1.0)]
    assert len({line.split(":")[1] for line in said}) == 3


def test_wrong_input_is_named():
    policy, ref = tiny.llama(0), tiny.llama(1)
    for coef in (-0.1, 1.1, float("nan"), "0.5", True):
        with pytest.raises(ValueError, match=r"mixture_coef must be a number in \[0, 1\], got"):
            Mixture(policy, ref, mixture_coef=coef)
    with pytest.raises(ValueError, match="one vocabulary, got 53 and 60"):
        Mixture(policy, tiny.llama(1, vocab_size=60), mixture_coef=0.5)
    with pytest.raises(ValueError, match="without ref, policy must be a PEFT model"):
        Mixture(policy, mixture_coef=0.5)
    policy.config.is_encoder_decoder = True
    with pytest.raises(ValueError, match="policy must be a decoder, got LlamaForCausalLM"):
        Mixture(policy, ref, mixture_coef=0.5)
    policy.config.is_encoder_decoder = False
    mixture = Mixture(policy, ref, mixture_coef=0.5, attention_mask=torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"attention_mask must be \(B, P\).*3 rows.*\(2, 4\)"):
        mixture(torch.ones(3, 4, dtype=torch.int64), torch.zeros(3, 53))
