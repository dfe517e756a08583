"""Servers that are down, slow or lying, and what becomes of the key."""

import json
import logging
import ssl
import subprocess
import threading
import time

import httpx2
import pytest

from nlhf import http
from nlhf.preference import HTTPJudge, JudgeConfig
from tests import serving
from tests.serving import KEY, PAIRS, chat, judge, opinion


@pytest.fixture
def server():
    with serving.serve(opinion) as found:
        yield found


def test_faults_that_pass_are_waited_for(server):
    server.faults[:] = [500, (429, 0), "garbage", "cut", 503, "slow"]
    asked = judge(server, concurrency=1, timeout=0.3, retries=6)
    assert asked(*PAIRS).tolist() == judge(server)(*PAIRS).tolist()
    assert asked.stats == {"hits": 0, "misses": 2, "unclear": 0, "requests": 8, "retries": 6}


def test_the_server_says_how_long_to_wait(server):
    server.faults[:] = [(429, 1)]
    start = time.monotonic()
    judge(server, both_orders=False)(["x"], ["a"], ["b"])
    assert time.monotonic() - start > 0.9


def test_retry_after_is_seconds_or_a_date_and_never_nonsense():
    for text, seconds in (("3", 3), ("1.5", 1.5), ("nan", 0), ("-5", 0), ("soon", 0), ("", 0)):
        assert http._retry_after(text) == seconds
    later = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 30))
    assert 25 < http._retry_after(later) <= 30
    assert http._retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0


def test_a_server_that_asks_for_a_day_does_not_get_it(server, monkeypatch):
    monkeypatch.setattr(http, "_LONGEST_WAIT", 0.05)
    server.faults[:] = [(503, 86400)]
    start = time.monotonic()
    judge(server, both_orders=False)(["x"], ["a"], ["b"])
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("fault", [500, "slow", "garbage", "cut"])
def test_a_fault_that_stays_is_one_line_and_an_end(server, fault):
    server.faults[:] = [fault] * 20
    asked = judge(server, retries=1, timeout=0.2, concurrency=1, both_orders=False)
    with pytest.raises(
        ValueError, match=rf"judge {server.url}, model toy: .*, after 2 attempts"
    ) as error:
        asked(["x"], ["a"], ["b"])
    assert "\n" not in str(error.value)
    assert len(server.seen) == 2


def test_a_drip_of_bytes_does_not_outlast_the_timeout():
    """Each byte comes in time, the answer does not."""
    with serving.serve(opinion) as server:

        class Drip(server.RequestHandlerClass):
            def _reply(self, fault, body):
                self.send_response(200)
                self.send_header("Content-Length", "1000000")
                self.end_headers()
                for _ in range(100):
                    self.wfile.write(b" ")
                    self.wfile.flush()
                    time.sleep(0.05)

        server.RequestHandlerClass = Drip
        start = time.monotonic()
        with pytest.raises(ValueError, match=r"no whole answer within 0\.3 s"):
            judge(server, timeout=0.3, retries=0)(["x"], ["a"], ["b"])
        assert time.monotonic() - start < 3


def test_an_endless_answer_is_cut_off(server, monkeypatch):
    monkeypatch.setattr(http, "_MOST_BYTES", 50)
    with pytest.raises(ValueError, match="an answer of more than 0 MiB"):
        judge(server, retries=0)(["x"], ["a"], ["b"])


def test_nobody_there():
    with serving.serve(opinion) as server:
        url = server.url
    asked = HTTPJudge(JudgeConfig(url=url, model="m", retries=1, backoff=0.001))
    with pytest.raises(
        ValueError, match=rf"judge {url}, model m: no connection .*, after 2 attempts"
    ):
        asked(["x"], ["a"], ["b"])


@pytest.mark.parametrize(
    ("status", "hint"),
    [(400, "told to"), (401, "variable NLHF_TEST_KEY right"), (404, "most end in /v1"), (302, "")],
)
def test_a_status_that_does_not_pass_is_not_asked_again(server, monkeypatch, status, hint):
    monkeypatch.setenv("NLHF_TEST_KEY", KEY)
    server.faults[:] = [status] * 9
    asked = judge(server, api_key_env="NLHF_TEST_KEY", both_orders=False)
    with pytest.raises(ValueError, match=f"status {status} .*{hint}") as error:
        asked(["x"], ["a"], ["b"])
    assert len(server.seen) == 1
    # which this server has said back
    assert KEY not in str(error.value)


