"""nash_md_pg against a slow twin: an explicit forward pass, and the op of eager."""

import weakref

import pytest
import torch

import nlhf_kernels as nk
from nlhf import losses, rollout
from nlhf.rollout import Completion, Pair
from nlhf_kernels import eager
from tests import tiny

EOS = [2, *range(30, 38)]


pytestmark = pytest.mark.usefixtures("one_thread")


def made(model, ref, lengths=(3, 6, 2, 4), **settings):
    ids, mask = tiny.prompts(list(lengths))
    settings = {"mixture_coef": 0.3, "max_new_tokens": 7, "seed": 1, "eos_token_id": EOS} | settings
    pair = rollout.generate_pair(model, ref, ids, mask, **settings)
    return pair, torch.linspace(0.1, 0.9, len(ids), dtype=torch.float64)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def twin(model, ref, pair, preference, temperature, **settings):
    """One row at a time, without padding, over the whole text, and no op but eager's."""
    total = 0
    for b, p in enumerate(preference):
        prompt = pair.input_ids[b][pair.attention_mask[b] > 0]
        y = pair.y.tokens[b][pair.y.mask[b]]
        whole = torch.cat([prompt, y])[None]
        logits = model(whole, use_cache=False).logits[:, len(prompt) - 1 : -1]
        with torch.no_grad():
            ref_logits = ref(whole, use_cache=False).logits[:, len(prompt) - 1 : -1]
        total = (
            total
            + eager.pairwise_pg_loss(
                logits,
                y[None],
                torch.ones_like(y[None], dtype=torch.bool),
                p[None],
                ref_logits=ref_logits,
                temperature=temperature,
                **settings,
            ).loss
        )
    return total / len(preference)


@pytest.mark.parametrize("kl", ["reward_to_go", "sequence", "token", "exact"])
@pytest.mark.parametrize("build", [tiny.llama, tiny.gpt2, tiny.gemma2])
def test_equals_the_slow_twin_with_its_gradient(build, kl):
    model, ref = build(0), build(1)
    pair, preference = made(model, ref, temperature=0.8)
    assert not pair.y.mask.all()
    settings = {"tau": 0.1, "temperature": 0.8, "kl": kl}
    expected = twin(model, ref, pair, preference, **settings)
    wanted = gradients(model, expected)
    tolerance = {"rtol": 1e-3, "atol": 1e-4} if build is tiny.gemma2 else {"rtol": 0, "atol": 1e-9}
    for inplace in (True, False):
        result = losses.nash_md_pg(
            model, ref, pair, preference, inplace_backward=inplace, **settings
        )
        torch.testing.assert_close(result.loss, expected, **tolerance, check_dtype=False)
        got = gradients(model, result.loss)
        assert got.keys() == wanted.keys()
        for name, grad in got.items():
            torch.testing.assert_close(grad, wanted[name], **tolerance, msg=name)


def test_a_lora_policy_with_its_own_base():
    model = tiny.with_lora(tiny.llama(0))
    base = tiny.llama(0)
    pair, preference = made(model, None, temperature=0.8)
    settings = {"tau": 0.2, "temperature": 0.8, "kl": "reward_to_go"}
    expected = twin(model, base, pair, preference, **settings)
    wanted = gradients(model, expected)
    assert wanted
    assert all("lora" in name for name in wanted)
    for answers in (pair.y, Completion(pair.y.tokens, pair.y.mask)):
        either = Pair(pair.input_ids, pair.attention_mask, answers, pair.y_other)
        result = losses.nash_md_pg(model, None, either, preference, **settings)
        got = gradients(model, result.loss)
        torch.testing.assert_close(result.loss, expected, rtol=0, atol=1e-10)
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-9)
        torch.testing.assert_close(result.ref_logprobs, pair.y.ref_logprobs)
    torch.testing.assert_close(result.logprobs, pair.y.policy_logprobs)


