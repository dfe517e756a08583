"""The Nash-MD trainer with TRL's interface: what it draws, its loss, what it reads, who prefers."""

import types

import pytest
import torch

import nlhf_kernels as nk
from nlhf import losses, rollout
from nlhf.trl_compat import rewards
from tests import tiny
from tests.trl_tiny import (
    CHAT,
    classifier,
    log_mixture,
    prefer_even,
    prompts,
    settings,
    trainer,
    weights,
)

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- what is drawn


def test_the_draws_are_of_the_policy_and_of_its_true_mixture_with_the_base(tmp_path, monkeypatch):
    base, policy = tiny.llama(), tiny.with_lora(tiny.llama())
    found = trainer(tmp_path, model=policy, mixture_coef=0.3, temperature=0.7)
    drawn = []
    original = rollout.generate_pair
    monkeypatch.setattr(
        rollout, "generate_pair", lambda *a, **k: drawn.append(original(*a, **k)) or drawn[-1]
    )
    found.compute_loss(found.model, {"prompt": [row["prompt"] for row in prompts(16)]})
    pair = drawn[0]
    for y, coef in ((pair.y, 0.0), (pair.y_other, 0.3)):
        ids = torch.cat([pair.input_ids, y.tokens], 1)
        mask = torch.cat([pair.attention_mask, y.mask.long()], 1)
        exact = log_mixture(policy, base, ids, mask, coef, 0.7)
        L = pair.input_ids.shape[1]
        exact = exact[:, L - 1 : -1].gather(-1, y.tokens[..., None])[..., 0]
        torch.testing.assert_close(y.sampling_logprobs[y.mask], exact[y.mask], rtol=0, atol=1e-9)
    # on the tokens of y' the mixture is something else than the policy
    apart = pair.y_other.sampling_logprobs - pair.y_other.policy_logprobs
    assert apart.abs().max() > 0.05


def test_a_reference_of_its_own_is_mixed_in_and_a_copy_is_made_without_one(tmp_path):
    own, policy = tiny.llama(seed=1), tiny.llama()
    found = trainer(tmp_path, model=policy, more={"ref_model": own})
    assert found.ref_model is own
    found = trainer(tmp_path, model=policy)
    assert found.ref_model is not policy
    assert not any(p.requires_grad for p in found.ref_model.parameters())
    before = found.ref_model.lm_head.weight.clone()
    found.train()
    assert torch.equal(found.ref_model.lm_head.weight, before)
    assert not torch.equal(found.model.lm_head.weight, before)


def test_a_part_of_the_policy_is_no_reference_of_its_own(tmp_path):
    policy = tiny.with_lora(tiny.llama())
    found = trainer(tmp_path, model=policy, more={"ref_model": policy.get_base_model()})
    assert found.ref_model is None
    assert any(p.requires_grad for p in policy.parameters())


def test_tokens_that_another_generation_made_get_their_own_reference(tmp_path):
    """What forks of TRL's trainer override, after a call of the original too."""
    found = trainer(tmp_path, more={"ref_model": tiny.llama(seed=1)})
    x = found._encode({"prompt": ["w1 w2 w3", "w4"]})
    outputs = found._generate_completions(found.model, x)
    drawn = found._process_completions(*outputs, x)[0]
    assert "ref_logprobs" in drawn
    other = found._process_completions(outputs[1], outputs[0], x)[0]
    assert "ref_logprobs" not in other
    drawn_ref = found._compute_logprobs(found.model, drawn, 4)[1]
    del drawn["ref_logprobs"]
    torch.testing.assert_close(found._compute_logprobs(found.model, drawn, 4)[1], drawn_ref)


def test_the_draws_follow_the_place_in_the_step_and_not_the_batch(tmp_path):
    found = trainer(tmp_path)
    texts = [row["prompt"] for row in prompts(4)]

    def drawn(batches):
        found._micro = 0
        rows = []
        for batch in batches:
            x = found._encode({"prompt": batch})
            outputs = found._generate_completions(found.model, x)
            y, _ = found._process_completions(*outputs, x)
            kept = zip(y["input_ids"], y["attention_mask"], strict=True)
            rows += [ids[mask != 0].tolist() for ids, mask in kept]
        return rows

    whole = drawn([texts])
    found._train_batch_size = 2
    assert drawn([texts[:2], texts[2:]]) == whole
    found.state.global_step = 1
    assert drawn([texts[:2], texts[2:]]) != whole


