"""Rollouts from a server that speaks as vLLM and SGLang do, over a real model."""

import math

import pytest
import torch

from nlhf import rollout, serving
from nlhf.rollout import Pair
from tests import serving as local
from tests import tiny
from tests.serving import KEY, chat, explicit

pytestmark = pytest.mark.usefixtures("one_thread")

EOS = (2, *range(30, 38))
ASKED = {"max_new_tokens": 6, "end_tokens": EOS, "pad_token_id": 0, "seed": 3}
# engine, what its log-probabilities are of, and the end of the url: SGLang has two ways in
ENGINES = [
    ("vllm", "processed", "/v1"),
    ("vllm", "raw", ""),
    ("sglang", "scaled", ""),
    ("sglang", "scaled", "/v1"),
]


@pytest.fixture(params=ENGINES, ids=lambda x: "-".join(x))
def served(request):
    """A server, and how it is asked."""
    engine, logprobs, suffix = request.param
    with local.serve(local.Engine(tiny.llama(), logprobs=logprobs)) as server:
        server.suffix = suffix
        yield server, {"engine": engine, "logprobs": logprobs, "backoff": 0.001}


def test_a_completion_has_the_server_s_tokens_and_log_probabilities(served):
    server, asked = served
    ids, mask = tiny.prompts([3, 6, 2])
    y = serving.complete(server.url, ids, mask, n_samples=2, **ASKED, **asked)
    assert y.tokens.shape == y.mask.shape == y.sampling_logprobs.shape
    assert len(y.tokens) == 6
    found = explicit(tiny.llama(), ids, mask, y, 1.0, n=2)
    torch.testing.assert_close(y.sampling_logprobs.double(), found, atol=1e-5, rtol=1e-5)
    for tokens, keep in zip(y.tokens.tolist(), y.mask.tolist(), strict=True):
        real = [t for t, k in zip(tokens, keep, strict=True) if k]
        # the end token is the last, or there is none and the response is as long as may be
        assert [t in EOS for t in real[:-1]] == [False] * (len(real) - 1)
        assert real[-1] in EOS or len(real) == 6
    lengths = y.mask.sum(-1)
    assert lengths.min() < lengths.max()
    assert torch.equal(y.mask, torch.arange(y.mask.shape[1]) < lengths[:, None])
    # it is a side of a pair as any other
    Pair(ids, mask, y.rows(slice(0, 6, 2)), y.rows(slice(1, 6, 2)))


def test_draws_are_the_model_s_distribution_and_independent():
    """The first tokens of many samples against the model, by chi-square."""
    model = tiny.llama(seed=4)
    ids, mask = tiny.prompts([4])
    with local.serve(local.Engine(model, logprobs="raw")) as server:
        asked = ASKED | {"max_new_tokens": 1, "n_samples": 300}
        y = serving.complete(server.url, ids, mask, **asked)
    with torch.no_grad():
        p = model(ids).logits[0, -1].softmax(-1)
    counts = torch.bincount(y.tokens[:, 0], minlength=tiny.V)
    often = p * 300 >= 5
    seen = torch.cat([counts[often], counts[~often].sum()[None]])
    wanted = 300 * torch.cat([p[often], p[~often].sum()[None]])
    statistic = ((seen - wanted) ** 2 / wanted).sum()
    degrees = len(wanted) - 1
    assert statistic < degrees + 5 * math.sqrt(2 * degrees)


def test_requests_carry_ids_and_every_setting(served):
    server, asked = served
    ids, mask = tiny.prompts([3, 5])
    chosen = {"temperature": 0.7, "top_k": 9, "top_p": 0.9, "min_p": 0.01}
    model = {"model": "adapter"}
    serving.complete(server.url, ids, mask, **ASKED, **chosen, **asked, **model)
    prompts = [ids[b][mask[b] > 0].tolist() for b in range(2)]
    seeds = set()
    assert len(server.seen) == 2
    for path, _, body in server.seen:
        told = body.get("sampling_params", body)
        assert {name: told[name] for name in chosen} == chosen
        assert told["stop_token_ids"] == list(EOS)
        assert told["repetition_penalty"] == 1.0
        if asked["engine"] == "vllm" or server.suffix:
            assert path == "/v1/completions"
            assert body["prompt"] in prompts
            assert (body["max_tokens"], body["model"], body["n"]) == (6, "adapter", 1)
            seeds.add(body["seed"])
        else:
            assert path == "/generate"
            assert body["input_ids"] in prompts
            assert (told["max_new_tokens"], body["lora_path"]) == (6, "adapter")
            seeds.add(told["sampling_seed"])
    assert len(seeds) == 2
    assert all(0 <= seed < 2**31 for seed in seeds)
    # off means all, whatever the served model's own settings are
    serving.complete(server.url, ids, mask, **ASKED, **asked)
    told = server.bodies()[-1]
    told = told.get("sampling_params", told)
    assert (told["top_k"], told["top_p"], told["min_p"]) == (-1, 1.0, 0.0)