def test_the_key_is_sent_and_shown_nowhere(server, monkeypatch, caplog, tmp_path):
    monkeypatch.setenv("NLHF_TEST_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    server.faults[:] = [500, "garbage"]
    asked = judge(server, api_key_env="NLHF_TEST_KEY", cache=str(tmp_path / "cache.db"))
    asked(*PAIRS)
    assert all(headers["Authorization"] == f"Bearer {KEY}" for _, headers, _ in server.seen)
    assert KEY not in caplog.text
    assert KEY not in repr(asked.settings) + repr(vars(asked.settings))
    assert KEY.encode() not in (tmp_path / "cache.db").read_bytes()
    assert KEY not in json.dumps(server.bodies())


def test_a_key_that_cannot_be_is_an_error_that_does_not_show_it(monkeypatch):
    url = "https://example.org/v1"
    for variable, value, match in (
        ("NLHF_TEST_KEY", None, "NLHF_TEST_KEY holds no key"),
        ("NLHF_TEST_KEY", "two words\n", "is not a key"),
        ("sk-pasted-key", None, "the name of an environment variable"),
    ):
        if value:
            monkeypatch.setenv(variable, value)
        with pytest.raises(ValueError, match=match) as error:
            HTTPJudge(JudgeConfig(url=url, api_key_env=variable))
        assert "two words" not in str(error.value)
        assert "pasted" not in str(error.value)


def test_a_key_in_the_clear_is_warned_of_but_on_this_machine(server, monkeypatch, caplog):
    http._warn.cache_clear()
    monkeypatch.setenv("NLHF_TEST_KEY", KEY)
    judge(server, api_key_env="NLHF_TEST_KEY")
    assert not caplog.records
    HTTPJudge(JudgeConfig(url="http://judge.example.org/v1", api_key_env="NLHF_TEST_KEY"))
    assert "unencrypted" in caplog.text
    caplog.clear()
    HTTPJudge(JudgeConfig(url="https://judge.example.org/v1", api_key_env="NLHF_TEST_KEY"))
    HTTPJudge(JudgeConfig(url="http://judge.example.org/v1"))
    assert not caplog.records


def test_certificates_are_checked(server, tmp_path):
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    made += ["-keyout", str(tmp_path / "key.pem"), "-out", str(tmp_path / "cert.pem")]
    made += ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run(made, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    asked = judge(server, url=server.url.replace("http", "https"))
    with pytest.raises(ValueError, match="its certificate is not trusted"):
        asked(*PAIRS)
    assert not server.seen


def test_redirects_take_the_key_nowhere(server):
    """A status of 3xx is an error: what it points to is not asked."""
    server.faults[:] = [307]
    with pytest.raises(ValueError, match=r"status 307.*redirects are not followed"):
        judge(server, both_orders=False)(["x"], ["a"], ["b"])


def test_requests_go_out_together_and_not_too_many():
    gate = threading.Barrier(6, timeout=10)

    def together(path, body):
        gate.wait()
        return chat("A")

    with serving.serve(together) as server:
        many = [f"y{i}" for i in range(12)]
        asked = judge(server, concurrency=6, both_orders=False)
        assert asked(["x"] * 12, many, ["z"] * 12).tolist() == [1.0] * 12
    assert server.most_at_once == 6


def test_the_library_s_own_line_a_request_is_not_shown(server, caplog):
    caplog.set_level(logging.INFO)
    judge(server)(*PAIRS)
    assert not caplog.records
    assert httpx2.__name__ in logging.root.manager.loggerDict


def test_a_failure_does_not_wait_for_who_is_slow():
    """One request is refused while another would take as long as it may."""
    late = threading.Event()

    def half(path, body):
        if serving.texts_of(body)[1].startswith("slow"):
            late.wait(20)
        return chat("A")

    with serving.serve(half) as server:
        asked = judge(server, both_orders=False, retries=0, concurrency=2)
        server.faults[:] = [None, 400]
        start = time.monotonic()
        with pytest.raises(ValueError, match="status 400"):
            asked(["x", "x"], ["slow", "slow "], ["b", "b"])
        assert time.monotonic() - start < 5
        late.set()


def test_a_server_that_calls_its_model_by_the_key(server, monkeypatch):
    monkeypatch.setenv("NLHF_TEST_KEY", KEY)
    server.answer = lambda path, body: serving.models(KEY, "other")
    asked = judge(server, model="", api_key_env="NLHF_TEST_KEY")
    with pytest.raises(ValueError, match=r"serves 2 models \(\*\*\*, other\)") as error:
        asked(*PAIRS)
    assert KEY not in str(error.value)