def test_rows_are_micro_batches_and_padding_counts_for_nothing():
    model, ref = tiny.llama(0), tiny.llama(1)
    pair, preference = made(model, ref)
    whole = losses.nash_md_pg(model, ref, pair, preference, tau=0.1)
    wanted = gradients(model, whole.loss)
    parts = [
        losses.nash_md_pg(model, ref, pair.rows(s), preference[s], tau=0.1)
        for s in (slice(0, 1), slice(1, 4))
    ]
    shares = parts[0].loss / 4 + parts[1].loss * 3 / 4
    torch.testing.assert_close(shares, whole.loss)
    torch.testing.assert_close(gradients(model, shares), wanted)
    torch.testing.assert_close(torch.cat([p.kl for p in parts]), whole.kl)

    # ids under the mask may be anything, and so may the padding of a prompt
    y = pair.y
    junk = Completion(torch.where(y.mask, y.tokens, -100), *list(vars(y).values())[1:])
    ids = torch.where(pair.attention_mask > 0, pair.input_ids, 17)
    other = losses.nash_md_pg(
        model, ref, Pair(ids, pair.attention_mask, junk, pair.y_other), preference, tau=0.1
    )
    torch.testing.assert_close(other.loss, whole.loss)


def test_without_a_reference():
    model = tiny.llama(0)
    pair, preference = made(model, None, mixture_coef=0.0, with_ref=False)
    result = losses.nash_md_pg(model, None, pair, preference, tau=0.0)
    assert result.kl.numel() == 0
    with pytest.raises(ValueError, match="reference: ref must be a model"):
        losses.nash_md_pg(model, None, pair, preference, tau=0.1)


def test_the_logits_of_y_alone_are_made_and_overwritten():
    """No logits of prompts, none of the last token, and the gradient in their place."""
    model, ref = tiny.llama(0), tiny.llama(1)
    pair, preference = made(model, ref)
    seen = []
    model.register_forward_hook(lambda _, args, output: seen.append(output.logits))
    result = losses.nash_md_pg(model, ref, pair, preference, tau=0.1, head="logits")
    assert seen[0].shape == (*pair.y.tokens.shape, tiny.V)
    assert seen[0].is_contiguous()
    before = seen[0].detach().clone()
    result.loss.backward()
    after = seen[0].detach()
    assert not torch.equal(after, before)
    # a gradient with respect to logits sums to 0 in each row, and is 0 under the mask
    assert after.sum(-1).abs().max() < 1e-12
    assert (after[~pair.y.mask] == 0).all()


def test_training_beats_the_reference():
    """Fifty steps towards a set of words, from a LoRA policy and its own base."""
    liked = torch.arange(tiny.V) % 2 == 0
    model = tiny.with_lora(tiny.llama(0, torch.float32, num_hidden_layers=1), std=0.0)
    ids, mask = tiny.prompts([4] * 32)

    def share(y):
        return (liked[y.tokens] & y.mask).sum(-1) / y.mask.sum(-1)

    def prefer(pair):
        return torch.sigmoid(4 * (share(pair.y) - share(pair.y_other)))

    adapters = [p for n, p in model.named_parameters() if "lora_" in n]
    generator = torch.Generator().manual_seed(0)
    for p in adapters[::2]:
        p.data.normal_(std=0.3, generator=generator)
    optimizer = torch.optim.Adam(adapters, lr=0.02)
    settings = {"max_new_tokens": 4, "eos_token_id": 2}
    before = rollout.generate_pair(model, None, ids, mask, mixture_coef=1.0, seed=-1, **settings)
    assert 0.4 < prefer(before).mean() < 0.6
    for step in range(50):
        seed = nk.fold_in(0, step)
        pair = rollout.generate_pair(
            model, None, ids, mask, mixture_coef=0.125, seed=seed, **settings
        )
        losses.nash_md_pg(model, None, pair, prefer(pair), tau=0.01).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = rollout.generate_pair(model, None, ids, mask, mixture_coef=1.0, seed=-2, **settings)
    assert prefer(after).mean() > 0.7
    kl = (after.y.policy_logprobs - after.y.ref_logprobs).sum(-1).mean()
    assert 0 < kl < 20


def test_logits_of_the_reference_are_gone_before_those_of_the_policy():
    model, ref = tiny.llama(0), tiny.llama(1)
    pair, preference = made(model, ref)
    y = Completion(pair.y.tokens, pair.y.mask)
    seen = []
    ref.register_forward_hook(lambda _, args, output: seen.append(weakref.ref(output.logits)))
    model.register_forward_pre_hook(lambda *_: seen.append(seen[0]()))
    either = Pair(pair.input_ids, pair.attention_mask, y, y)
    losses.nash_md_pg(model, ref, either, preference, tau=0.1, head="logits")
    assert len(seen) == 2
    assert seen[1] is None