# ---- the loss


@pytest.mark.parametrize("kl", ["reward_to_go", "sequence", "token"])
def test_the_loss_and_its_gradient_are_those_of_the_op(tmp_path, kl):
    found = trainer(tmp_path, kl=kl, beta=0.2)
    generator = torch.Generator().manual_seed(0)
    logits, ref = (torch.randn(3, 4, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    logits.requires_grad_()
    tokens = torch.randint(7, (3, 4), generator=generator)
    mask = torch.arange(4) < torch.tensor([4, 1, 3])[:, None]
    p = torch.rand(3, generator=generator)
    logprobs = nk.token_logprobs(logits, tokens, mask=mask).logprobs
    ref_logprobs = nk.token_logprobs(ref, tokens, mask=mask).logprobs
    loss, score, ratio = found._compute_losses(logprobs, ref_logprobs, p)
    op = nk.pairwise_pg_loss(logits, tokens, mask, p, tau=0.2, ref_logprobs=ref_logprobs, kl=kl)
    torch.testing.assert_close(loss, op.loss)
    got = torch.autograd.grad(loss, logits, retain_graph=True)
    torch.testing.assert_close(got, torch.autograd.grad(op.loss, logits))
    torch.testing.assert_close(score, (p - 0.5) * logprobs.sum(1))
    torch.testing.assert_close(ratio, op.kl.sum(1))


@pytest.mark.parametrize("kl", ["reward_to_go", "token"])
@pytest.mark.parametrize("lora", [False, True])
def test_a_step_is_that_of_the_library_and_token_that_of_trl(tmp_path, monkeypatch, kl, lora):
    policy = tiny.with_lora(tiny.llama()) if lora else tiny.llama()
    ref = None if lora else tiny.llama(seed=1)
    found = trainer(
        tmp_path, model=policy, more={"ref_model": ref}, kl=kl, temperature=0.7, beta=0.3
    )
    drawn = []
    original = rollout.generate_pair
    monkeypatch.setattr(
        rollout, "generate_pair", lambda *a, **k: drawn.append(original(*a, **k)) or drawn[-1]
    )
    texts = [row["prompt"] for row in prompts(4)]
    trained = [p for p in policy.parameters() if p.requires_grad]
    got = torch.autograd.grad(found.compute_loss(policy, {"prompt": texts}), trained)
    pair = drawn[0]
    decoded = [
        tiny.tokenizer().batch_decode(
            [t[m].tolist() for t, m in zip(y.tokens, y.mask, strict=True)], skip_special_tokens=True
        )
        for y in (pair.y, pair.y_other)
    ]
    p = prefer_even(texts, *decoded)
    if kl == "reward_to_go":
        result = losses.nash_md_pg(policy, ref, pair, p, tau=0.3, temperature=0.7)
        want = torch.autograd.grad(result.loss, trained)
    else:
        # TRL's: at temperature 1, and each token pays for its own log-ratio alone
        logps = losses.response_logits(policy, pair, pair.y).log_softmax(-1)
        refs = losses.ref_logits(policy, ref, pair, pair.y).log_softmax(-1)
        y, m = pair.y.tokens[..., None], pair.y.mask
        logps, refs = (x.gather(-1, y)[..., 0].masked_fill(~m, 0) for x in (logps, refs))
        kl_loss = ((logps - refs).detach() * logps).sum(1)
        loss = (0.3 * kl_loss - (p - 0.5) * logps.sum(1)).mean()
        want = torch.autograd.grad(loss, trained)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("count", [8, 7])
def test_micro_batches_add_up_to_the_batch(tmp_path, count):
    """Seven prompts: the last micro-batch is smaller, and each prompt still counts the same."""
    ends = []
    for size, steps in ((8, 1), (2, 4)):
        found = trainer(
            tmp_path,
            data=prompts(count),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            max_steps=2,
            # Adam would divide what rounding leaves by its own size
            optim="sgd",
            learning_rate=0.3,
        )
        found.train()
        ends.append((weights(found), [row.get("loss") for row in found.state.log_history]))
    torch.testing.assert_close(ends[0][0], ends[1][0], rtol=0, atol=1e-12)
    assert ends[0][1][0] == pytest.approx(ends[1][1][0], abs=1e-6)


def test_training_raises_the_preference(tmp_path):
    found = trainer(
        tmp_path,
        model=tiny.llama(dtype=torch.float32),
        per_device_train_batch_size=16,
        max_steps=20,
        learning_rate=0.02,
        lr_scheduler_type="constant",
        beta=0.01,
        # y' comes from the reference, so P says how far the policy has come
        mixture_coef=1.0,
    )
    found.train()
    won = [row["rewards/probabilities"] for row in found.state.log_history[:-1]]
    assert sum(won[-3:]) / 3 > sum(won[:3]) / 3 + 0.15


# ---- prompts


def test_a_prompt_gets_the_bos_token_or_the_chat_template_and_loses_its_beginning(tmp_path):
    words = tiny.tokenizer()
    words.chat_template = CHAT
    found = trainer(tmp_path, tokenizer=words, max_length=9, max_new_tokens=5)
    chat = [{"role": "user", "content": "w1 w2"}]
    x = found._encode({"prompt": ["w1 w2", "w1 w2 w3 w4 w5 w6"]})
    assert x["input_ids"].tolist() == [[0, 1, 4, 5], [6, 7, 8, 9]]
    assert x["attention_mask"].tolist() == [[0, 1, 1, 1], [1, 1, 1, 1]]
    assert found._encode({"prompt": [chat]})["input_ids"].tolist() == [[1, 4, 5, 12]]
    kwargs = {"chat_template_kwargs": [{"add_generation_prompt": False}]}
    with pytest.raises(TypeError, match="add_generation_prompt"):
        found._encode({"prompt": [chat], **kwargs})
    words.chat_template = CHAT.replace("add_generation_prompt", "extra")
    x = found._encode({"prompt": [chat], "chat_template_kwargs": [{"extra": True}]})
    assert x["input_ids"].tolist() == [[1, 4, 5, 12]]
    assert found._encode({"prompt": [chat]})["input_ids"].tolist() == [[1, 4, 5]]
    words.chat_template = CHAT
    trainer(tmp_path, data=[{"prompt": chat}] * 8, tokenizer=words, max_steps=1).train()


def test_no_room_for_a_prompt_is_said(tmp_path):
    with pytest.warns(UserWarning, match="leaves no room"):
        args = settings(tmp_path, max_length=5)
    found = trainer(tmp_path)
    found.args = args
    assert found._encode({"prompt": ["w1 w2 w3"]})["input_ids"].shape == (1, 4)


# ---- who prefers


def test_judges_of_three_kinds(tmp_path):
    asked = []

    class Ranks:
        def judge(self, prompts, completions, shuffle_order=False):
            asked.append((prompts, completions, shuffle_order))
            return [0, 1, -1]

    class Scores:
        def judge(self, prompts, completions, return_scores=False):
            assert return_scores
            return [1.0, 0.25, 0.0]

    texts = (["p", "q", "r"], ["a", "b", "c"], ["d", "e", "f"])
    assert rewards.as_preference(Ranks())(*texts).tolist() == [1, 0, 0.5]
    assert asked == [(texts[0], [["a", "d"], ["b", "e"], ["c", "f"]], True)]
    assert rewards.as_preference(Scores())(*texts).tolist() == [1, 0.25, 0]
    found = rewards.as_preference(lambda p, a, b: torch.full((3,), 0.25))
    assert found(*texts).tolist() == [0.25] * 3
    for wrong in ([0, 2, 1], [0.5, 0.5], [1.5, 0.5, 0.5], [float("nan")] * 3, [None] * 3):
        judge = types.SimpleNamespace(judge=lambda p, c, wrong=wrong: wrong)
        with pytest.raises(ValueError, match="judge: "):
            rewards.as_preference(judge)(*texts)
    with pytest.raises(ValueError, match="judge: must have"):
        rewards.as_preference("pair-rm")


def test_a_judge_need_not_be_transitive(tmp_path):
    """P itself is used, which no difference of two rewards could be."""

    def beats(prompts, first, second):
        return torch.tensor([0.9, 0.2, 0.5, 1.0])

    found = trainer(tmp_path, opinion={"preference": beats}, max_steps=1)
    found.train()
    row = found.state.log_history[0]
    assert row["rewards/probabilities"] == pytest.approx(0.65, abs=1e-6)
    assert "rewards/chosen" not in row


def scored(found, responses, prompt="w1 w2"):
    """The rewards that the trainer gives these responses, lists of ids."""
    x = found._encode({"prompt": [prompt] * len(responses)})
    L, T = x["input_ids"].shape[1], max(map(len, responses))
    rows = torch.tensor([[*ids, *[0] * (T - len(ids))] for ids in responses])
    output = torch.cat([x["input_ids"], rows], 1)
    y, y_other = found._process_completions(output, output, x)
    return found._compute_rewards(y, y_other, L)[0]


def test_a_reward_model_reads_the_prompt_and_the_whole_response(tmp_path):
    model = classifier()
    found = trainer(tmp_path, opinion={"reward_funcs": [model]}, reward_weights=[2.0])
    got = scored(found, [[7, 2], [8, 9, 10]])
    for score, ids in zip(got, ([1, 4, 5, 7, 2], [1, 4, 5, 8, 9, 10]), strict=True):
        want = model(input_ids=torch.tensor([ids])).logits[0, 0]
        torch.testing.assert_close(score, 2 * want, rtol=1e-5, atol=1e-6)


def test_the_end_is_looked_for_in_the_response_alone(tmp_path):
    base = trainer(tmp_path, opinion={"reward_funcs": classifier()})
    fined = trainer(tmp_path, opinion={"reward_funcs": classifier()}, missing_eos_penalty=3.0)
    # an end of sequence in the prompt, as a chat template writes it
    responses, prompt = [[7, 2], [8, 9]], "w1 </s> w2"
    apart = scored(base, responses, prompt) - scored(fined, responses, prompt)
    torch.testing.assert_close(apart, torch.tensor([0.0, 3.0]))


def test_a_reward_model_with_another_tokenizer(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {w: i for i, w in enumerate(["[PAD]", "[UNK]", "w1", "w2", "w4", "w5"])}
    inner = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    other = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", chat_template=CHAT + "w5"
    )
    model = classifier(words=6)
    with pytest.raises(ValueError, match="reward_processing_classes"):
        trainer(tmp_path, opinion={"reward_funcs": model})
    more = {"reward_processing_classes": [other]}
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = CHAT
    chosen = {"opinion": {"reward_funcs": model}, "more": more, "tokenizer": tokenizer}
    found = trainer(tmp_path, **chosen)
    for prompt, ids in (("w1 w2 ", [2, 3, 4]), ([{"role": "user", "content": "w1"}], [2, 4, 5])):
        # 7 is w4 here, and 2 the end
        want = model(input_ids=torch.tensor([ids])).logits[0, 0]
        got = scored(found, [[7, 2]], prompt)[0]
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    found.train()


def test_a_reward_function_gets_the_columns(tmp_path):
    seen = []

    def longest(prompts, completions, completion_ids, answer, **_):
        seen.append((prompts, completions, completion_ids, answer))
        return [float(len(ids)) for ids in completion_ids]

    data = [{"prompt": f"w{i}", "answer": i} for i in range(4)]
    found = trainer(
        tmp_path,
        data=data,
        opinion={"reward_model": longest},
        max_steps=1,
        per_device_train_batch_size=2,
    )
    found.train()
    assert len(seen) == 2
    said, texts, ids, answers = seen[0]
    assert said == [f"w{i}" for i in answers]
    assert [len(text.split()) for text in texts] == [sum(i != 2 for i in row) for row in ids]
    row = found.state.log_history[0]
    mean = sum(len(i) for i in ids) / 2
    assert row["rewards/chosen"] == pytest.approx(mean)
    with pytest.raises(ValueError, match="2 finite numbers"):
        rewards.call_reward(lambda **_: [1.0], ["a", "b"], ["c", "d"], [[1], [2]])
