"""The decode loop against a slow one without a cache, without batches and without padding."""

import contextlib

import pytest
import torch
from transformers import DynamicCache

import nlhf_kernels as nk
from nlhf import rollout
from nlhf.rollout import Side
from tests import tiny

# many, so that rows end early and at different times
EOS = [2, *range(30, 38)]
NAMES = ("policy_logprobs", "ref_logprobs", "sampling_logprobs", "log_kept_mass")


pytestmark = pytest.mark.usefixtures("one_thread")


@torch.no_grad()
def slow_row(model, ref, prompt, coef, seed, count, eos=EOS, **sampling):
    """One response, the whole prefix read again for every token; ``ref`` None: adapters off."""
    ids, stats = prompt.tolist(), []
    for position in range(count):
        x = torch.tensor([ids])
        logits = model(x, use_cache=False).logits[:, -1]
        with model.disable_adapter() if ref is None else contextlib.nullcontext():
            ref_logits = (model if ref is None else ref)(x, use_cache=False).logits[:, -1]
        draw = nk.mixture_sample(
            logits, ref_logits, mixture_coef=coef, seed=seed[None], position=position, **sampling
        )
        ids.append(int(draw.tokens))
        stats.append(torch.cat(draw[1:]))
        if ids[-1] in eos:
            break
    return ids[len(prompt) :], torch.stack(stats, -1)


def agree(answers, sides, ref, ids, mask, seed, count, tolerance=1e-10, **sampling):
    """Every row of every side is what ``slow_row`` writes."""
    for s, (side, answer) in enumerate(zip(sides, answers, strict=True)):
        assert len(answer.tokens) == len(ids) * side.n_samples
        for row in range(len(answer.tokens)):
            prompt, sample = divmod(row, side.n_samples)
            own = nk.fold_in(nk.fold_in(nk.fold_in(seed, torch.tensor(prompt)), sample), s)
            tokens, stats = slow_row(
                side.model, ref, ids[prompt][mask[prompt] > 0], side.mixture_coef, own, count,
                **sampling,
            )  # fmt: skip
            n = len(tokens)
            assert answer.tokens[row, :n].tolist() == tokens
            assert (answer.tokens[row, n:] == 0).all()
            assert answer.mask[row].tolist() == [i < n for i in range(answer.tokens.shape[1])]
            for name, expected in zip(NAMES, stats, strict=True):
                got = getattr(answer, name)[row]
                torch.testing.assert_close(got[:n], expected, rtol=0, atol=tolerance)
                assert (got[n:] == 0).all()


def qwen2(seed):
    """Biases in attention, one key-value head, and windows that are off."""
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
    }
    return tiny._build("Qwen2", seed, torch.float64, **sizes)


def eager_llama(seed):
    """Buffers, and the attention that the model was given."""
    return tiny.llama(seed, torch.float32, attn_implementation="eager")


@pytest.mark.parametrize("shared", [True, False], ids=["lora", "two models"])
@pytest.mark.parametrize(
    "build", [tiny.llama, tiny.gpt2, qwen2, eager_llama, tiny.mistral, tiny.gemma2]
)
def test_cached_equals_uncached(build, shared):
    model = tiny.with_lora(build(0)) if shared else build(0)
    ref = None if shared else build(1)
    ids, mask = tiny.prompts([3, 6, 2, 4])
    sides = [Side(model), Side(model, 0.3, n_samples=2)]
    settings = {"max_new_tokens": 9, "eos_token_id": EOS, "seed": 5}
    answers = rollout.generate(sides, ref, ids, mask, **settings)
    tolerance = 1e-4 if model.dtype == torch.float32 else 1e-10
    agree(answers, sides, ref, ids, mask, 5, 9, tolerance)
    assert answers[0].mask.sum(-1).unique().numel() > 1


def test_filters_and_temperature():
    model, ref = tiny.llama(0), tiny.llama(1)
    ids, mask = tiny.prompts([3, 5])
    sides = [Side(model, 0.5, n_samples=2)]
    sampling = {"temperature": 0.7, "top_k": 9, "top_p": 0.9, "min_p": 0.02}
    settings = {"max_new_tokens": 8, "eos_token_id": EOS, "seed": 1}
    answers = rollout.generate(sides, ref, ids, mask, **settings, **sampling)
    agree(answers, sides, ref, ids, mask, 1, 8, **sampling)
    kept = answers[0].log_kept_mass[answers[0].mask]
    assert (kept < 0).any()


