"""A long run of a tiny model, watched from outside: ``python -m bench soak``.

Is its memory, are its open files, threads and steps the same at the end as in the beginning? It
trains with an average of the weights, measures, samples, checkpoints and keeps TensorBoard's files,
as a run of the command line does.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bench import cli, setting
from nlhf import config

DOC = Path("docs") / "soak.png"
STEPS = 2000
V = 512
# imports, the first checkpoints and the allocator's first growth are no part of it
WARM = 0.1
# what the last quarter may have more than the first one after that
MORE_MEMORY, MORE_SECONDS = 8.0, 1.10


@dataclass(frozen=True)
class Look:
    """At the process: steps done, resident MiB, open files, threads."""

    step: int
    mib: float
    files: int
    threads: int


def prefer(prompts: list[str], first: list[str], second: list[str]) -> torch.Tensor:
    """More even words win."""

    def even(text: str) -> float:
        words = [int(word[1:]) for word in text.split() if word.startswith("w")]
        return sum(word % 2 == 0 for word in words) / max(len(words), 1)

    gaps = [even(y) - even(z) for y, z in zip(first, second, strict=True)]
    return torch.tensor([4 * gap for gap in gaps]).sigmoid()


def prepare(folder: Path, steps: int) -> Path:
    """A model, prompts and the configuration of a run in a folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {
        "vocab_size": V,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "pad_token_id": setting.PAD,
        "eos_token_id": setting.EOS,
        "bos_token_id": None,
    }
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(folder / "model")
    setting.tokenizer(V).save_pretrained(folder / "model")
    # prompts of many lengths, so that no shape of a step is that of the step before
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(500):
        length = int(torch.randint(2, 25, (), generator=generator))
        ids = torch.randint(2, V, (1, length), generator=generator)
        rows.append({"prompt": setting.words(ids)[0]})
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "prompts.jsonl").write_text(text, encoding="utf-8")
    chosen = config.Config(
        model=str(folder / "model"), prompts=str(folder / "prompts.jsonl"),
        eval_prompts=str(folder / "prompts.jsonl"), preference="bench.soak:prefer",
        output=str(folder / "run"), algorithm="nash_mp", eta=1.0, ema_decay=0.99,
        max_new_tokens=16, steps=steps, batch_size=8, learning_rate=1e-3, device="cpu",
        eval_every=50, checkpoint_every=50, report_samples=16,
    )  # fmt: skip
    config.save(chosen, folder / "config.yaml")
    return folder / "config.yaml"


def watch(process: subprocess.Popen, metrics: Path) -> list[Look]:
    """Looks at a process twice a second, until it ends."""
    looks, steps, read = [], 0, 0
    proc = Path(f"/proc/{process.pid}")
    while process.poll() is None:
        time.sleep(0.5)
        if metrics.exists():
            with metrics.open("rb") as file:
                file.seek(read)
                new = file.read()
            steps, read = steps + new.count(b"\n"), read + len(new)
        try:
            status = (proc / "status").read_text(encoding="utf-8")
            found = dict(line.split(":", 1) for line in status.splitlines())
            files, threads = len(os.listdir(proc / "fd")), int(found["Threads"])
            looks.append(Look(steps, int(found["VmRSS"].split()[0]) / 1024, files, threads))
        except (OSError, KeyError):
            # it has ended meanwhile
            break
    process.wait()
    return looks


def quarters(values: Sequence[tuple[int, float]], steps: int) -> tuple[float, float]:
    """Medians of the first quarter of the steps, the warm-up left out, and of the last."""
    warm = WARM * steps
    first = [v for step, v in values if warm <= step < warm + steps / 4]
    last = [v for step, v in values if step >= steps * 3 / 4]
    return statistics.median(first), statistics.median(last)


def judge(looks: list[Look], seconds: list[float]) -> list[tuple[str, float, float, bool]]:
    """(what, in the first quarter, in the last, whether it is flat)."""
    steps = len(seconds)
    # after the last step comes the report, which is another work
    looks = [look for look in looks if look.step < steps]
    series = {
        "resident memory, MiB": [(x.step, x.mib) for x in looks],
        "open files": [(x.step, x.files) for x in looks],
        "threads": [(x.step, x.threads) for x in looks],
        "seconds a step": list(enumerate(seconds)),
    }
    found = []
    for what, values in series.items():
        a, b = quarters(values, steps)
        if what.startswith("resident"):
            flat = b <= a + MORE_MEMORY
        else:
            flat = b <= a * (MORE_SECONDS if what.startswith("seconds") else 1)
        found.append((what, a, b, flat))
    return found


def draw(looks: list[Look], seconds: list[float], path: Path) -> None:
    """The four curves as one image."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(10, 6), sharex=True, layout="constrained")
    panels = [
        ("resident memory, MiB", [x.step for x in looks], [x.mib for x in looks]),
        ("open files", [x.step for x in looks], [x.files for x in looks]),
        ("threads", [x.step for x in looks], [x.threads for x in looks]),
        ("milliseconds a step", range(len(seconds)), [1e3 * s for s in seconds]),
    ]
    for axis, (title, x, y) in zip(axes.flat, panels, strict=True):
        axis.plot(x, y, linewidth=0.9)
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
        # a rise that only a magnified axis shows is none
        top = statistics.quantiles(y, n=100)[-1] if title.startswith("milli") else max(y)
        axis.set_ylim(0, 1.15 * top)
    for axis in axes[-1]:
        axis.set_xlabel("step")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def run(folder: Path, steps: int) -> tuple[list[Look], list[float]]:
    """The looks at such a run, and the seconds of its steps."""
    path = prepare(folder, steps)
    command = [sys.executable, "-m", "nlhf", "train", "--config", str(path)]
    with (folder / "log.txt").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            looks = watch(process, folder / "run" / "metrics.jsonl")
        finally:
            process.kill()
    if process.returncode:
        raise cli.BadInput(f"soak: the run failed: {(folder / 'log.txt').read_text()[-2000:]}")
    text = (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    return looks, [sum(v for k, v in row.items() if k.startswith("seconds_")) for row in rows]


def main(argv: Sequence[str]) -> int:
    parser = cli.Parser("soak", "A long run of a tiny model: what grows?")
    parser.add_argument("--steps", type=cli.positive, default=STEPS)
    try:
        arguments = parser.parse(argv)
        if arguments.steps < 100:
            parser.error("--steps must be at least 100")
        with tempfile.TemporaryDirectory() as folder:
            looks, seconds = run(Path(folder), arguments.steps)
    except cli.BadInput as error:
        return cli.refuse(error)
    found = judge(looks, seconds)
    print(f"{arguments.steps} steps, {len(looks)} looks")
    print(f"{'':22} {'first quarter':>14} {'last quarter':>14}")
    for what, a, b, flat in found:
        print(f"{what:22} {a:14.3f} {b:14.3f}  {'flat' if flat else 'RISES'}")
    if arguments.save:
        draw(looks, seconds, DOC)
    return 0 if all(flat for *_, flat in found) else 1
