"""The judge against a server on this machine: what it asks, how it reads the answers, faults."""

import json
import math
import multiprocessing
import sqlite3

import pytest
import torch

from nlhf import cli, http
from nlhf.preference import Checked, HTTPJudge, JudgeConfig, as_preference
from nlhf.preference.judge import verdict
from tests import serving
from tests.serving import KEY, PAIRS, TEMPLATE, chat, judge, opinion


def words(path, body):
    """The same without log-probabilities."""
    _, first, second = serving.texts_of(body)
    return chat("A." if (first == "good") >= (second == "good") else " **B**")


@pytest.fixture
def server():
    with serving.serve(opinion) as found:
        yield found


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_probabilities_are_the_softmax_over_the_letters_in_both_orders(server):
    p = judge(server)(*PAIRS)
    better = (sigmoid(2.5) + 1 - sigmoid(-1.5)) / 2
    assert p.tolist() == pytest.approx([better, 1 - better, 0.5])
    assert p.dtype == torch.float32
    assert p.shape == (3,)
    # of two equal responses nothing has to be asked, of a pair in either order the same
    assert len(server.seen) == 2
    q = judge(server)(PAIRS[0], PAIRS[2], PAIRS[1])
    assert torch.equal(p + q, torch.ones(3))
    assert judge(server)([], [], []).shape == (0,)


def test_one_order_alone_keeps_the_judge_s_bias_for_a_place(server):
    p = judge(server, both_orders=False)(*PAIRS)
    assert p.tolist() == pytest.approx([sigmoid(2.5), sigmoid(-1.5), sigmoid(0.5)])
    assert len(server.seen) == 3


def test_both_orders_sum_to_one_to_the_last_bit():
    values = iter(torch.rand(4000, generator=torch.Generator().manual_seed(0)).tolist())

    def noisy(path, body):
        p = next(values)
        return chat("A", {"A": math.log(p), "B": math.log1p(-p)})

    with serving.serve(noisy) as server:
        names = [f"y{i}" for i in range(200)]
        asked = judge(server)
        prompts, both = ["x"] * 199, (names[1:], names[:-1])
        found = asked(prompts * 2, both[0] + both[1], both[1] + both[0])
    # within one call a pair and its mirror image are the same two requests
    assert len(server.seen) == 398
    assert torch.equal(found[:199] + found[199:], torch.ones(199))
    assert found.unique().numel() > 300


def test_without_log_probabilities_the_text_is_read():
    with serving.serve(words) as server:
        assert judge(server)(*PAIRS).tolist() == [1.0, 0.0, 0.5]
        assert judge(server, top_logprobs=0)(*PAIRS).tolist() == [1.0, 0.0, 0.5]
    assert "logprobs" in server.bodies()[0]
    assert "logprobs" not in server.bodies()[-1]


def test_several_answers_are_averaged_and_drawn_with_seeds_of_their_own():
    def drawn(path, body):
        return chat("A" if body["seed"] % 4 else "B")

    with serving.serve(drawn) as server:
        p = judge(server, samples=8, temperature=0.7, both_orders=False, seed=16)(
            ["x"], ["y"], ["z"]
        )
    assert p.tolist() == [0.75]
    assert sorted(body["seed"] for body in server.bodies()) == list(range(16, 24))


@pytest.mark.parametrize(
    ("answer", "p"),
    [
        (chat("A"), 1.0),
        (chat("b"), 0.0),
        (chat(" (B)."), 0.0),
        (chat("Response B is better."), 0.0),
        (chat("A better answer is B"), None),
        (chat("neither"), None),
        (chat(""), None),
        (chat("A", {"A": 0.0}), 1.0),
        (chat("\u2581B", {"\u2581B": math.log(0.9), "\u0120A": math.log(0.1)}), 0.1),
        # neither letter has any mass to speak of
        (chat("Neither", {"Neither": -1e-6, "A": -14.0, "B": -15.0}), None),
        (chat("Neither", {"Neither": -0.5, "A": math.log(0.3), "B": math.log(0.1)}), 0.75),
        # what JSON cannot hold is written so
        (chat("A", {"A": -0.1, "B": -9999.0}), 1.0),
    ],
)
def test_what_an_answer_says(answer, p):
    assert verdict(answer) == (p if p is None else pytest.approx(p))


def test_the_letter_may_come_after_other_tokens():
    answer = chat("Answer: B", {"Answer": -0.1, "A": -3.0})
    tops = [{"token": " B", "logprob": math.log(0.8)}, {"token": " A", "logprob": math.log(0.2)}]
    answer["choices"][0]["logprobs"]["content"] += [
        {"token": ":", "logprob": -0.1, "top_logprobs": []},
        {"token": " B", "logprob": math.log(0.8), "top_logprobs": tops},
    ]
    assert verdict(answer) == pytest.approx(0.2)