def test_several_models_and_samples():
    a, b, ref = tiny.llama(0), tiny.gpt2(1), tiny.mistral(2)
    ids, mask = tiny.prompts([4, 2, 3])
    sides = [Side(a, 0.0, 2), Side(b, 0.5), Side(a, 0.25), Side(b, 1.0, 3)]
    settings = {"max_new_tokens": 10, "eos_token_id": [*EOS, *range(10, 20)], "seed": 2}
    answers = rollout.generate(sides, ref, ids, mask, **settings)
    agree(answers, sides, ref, ids, mask, 2, 10, eos=settings["eos_token_id"])


def test_a_row_does_not_depend_on_the_batch_or_the_padding():
    model = tiny.with_lora(tiny.llama(0))
    ids, mask = tiny.prompts([3, 7, 2, 5])
    seeds = torch.tensor([11, -12, 13, 2**62])
    settings = {"mixture_coef": 0.4, "max_new_tokens": 8, "eos_token_id": EOS}
    whole = rollout.generate_pair(model, None, ids, mask, seed=seeds, **settings)
    for p in range(4):
        for left in (7 - int(mask[p].sum()), 0):
            one = ids[p : p + 1, left:], mask[p : p + 1, left:]
            alone = rollout.generate_pair(model, None, *one, seed=seeds[p : p + 1], **settings)
            for big, small in ((whole.y, alone.y), (whole.y_other, alone.y_other)):
                n = small.tokens.shape[1]
                assert torch.equal(big.tokens[p : p + 1, :n], small.tokens)
                assert torch.equal(big.mask[p].sum(), small.mask.sum())
                for name in NAMES:
                    x, y = getattr(big, name)[p, :n], getattr(small, name)[0]
                    torch.testing.assert_close(x, y, rtol=0, atol=1e-12)


def test_the_ends_of_the_mixture():
    model, ref = tiny.llama(0), tiny.llama(1)
    batch = tiny.prompts([3, 5, 4])
    settings = {"max_new_tokens": 8, "eos_token_id": EOS, "seed": 7}
    for coef, alone in ((0.0, model), (1.0, ref)):
        mixed = rollout.mixture_generate(model, ref, *batch, mixture_coef=coef, **settings)
        plain = rollout.generate([Side(alone)], None, *batch, with_ref=False, **settings)[0]
        assert torch.equal(mixed.tokens, plain.tokens)
        assert plain.ref_logprobs is None
        torch.testing.assert_close(mixed.sampling_logprobs, plain.policy_logprobs)


def test_the_true_mixture_and_what_faulty_loops_draw_from():
    """A LoRA policy and its base, one cache each; one cache for both, or adapters left on, is off
    by nats."""
    model = tiny.with_lora(tiny.llama(0))
    ids, mask = tiny.prompts([4, 4, 4])
    y = rollout.mixture_generate(
        model, None, ids, mask, mixture_coef=0.5, max_new_tokens=6, eos_token_id=2, seed=3
    )
    assert y.mask.all()
    whole = torch.cat([ids, y.tokens], -1)

    def mixture(ours, theirs):
        both = (0.5 * ours + 0.5 * theirs).log_softmax(-1)
        return both.gather(-1, y.tokens[..., None])[..., 0]

    with torch.no_grad():
        on = model(whole).logits[:, 3:-1]
        with model.disable_adapter():
            off = model(whole).logits[:, 3:-1]
        cache, shared = DynamicCache(), []
        for part in [whole[:, :4], *whole[:, 4:-1].split(1, -1)]:
            ours = model(part, past_key_values=cache).logits[:, -1]
            with model.disable_adapter():
                theirs = model(part, past_key_values=cache).logits[:, -1]
            shared.append((ours, theirs))
    error = {
        "true": mixture(on, off),
        "one cache": mixture(*(torch.stack(x, 1) for x in zip(*shared, strict=True))),
        "adapters on": mixture(on, on),
    }
    error = {k: (v - y.sampling_logprobs - y.log_kept_mass).abs().max() for k, v in error.items()}
    assert error["true"] < 1e-10
    assert error["one cache"] > 0.5
    assert error["adapters on"] > 0.5


