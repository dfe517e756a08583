"""Nothing that is read runs code, and a key stays where it belongs."""

import ast
import json
import logging
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from nlhf import cli, policy, preference, serving, tabular
from nlhf.commands import models
from tests import serving as local
from tests import tiny
from tests.serving import KEY, PAIRS, TEMPLATE, chat, judge
from tests.test_repo import PACKAGES

pytestmark = pytest.mark.usefixtures("one_thread")

# ---- the sources

MODULES = {"pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.hub.load"}
CALLS |= {f"yaml.{name}" for name in ("load", "load_all", "full_load", "unsafe_load")}
CALLS |= {f"yaml.{name}" for name in ("Loader", "FullLoader", "UnsafeLoader")}
CALLS |= {"torch.jit.load", "pandas.read_pickle", "numpy.lib.format.read_array"}
KEYWORDS = {"trust_remote_code": True, "verify": False, "shell": True, "allow_pickle": True}


def dangers(source: str) -> list[str]:
    """What in a module reads pickles, runs text, or trusts what it should not."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            found += [name for name in names if name.partition(".")[0] in MODULES]
        elif isinstance(node, ast.Attribute | ast.Name):
            name = ast.unparse(node)
            found += [name] if name in CALLS else []
        elif isinstance(node, ast.Call):
            given = {
                k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)
            }
            found += [k for k, value in KEYWORDS.items() if given.get(k, not value) == value]
            if ast.unparse(node.func) == "torch.load" and given.get("weights_only") is not True:
                found.append("torch.load")
    return found


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import loads",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "yaml.load(text)",
        "yaml.compose(text, yaml.Loader)",
        "eval('1')",
        "os.system('ls')",
        "f(trust_remote_code=True)",
        "httpx2.Client(verify=False)",
        "np.load(path, allow_pickle=True)",
        "subprocess.run('ls', shell=True)",
    ],
)
def test_the_audit_sees_what_is_dangerous(line):
    assert dangers(line)
    assert not dangers("torch.load(path, weights_only=True); model.eval(); yaml.safe_load(text)")


@pytest.mark.parametrize("path", PACKAGES, ids=lambda path: path.stem)
def test_no_module_reads_pickles_or_runs_text(path):
    assert dangers(path.read_text(encoding="utf-8")) == []


# ---- folders


class Payload:
    """A pickle that makes a folder when it is read."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return Path.mkdir, (self.folder,)


@pytest.fixture
def pwned(tmp_path) -> Path:
    return tmp_path / "pwned"


PICKLES = ("pytorch_model.bin", "adapter_model.bin", "training_args.bin", "optimizer.pt")
PICKLES += ("scheduler.pt", "rng_state.pth", "head.bin", "model.pt", "tokenizer.pkl")


def poison(folder: Path, pwned: Path) -> None:
    """A pickle under every name by which one is known, old and new format, and the index of one."""
    for i, name in enumerate(PICKLES):
        if i % 2:
            (folder / name).write_bytes(pickle.dumps(Payload(pwned)))
        else:
            torch.save(Payload(pwned), folder / name)
    weights = {"weight_map": {"model.norm.weight": "pytorch_model.bin"}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(weights))


@pytest.fixture
def saved(tmp_path) -> Path:
    """model/, adapters/ on it and preference/, as they are saved."""
    model, tokenizer = tiny.llama(dtype=torch.float32), tiny.tokenizer()
    policy.save(model, tokenizer, tmp_path / "model")
    preference.RewardModel(model, tokenizer).save_pretrained(tmp_path / "preference")
    adapted = tiny.with_lora(tiny.llama(dtype=torch.float32))
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "model")
    adapted.save_pretrained(tmp_path / "adapters")
    return tmp_path


LOADERS = {
    "model": lambda f: policy.load_model(f / "model"),
    "adapters": lambda f: models.load(str(f / "adapters"), torch.float32, "cpu"),
    "preference/trunk": lambda f: preference.load_trunk(f / "preference" / "trunk"),
    "preference": lambda f: preference.load_preference(f / "preference"),
}


def test_the_payload_would_go_off(tmp_path, pwned):
    poison(tmp_path, pwned)
    torch.load(tmp_path / "pytorch_model.bin", weights_only=False)
    assert pwned.is_dir()