@pytest.mark.parametrize(
    "answer",
    [
        None,
        [],
        {},
        {"choices": []},
        {"choices": [None]},
        {"choices": [{"message": {"content": None}}]},
        chat("A", {"A": 3.0}),
        chat("A", {"A": math.nan}),
        chat("A", {"A": "-0.1"}),
        {"choices": [{"logprobs": {"content": 5}}]},
        {"choices": [{"logprobs": {"content": [{"token": "A"}]}}]},
        {"choices": [{"logprobs": {"content": [{"token": ["A"], "top_logprobs": 3}]}}]},
    ],
)
def test_an_answer_that_is_none_is_asked_for_again_and_then_an_error(answer):
    with pytest.raises(http.BadAnswer):
        verdict(answer)
    with serving.serve(lambda path, body: answer) as server:
        asked = judge(server, retries=2, both_orders=False)
        with pytest.raises(
            ValueError, match=rf"judge {server.url}, model toy: an? .*, after 3 attempts"
        ):
            asked(["x"], ["y"], ["z"])
    assert len(server.seen) == 3


def test_an_answer_is_paid_for_once(server, tmp_path):
    cache = {"cache": str(tmp_path / "deep" / "cache.db")}
    first = judge(server, **cache)
    p = first(*PAIRS)
    assert first.stats["misses"] == 2
    again = judge(server, **cache)
    assert torch.equal(again(*PAIRS), p)
    assert again.stats == {"hits": 2, "misses": 0, "unclear": 0, "requests": 0, "retries": 0}
    # in the other order too
    assert torch.equal(again(PAIRS[0], PAIRS[2], PAIRS[1]), 1 - p)
    assert len(server.seen) == 2


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "other"},
        {"system": "Be fair."},
        {"template": TEMPLATE + "|"},
        {"top_logprobs": 5},
        {"max_tokens": 2},
        {"temperature": 0.5},
    ],
    ids=str,
)
def test_what_decides_an_answer_decides_the_cache(server, tmp_path, changes):
    server.answer = lambda path, body: chat("A")
    cache = {"cache": str(tmp_path / "cache.db")}
    judge(server, **cache)(*PAIRS)
    judge(server, **cache | changes)(*PAIRS)
    assert len(server.seen) == 4
    # who connects how decides nothing
    judge(server, **cache, concurrency=2, timeout=5.0, retries=1)(*PAIRS)
    assert len(server.seen) == 4


def test_what_was_answered_before_a_failure_is_kept(server, tmp_path):
    cache = {"cache": str(tmp_path / "cache.db"), "concurrency": 1, "retries": 0}
    server.faults[:] = [None, None, None, 400]
    many = (["x"] * 6, [f"a{i}" for i in range(6)], [f"b{i}" for i in range(6)])
    with pytest.raises(ValueError, match="status 400"):
        judge(server, **cache)(*many)
    asked = judge(server, **cache)
    asked(*many)
    assert asked.stats["hits"] >= 3
    assert asked.stats["hits"] + asked.stats["misses"] == 12


def _in_a_process(url, path, out):
    settings = {"url": url, "model": serving.MODEL, "template": TEMPLATE, "cache": path}
    asked = HTTPJudge(JudgeConfig(**settings))
    many = [f"y{i}" for i in range(20)]
    out.put(asked(["x"] * 20, many, many[::-1]).tolist())


def test_processes_share_a_cache(tmp_path):
    values = iter(torch.rand(400, generator=torch.Generator().manual_seed(0)).tolist())

    def noisy(path, body):
        p = next(values)
        return chat("A", {"A": math.log(p), "B": math.log1p(-p)})

    context = multiprocessing.get_context("fork")
    out = context.Queue()
    with serving.serve(noisy) as server:
        path = str(tmp_path / "cache.db")
        others = [
            context.Process(target=_in_a_process, args=(server.url, path, out)) for _ in range(3)
        ]
        for process in others:
            process.start()
        found = [out.get(timeout=60) for _ in others]
        for process in others:
            process.join(60)
        # what differs is settled by who was first, for all of them
        assert found[0] == found[1] == found[2]
        _in_a_process(server.url, path, out)
        assert out.get(timeout=10) == found[0]


def test_a_cache_that_is_none(server, tmp_path):
    path = tmp_path / "cache.db"
    path.write_text("these are no answers, and no database either" * 30)
    with pytest.raises(ValueError, match=r"judge: cache .*cache.db cannot be used"):
        judge(server, cache=str(path))
    lying = tmp_path / "lying.db"
    judge(server, cache=str(lying))(*PAIRS)
    with sqlite3.connect(lying) as file:
        file.execute("UPDATE answers SET p = 7.5")
    file.close()
    with pytest.raises(ValueError, match=r"holds 7\.5 for a probability"):
        judge(server, cache=str(lying))(*PAIRS)