def test_y_and_y_other_have_their_own_noise():
    model = tiny.llama(0)
    batch = tiny.prompts([4] * 6)
    settings = {"max_new_tokens": 6, "eos_token_id": 2, "seed": 3, "with_ref": False}
    pair = rollout.generate_pair(model, None, *batch, mixture_coef=0.0, **settings)
    assert not (pair.y.tokens == pair.y_other.tokens).all(-1).any()
    again = rollout.generate_pair(model, None, *batch, mixture_coef=0.0, **settings)
    assert torch.equal(pair.y_other.tokens, again.y_other.tokens)
    seeds = nk.fold_in(3, torch.arange(6))
    by_row = rollout.generate_pair(
        model, None, *batch, mixture_coef=0.0, **settings | {"seed": seeds}
    )
    assert torch.equal(pair.y.tokens, by_row.y.tokens)
    other = rollout.generate_pair(model, None, *batch, mixture_coef=0.0, **settings | {"seed": 4})
    assert not torch.equal(pair.y.tokens, other.y.tokens)


def shapes_of_calls(model):
    """A list that fills with the shape of the ids of every forward pass."""
    shapes = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    return shapes


def test_one_pass_and_one_launch_a_token_and_ended_rows_are_dropped(monkeypatch):
    launches = []
    sample = nk.mixture_sample

    def counted(policy_logits, *args, **kwargs):
        launches.append(len(policy_logits))
        return sample(policy_logits, *args, **kwargs)

    monkeypatch.setattr(nk, "mixture_sample", counted)
    model, ref = tiny.llama(0), tiny.llama(1)
    ours, theirs = shapes_of_calls(model), shapes_of_calls(ref)
    ids, mask = tiny.prompts([5, 3, 4])
    sides = [Side(model, 0.0, 4), Side(model, 0.5, 4)]
    eos = list(range(2, 20))
    settings = {"max_new_tokens": 40, "eos_token_id": eos, "seed": 0}
    answers = rollout.generate(sides, ref, ids, mask, **settings)
    T = answers[0].tokens.shape[1]
    assert T < 40
    assert max(a.mask.sum(-1).max() for a in answers) == T
    # each prompt is read once, then one column a token, for both sides in one pass
    assert ours == theirs
    assert ours[0] == (3, 5)
    assert all(width == 1 for _, width in ours[1:])
    assert len(ours) == len(launches) == T
    # at most a quarter of the rows of a batch have ended
    alive = [sum(int((a.mask.sum(-1) > t).sum()) for a in answers) for t in range(T)]
    assert alive[0] == launches[0] == 24
    assert all(
        have <= rows < have / 0.75 or rows == have
        for have, rows in zip(alive, launches, strict=True)
    )
    assert launches[-1] < 24


def test_all_rows_end_at_once():
    model = tiny.llama(0)
    batch = tiny.prompts([3, 4])
    settings = {"max_new_tokens": 30, "eos_token_id": list(range(tiny.V)), "seed": 0}
    y = rollout.generate([Side(model)], None, *batch, with_ref=False, **settings)[0]
    assert y.tokens.shape == (2, 1)
    assert y.mask.all()


def test_the_models_are_left_as_they_were():
    model = tiny.with_lora(tiny.gpt2(0))
    model.train()
    model.base_model.model.transformer.h[0].eval()
    before = [m.training for m in model.modules()]
    trained = [p.requires_grad for p in model.parameters()]
    x = torch.tensor([[3, 4, 5]])
    batch = tiny.prompts([3, 4])
    settings = {"mixture_coef": 0.5, "max_new_tokens": 4, "seed": 0}
    first = rollout.generate_pair(model, None, *batch, **settings)
    with pytest.raises(ValueError, match="temperature"):
        rollout.generate_pair(model, None, *batch, temperature=-1.0, **settings)
    assert [m.training for m in model.modules()] == before
    assert [p.requires_grad for p in model.parameters()] == trained
    model.eval()
    with torch.no_grad():
        on = model(x).logits
        with model.disable_adapter():
            assert not torch.allclose(on, model(x).logits)
    # dropout was off
    second = rollout.generate_pair(model, None, *batch, **settings)
    assert torch.equal(first.y.policy_logprobs, second.y.policy_logprobs)


@pytest.mark.parametrize("when", [0, 3])
def test_a_bad_row_is_named_at_any_time(when):
    model = tiny.llama(0)
    calls = []

    def spoil(module, args, output):
        calls.append(1)
        if len(calls) == when + 1:
            output.logits[1] = torch.nan

    model.register_forward_hook(spoil)
    batch = tiny.prompts([3, 4, 2])
    with pytest.raises(ValueError, match=rf"prompt 1, side 0, token {when} \(1 rows in all\)"):
        rollout.generate(
            [Side(model)], None, *batch, with_ref=False, max_new_tokens=6, eos_token_id=2, seed=0
        )