def test_seeds_repeat_a_draw_and_rows_share_none(served):
    server, asked = served
    ids, mask = tiny.prompts([4])
    ids, mask = ids.expand(3, -1), mask.expand(3, -1)
    a, b = (serving.complete(server.url, ids, mask, **ASKED, **asked) for _ in range(2))
    assert torch.equal(a.tokens, b.tokens)
    assert len({tuple(row) for row in a.tokens.tolist()}) == 3
    other = serving.complete(server.url, ids, mask, **ASKED | {"seed": 4}, **asked)
    assert other.tokens.tolist() != a.tokens.tolist()


def seed_of(body):
    return body["seed"] if "seed" in body else body["sampling_params"]["sampling_seed"]


def prompt_length(body):
    return len(body["prompt"] if "prompt" in body else body["input_ids"])


@pytest.mark.parametrize(
    ("logprobs", "settings", "known"),
    [
        ("raw", {}, True),
        ("raw", {"temperature": 0.7}, False),
        ("raw", {"top_p": 0.8}, False),
        ("scaled", {"temperature": 0.7}, True),
        ("scaled", {"top_k": 5}, False),
        ("processed", {"temperature": 0.7, "top_k": 5, "min_p": 0.05}, True),
    ],
)
def test_log_probabilities_of_another_distribution_are_unknown(logprobs, settings, known):
    """Only what was drawn from is a sampling log-probability, and then to the digit."""
    model = tiny.llama()
    ids, mask = tiny.prompts([3, 6])
    engine = "sglang" if logprobs == "scaled" else "vllm"
    with local.serve(local.Engine(model, logprobs=logprobs)) as server:
        y = serving.complete(
            server.url, ids, mask, **ASKED, **settings, engine=engine, logprobs=logprobs
        )
        assert serving.exact(logprobs, serving.Sampling(EOS, 6, **settings)) == known
    if not known:
        assert y.sampling_logprobs is None
        return
    # as the server drew them: a request after the other came in this order or in another
    seeds = [seed_of(body) for body in sorted(server.bodies(), key=prompt_length)]
    drawn = []
    for r in range(2):
        prompt = ids[r][mask[r] > 0]
        (own,) = rollout.generate(
            [rollout.Side(model)],
            None,
            prompt[None],
            torch.ones_like(prompt)[None],
            max_new_tokens=6,
            eos_token_id=EOS,
            pad_token_id=0,
            seed=seeds[r],
            with_ref=False,
            **settings,
        )
        drawn.append(own.sampling_logprobs.sum())
    torch.testing.assert_close(y.sampling_logprobs.sum(-1).double(), torch.stack(drawn))


def test_older_servers_name_ids_in_the_log_probabilities():
    ids, mask = tiny.prompts([3, 5])
    model = tiny.llama()
    with local.serve(local.Engine(model, logprobs="raw")) as server:
        wanted = serving.complete(server.url, ids, mask, **ASKED)
    with local.serve(local.Engine(model, logprobs="raw", ids=False)) as server:
        found = serving.complete(server.url, ids, mask, **ASKED)
    assert torch.equal(found.tokens, wanted.tokens)
    engine = local.Engine(model, logprobs="raw", ids=False, placeholders=False)
    with (
        local.serve(engine) as server,
        pytest.raises(
            ValueError, match=r"no ids; .*return_token_ids.*--return-tokens-as-token-ids"
        ),
    ):
        serving.complete(server.url, ids, mask, **ASKED)


def completion(**changes) -> dict:
    values = {"token_ids": [5, 6, 2], "logprobs": {"token_logprobs": [-1.0, -2.0, -0.5]}}
    values |= {"finish_reason": "stop"} | changes
    return {"choices": [values]}


def generated(entries, reason="stop", **changes) -> dict:
    meta = {"output_token_logprobs": entries, "finish_reason": {"type": reason}}
    return {"text": "", "meta_info": meta} | changes


GOOD = [[-1.0, 5, None], [-2.0, 6, None], [-0.5, 2, None]]