def test_an_unclear_answer_is_asked_again_and_then_decided_as_was_said(tmp_path):
    answers = iter(["Both.", "B", "hm", "A", *["neither"] * 20])
    with serving.serve(lambda path, body: chat(next(answers))) as server:
        kept = {"cache": str(tmp_path / "cache.db"), "on_unclear": "half"}
        asked = judge(server, both_orders=False, concurrency=1, temperature=0.5, **kept)
        assert asked(["x"], ["a"], ["b"]).tolist() == [0.0]
        assert asked(["x"], ["c"], ["d"]).tolist() == [1.0]
        assert asked(["x"], ["e"], ["f"]).tolist() == [0.5]
        assert asked.stats["unclear"] == 4
        assert asked(["x"], ["e"], ["f"]).tolist() == [0.5]
        assert asked.stats["hits"] == 1
        # another seed, or the same would come
        assert [body["seed"] for body in server.bodies()] == [0, 1] * 3
        with pytest.raises(ValueError, match=f"model {serving.MODEL}: .*neither A nor B, twice"):
            judge(server)(["x"], ["a"], ["b"])


def test_requests_are_what_the_protocol_wants(server):
    texts = ["{braces} and \ud800 half a pair", "a{first}", "b"]
    judge(server, system="Be fair.", both_orders=False)(*([text] for text in texts))
    ((path, headers, body),) = server.seen
    assert path == "/v1/chat/completions"
    assert headers["Content-Type"] == "application/json"
    assert "Authorization" not in headers
    assert body["messages"] == [
        {"role": "system", "content": "Be fair."},
        {"role": "user", "content": "|".join(texts)},
    ]
    assert body["model"] == serving.MODEL
    assert (body["temperature"], body["max_tokens"]) == (0.0, 8)
    assert (body["logprobs"], body["top_logprobs"]) == (True, 20)


# ---- as a user names it


def test_a_url_is_a_judge_whose_model_is_the_only_one(server):
    server.answer = lambda path, body: (
        serving.models("one") if path == "/v1/models" else chat(body["model"] == "one" and "A")
    )
    asked = as_preference(server.url)
    assert isinstance(asked, Checked)
    assert asked(["x"], ["a"], ["b"]).tolist() == [0.5]
    server.answer = lambda path, body: serving.models("one", "two")
    with pytest.raises(ValueError, match=r"serves 2 models \(one, two\); name one"):
        as_preference(server.url)(["x"], ["a"], ["b"])


def test_a_yaml_file_is_a_judge(server, tmp_path):
    path = tmp_path / "judge.yaml"
    path.write_text(f"url: {server.url}/chat/completions\nmodel: toy\ntemplate: '{TEMPLATE}'\n")
    assert as_preference(str(path))(*PAIRS)[2] == 0.5
    assert as_preference(path).preference.settings.template == TEMPLATE
    path.write_text(f"url: {server.url}\napi_key: {KEY}\n")
    with pytest.raises(ValueError, match="unknown field 'api_key'; do you mean api_key_env") as e:
        as_preference(path)
    assert KEY not in str(e.value)
    with pytest.raises(ValueError, match=r"no-judge.yaml: no such file"):
        as_preference("no-judge.yaml")


def test_evaluate_takes_a_judge(server, tmp_path):
    for name in ("good", "bad"):
        rows = [json.dumps({"prompt": f"x{i}", "completion": name}) for i in range(4)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    path = tmp_path / "judge.yaml"
    path.write_text(f"url: {server.url}\ntemplate: '{TEMPLATE}'\n")
    contestants = [str(tmp_path / f"{name}.jsonl") for name in ("good", "bad")]
    cli.main(["evaluate", *contestants, "--preference", str(path), "--output", str(tmp_path / "e")])
    result = json.loads((tmp_path / "e" / "evaluation.json").read_text())
    assert "good" in json.dumps(result)
    better = (sigmoid(2.5) + 1 - sigmoid(-1.5)) / 2
    assert f"{better:.3f}"[1:] in (tmp_path / "e" / "report.md").read_text()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"url": ""}, "url must be given"),
        ({"url": "ftp://host/v1"}, r"url must be http\(s\)"),
        ({"url": "http://"}, r"url must be http\(s\)"),
        ({"url": "http://host:notaport/v1"}, "url is not one"),
        ({"url": f"https://user:{KEY}@host/v1"}, "no user, password"),
        ({"url": f"https://host/v1?key={KEY}"}, "no user, password, query"),
        ({"template": "{prompt} {first}"}, "template must contain {second}"),
        ({"template": "{prompt} {first} {second} {third}"}, "stray brace or field"),
        ({"samples": 3}, "need a temperature above 0"),
        ({"on_unclear": "maybe"}, "on_unclear must be error or half"),
        ({"timeout": 0.0}, "timeout must be above 0"),
        ({"timeout": math.nan}, "timeout must be above 0"),
        ({"concurrency": 0}, "concurrency must be"),
        ({"top_logprobs": 21}, "top_logprobs must be in 0 to 20"),
    ],
)
def test_a_bad_configuration_is_one_line_without_a_secret(changes, match):
    with pytest.raises(ValueError, match=match) as error:
        HTTPJudge(JudgeConfig(**{"url": "http://host/v1"} | changes))
    assert KEY not in str(error.value)
    assert "\n" not in str(error.value)