@pytest.mark.parametrize("name", LOADERS)
def test_a_pickle_is_never_read(saved, pwned, name):
    folder, load = saved / name, LOADERS[name]
    poison(folder, pwned)
    # beside the weights it does not count
    load(saved)
    for file in folder.rglob("*.safetensors"):
        file.unlink()
    with pytest.raises(ValueError, match="safetensors") as error:
        load(saved)
    assert str(folder) in str(error.value)
    assert str(error.value).splitlines() == [str(error.value)]
    assert not pwned.exists()


def test_a_game_is_no_pickle(tmp_path, pwned):
    np.save(tmp_path / "game.npy", np.array([[Payload(pwned)]]), allow_pickle=True)
    (tmp_path / "bare.npy").write_bytes(pickle.dumps(Payload(pwned)))
    for name in ("game", "bare"):
        with pytest.raises(ValueError, match=name):
            tabular.read(tmp_path / f"{name}.npy")
    assert not pwned.exists()


CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

Path({marker!r}).mkdir(exist_ok=True)

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig

class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def coded(saved, pwned, monkeypatch) -> Path:
    """model/ and preference/trunk/ come with code of their own."""
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(saved / "modules"))
    monkeypatch.syspath_prepend(str(saved / "modules"))
    for folder in (saved / "model", saved / "preference" / "trunk"):
        for name, own in (
            ("config.json", {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel",
                             "AutoModel": "own.OwnModel"}),
            ("tokenizer_config.json", {"AutoTokenizer": [None, "own.OwnTokenizer"]}),
        ):  # fmt: skip
            stated = json.loads((folder / name).read_text()) | {"auto_map": own}
            if name == "config.json":
                stated["model_type"] = "own"
            (folder / name).write_text(json.dumps(stated))
        (folder / "own.py").write_text(CODE.format(marker=str(pwned)))
    pairs = [{"prompt": f"w{i}", "chosen": "w2", "rejected": "w4"} for i in range(3)]
    rows = [{"completion": "w5"} | row for row in pairs]
    for name in ("pairs", "good"):
        (saved / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(saved)
    return saved


RUNS = {
    "train": "train --model model --prompts pairs.jsonl --preference builtins:print --output out",
    "generate": "generate --model model --prompt w1 --output out --max-new-tokens 1",
    "ref": "generate --model adapters --ref model --prompt w1 --output out",
    "evaluate": "evaluate good.jsonl model --preference builtins:print --output out",
    "preference": "preference --trunk model --pairs pairs.jsonl --output out",
    "judge": "evaluate good.jsonl pairs.jsonl --preference preference/trunk/.. --output out",
}


@pytest.mark.parametrize("name", RUNS)
def test_code_in_a_folder_is_refused_in_one_line(coded, pwned, monkeypatch, capsys, name):
    if name == "judge":
        # as it would be if it had been saved like that
        path = coded / "preference" / "preference.json"
        stated = json.loads(path.read_text())
        del stated["sha256"]
        path.write_text(json.dumps(stated | {"format": 1}))
    # a question would be a way round the flag
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(SystemExit) as stop:
        cli.main(RUNS[name].split())
    assert stop.value.code == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("nlhf")]
    assert "comes with code of its own" in line
    assert "--trust-remote-code" in line
    assert not pwned.exists()
    assert not (coded / "out").exists()


def test_code_that_is_trusted_runs(coded, pwned, capsys):
    """Or the tests above would hold for code that never runs."""
    cli.main([*RUNS["generate"].split(), "--trust-remote-code"])
    assert pwned.is_dir()


# ---- the key of a judge


def echoes() -> list:
    """Answers with the key wherever one may be; cut where a message would cut them."""
    long = "x" * 30 + KEY
    return [
        KEY,
        [KEY],
        {KEY: KEY},
        {"choices": KEY},
        {"choices": long},
        {"choices": [long]},
        {"choices": [{"message": {"content": [long]}}]},
        {"choices": [{"logprobs": {"content": long}}]},
        {"choices": [{"logprobs": {"content": [{"token": KEY, "logprob": long}]}}]},
        {"choices": [{"logprobs": {"content": [{"token": "A", "top_logprobs": long}]}}]},
        {"choices": [{"message": {"content": f"A {KEY}"}}]},
        {"data": [{"id": KEY}, {"id": long}]},
        {"data": [{"id": long}]},
        {"data": long},
    ]