@pytest.mark.parametrize(
    ("engine", "answer", "match"),
    [
        ("vllm", completion(token_ids=[5, 6, 7]), "stopped without one of the end tokens"),
        ("vllm", completion(token_ids=[5, 2, 2]), "goes on after an end token"),
        ("vllm", completion(finish_reason="length", token_ids=[5, 6, 7]), "cut after 3 of 6"),
        ("vllm", completion(finish_reason="abort"), "ended for the reason 'abort', after 2"),
        ("vllm", completion(token_ids=[5, 6]), "2 tokens with 3 log-probabilities, after 2"),
        ("vllm", completion(token_ids=[5, 99, 2]), r"must be in \[0, 53\), got 99"),
        ("vllm", completion(token_ids=[5, -1, 2]), r"must be in \[0, 53\), got -1"),
        ("vllm", completion(token_ids=[5, "6", 2]), "'6' for a token id"),
        ("vllm", completion(logprobs=None), "gives no log-probabilities"),
        (
            "vllm",
            completion(logprobs={"token_logprobs": [-1.0, 3.0, -0.5]}),
            "3 for the log-probability of a token",
        ),
        (
            "vllm",
            completion(logprobs={"token_logprobs": [-1.0, -9999.0, -0.5]}),
            "-9999 for the log-probability of a token",
        ),
        ("vllm", completion(logprobs={"token_logprobs": [-1.0, None, -0.5]}), "for a number"),
        ("vllm", completion(prompt_token_ids=[1, 2]), "answers another prompt"),
        ("vllm", completion(token_ids=[], logprobs={"token_logprobs": []}), "the server gives 0"),
        ("vllm", {"error": "no"}, "an answer without choices.0"),
        ("vllm", chat("A"), "gives no log-probabilities"),
        ("sglang", generated(GOOD[:2]), "stopped without one of the end tokens"),
        ("sglang", generated(GOOD, output_ids=[5, 7, 2]), "output_ids that differ"),
        ("sglang", generated(None), r"output_token_logprobs; is it SGLang\?"),
        ("sglang", generated([[-1.0], [-2.0]]), "an answer without 1"),
        ("sglang", completion(), "an answer without meta_info"),
    ],
)
def test_an_answer_that_lacks_or_contradicts_is_refused(engine, answer, match):
    ids, mask = tiny.prompts([3])
    with local.serve(lambda path, body: answer) as server:
        server.suffix = ""
        host = serving.Server(server.url, engine=engine, retries=1, backoff=0.001)
        sampling = serving.Sampling((2,), 6)
        asked = {"seeds": torch.tensor([1]), "pad_token_id": 0, "vocabulary": 53}
        with pytest.raises(ValueError, match=match) as error:
            host.complete(ids, mask, sampling, **asked)
    assert "\n" not in str(error.value)


def test_an_answer_without_its_end_token_in_the_list_of_ids_is_whole():
    """SGLang cuts it off for the text; the log-probabilities keep it."""
    ids, mask = tiny.prompts([3])
    cut = completion(token_ids=[5, 6], matched_stop=2)
    answers = (generated(GOOD, output_ids=[5, 6]), ""), ([generated(GOOD)], ""), (cut, "/v1")
    for answer, suffix in answers:
        with local.serve(lambda path, body, answer=answer: answer) as server:
            server.suffix = suffix
            y = serving.complete(server.url, ids, mask, engine="sglang", **ASKED)
        assert y.tokens.tolist() == [[5, 6, 2]]
        assert y.sampling_logprobs.tolist() == [[-1.0, -2.0, -0.5]]
        assert y.mask.all()


def test_faults_that_pass_change_nothing(served):
    server, asked = served
    ids, mask = tiny.prompts([3, 6, 2])
    wanted = serving.complete(server.url, ids, mask, **ASKED, **asked)
    server.faults[:] = [(429, 0), 500, "garbage", "cut", 503]
    found = serving.complete(server.url, ids, mask, **ASKED, **asked)
    assert torch.equal(found.tokens, wanted.tokens)
    assert torch.equal(found.sampling_logprobs, wanted.sampling_logprobs)


def test_the_key_of_the_server_is_sent_and_not_said(monkeypatch):
    monkeypatch.setenv("NLHF_TEST_KEY", KEY)
    ids, mask = tiny.prompts([3])
    with local.serve(local.Engine(tiny.llama(), logprobs="raw")) as server:
        server.faults[:] = [401]
        with pytest.raises(ValueError, match="NLHF_TEST_KEY right") as error:
            serving.complete(server.url, ids, mask, key_env="NLHF_TEST_KEY", **ASKED)
    assert server.seen[0][1]["Authorization"] == f"Bearer {KEY}"
    assert KEY not in str(error.value)
    with pytest.raises(ValueError, match="engine must be"):
        serving.Server("http://host", engine="tgi")
    with pytest.raises(ValueError, match="logprobs must be one of"):
        serving.Server("http://host", logprobs="all")