def check_no_part(text: str) -> None:
    """Not even the beginning of the key is there."""
    assert KEY[:8] not in text
    assert KEY[-8:] not in text


@pytest.fixture
def keyed(monkeypatch, caplog):
    """The key is in the environment, and every line of any log is kept."""
    monkeypatch.setenv("NLHF_TEST_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    yield
    check_no_part(caplog.text)


@pytest.mark.usefixtures("keyed")
@pytest.mark.parametrize("place", ["answers", "errors", "headers", "models", "escaped"])
def test_a_server_that_says_the_key_back_finds_no_echo(place, tmp_path):
    cache, echo = tmp_path / "cache.db", None
    with local.serve(lambda path, body: echo) as server:

        class Echo(server.RequestHandlerClass):
            def _reply(self, fault, body):
                content = json.dumps(echo)
                if place == "escaped":
                    content = content.replace(KEY, "".join(f"\\u{ord(c):04x}" for c in KEY))
                self.send_response(400 if place == "errors" else 200, f"said {KEY}")
                if place == "headers":
                    for name in ("X-Key", "Set-Cookie", "Location", "Retry-After"):
                        self.send_header(name, KEY)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content.encode())

        server.RequestHandlerClass = Echo
        named = {"model": ""} if place == "models" else {}
        asked = judge(server, api_key_env="NLHF_TEST_KEY", retries=0, cache=str(cache), **named)
        for i, answer in enumerate(echoes()):
            echo, said = answer, ""
            try:
                asked([f"x{i}"], ["a"], ["b"])
            except ValueError as error:
                said = str(error) + repr(error.__cause__)
            check_no_part(said + repr(asked.settings) + repr(asked.stats))
        assert len(server.seen) >= len(echoes())
    check_no_part(cache.read_bytes().decode("latin-1"))


@pytest.mark.usefixtures("keyed")
def test_an_engine_that_says_the_key_back_finds_no_echo():
    long = "x" * 50 + KEY
    for answer in (
        {"choices": [{"logprobs": {"tokens": [long], "token_logprobs": [0.0]}}]},
        {"choices": [{"logprobs": {"token_logprobs": [0.0]}, "token_ids": [long],
                      "finish_reason": "stop"}]},
        {"choices": [{"logprobs": {"token_logprobs": []}, "token_ids": [],
                      "prompt_token_ids": long, "finish_reason": long}]},
    ):  # fmt: skip
        with local.serve(lambda path, body, answer=answer: answer) as server:
            options = {"max_new_tokens": 2, "end_tokens": [2], "pad_token_id": 0, "seed": 0}
            options |= {"key_env": "NLHF_TEST_KEY", "retries": 0}
            ids = torch.ones(1, 2, dtype=torch.int64)
            with pytest.raises(ValueError, match="serv") as error:
                serving.complete(server.url, ids, ids, **options)
            check_no_part(str(error.value))


@pytest.mark.usefixtures("keyed")
def test_the_key_is_in_no_file_of_an_evaluation(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("good", "bad"):
        row = {"prompt": "x", "completion": name}
        Path(f"{name}.jsonl").write_text(json.dumps(row) + "\n")

    def answer(path, body):
        return chat("A") | {"id": KEY, "model": KEY} if path != "/v1/models" else local.models(KEY)

    with local.serve(answer) as server:
        Path("judge.yaml").write_text(
            f"url: {server.url}\ntemplate: '{TEMPLATE}'\ncache: cache.db\n"
            "api_key_env: NLHF_TEST_KEY\n"
        )
        words = ["evaluate", "good.jsonl", "bad.jsonl", "--preference", "judge.yaml"]
        cli.main([*words, "--output", "out"])
        assert server.seen[0][1]["Authorization"] == f"Bearer {KEY}"
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert tmp_path / "out" / "evaluation.json" in written
    for path in written:
        check_no_part(path.read_bytes().decode("latin-1"))
    said = capsys.readouterr()
    check_no_part(said.out + said.err)


def test_a_short_key_is_no_word_to_take_out(monkeypatch):
    """Local servers take anything for a key: an answer that has it is still an answer."""
    monkeypatch.setenv("NLHF_TEST_KEY", "A")
    with local.serve(lambda path, body: chat("A")) as server:
        asked = judge(server, api_key_env="NLHF_TEST_KEY", both_orders=False)
        assert asked(*PAIRS).tolist() == [1.0] * 3
