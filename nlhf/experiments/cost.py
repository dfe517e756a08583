"""What a step of each algorithm costs beside one of RLHF: seconds, tokens a second, memory."""

import resource
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

import torch

from nlhf import algorithms
from nlhf import policy as policies
from nlhf.config import Config
from nlhf.experiments.report import Result, Settings, Table, number
from nlhf.learner import Learner
from nlhf.parts import Parts
from nlhf.preference import as_preference
from nlhf.progress import track

NAME = "cost"
BASE = "rlhf"
# hidden size, its feed-forward layer, layers, vocabulary
SHAPES = {
    "1M": (128, 256, 2, 4096),
    "10M": (320, 896, 6, 8192),
    "30M": (512, 1408, 8, 16384),
}
# whether all weights are trained, or LoRA adapters
CASES = (("1M", 0), ("10M", 0), ("10M", 16), ("30M", 0))
PROMPT, ANSWER, BATCH = 8, 16, 8
NEEDS = {"tau": 0.05, "eta": 0.1, "ema_decay": 0.99, "inner_steps": 2}
# a cycle of every algorithm here, at two inner steps
CYCLE = 2


@dataclass(frozen=True)
class Job:
    algorithm: str
    shape: str
    lora_r: int
    steps: int
    seed: int
    device: str


@dataclass(frozen=True)
class Cost:
    """``seconds``: a step of the fastest cycle. ``memory``: peak bytes beyond the imports."""

    parameters: int
    seconds: float
    tokens_per_second: float
    memory: int


class Judge:
    """Prefers words of even number; next to nothing of the time, so that the step is the loop's."""

    def reward(self, prompts: list[str], responses: list[str]) -> torch.Tensor:
        words = [text.split() for text in responses]
        return torch.tensor([sum(int(w[1:]) % 2 == 0 for w in ws) / (len(ws) or 1) for ws in words])

    def __call__(self, prompts: list[str], first: list[str], second: list[str]) -> torch.Tensor:
        return torch.sigmoid(self.reward(prompts, first) - self.reward(prompts, second))


def run(settings: Settings) -> Result:
    """A step of every algorithm, at several sizes."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    steps = CYCLE * settings.count(3)
    cases = CASES[: settings.count(len(CASES))]
    jobs = [
        Job(name, shape, lora_r, steps, settings.seed, device)
        for shape, lora_r in cases
        for name in algorithms.ALGORITHMS
    ]
    costs = track(apart(jobs), NAME, len(jobs))
    found = {(j.shape, j.lora_r, j.algorithm): c for j, c in zip(jobs, costs, strict=True)}
    return Result(
        name=NAME,
        seed=settings.seed,
        settings={
            "prompts a step": BATCH,
            "tokens a prompt": PROMPT,
            "tokens an answer": ANSWER,
            "timed steps": steps,
            "device": device,
            **NEEDS,
        },
        tables=[_table(case, found) for case in cases],
        plot=lambda figure: _plot(figure, cases, found),
        meaning=_meaning(cases, found),
        notes=(
            "Seconds: a step of the fastest cycle of two. Memory: the highest resident size"
            + (" on the GPU" if device == "cuda" else "")
            + " beyond what it was before a model was made. The preference costs nothing here.",
        ),
    )


def apart(jobs: list[Job]) -> Iterator[Cost]:
    """The cost of each job, measured in a process of its own, one after the other."""
    context = get_context("forkserver")
    # these take seconds, and are no part of a step
    context.set_forkserver_preload([__name__, "transformers.models.llama.modeling_llama", "peft"])
    with ProcessPoolExecutor(1, context, max_tasks_per_child=1) as pool:
        yield from pool.map(measure, jobs)


def measure(job: Job) -> Cost:
    """Steps of an algorithm on a random Llama; the first cycle is not timed."""
    device = torch.device(job.device)
    before = _peak(device)
    learner = Learner(pieces(job))
    tokens, seconds = [], []
    for step in range(CYCLE + job.steps):
        start = time.perf_counter()
        row = learner.step(step)
        seconds.append(time.perf_counter() - start)
        phases = sum(v for k, v in row.items() if k.startswith("seconds_"))
        tokens.append(row["tokens_per_second"] * phases)
    # whatever else a machine does only adds to it: the fastest cycle is the least disturbed
    cycles = range(CYCLE, CYCLE + job.steps, CYCLE)
    best = min(cycles, key=lambda first: sum(seconds[first : first + CYCLE]))
    fastest, made = (sum(column[best : best + CYCLE]) for column in (seconds, tokens))
    return Cost(
        parameters=sum(p.numel() for p in learner.policy.parameters()),
        seconds=fastest / CYCLE,
        tokens_per_second=made / fastest,
        memory=_peak(device) - before,
    )


def pieces(job: Job) -> Parts:
    """A random Llama, a second one as its reference without adapters, and words as prompts."""
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, inner, layers, vocabulary = SHAPES[job.shape]
    shape = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        max_position_embeddings=PROMPT + ANSWER,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=vocabulary - 1,
        pad_token_id=None,
    )
    device = torch.device(job.device)
    torch.manual_seed(job.seed)
    model, ref = (LlamaForCausalLM(shape).to(device) for _ in range(2))
    ref.load_state_dict(model.state_dict())
    ref.requires_grad_(False).eval()
    if job.lora_r:
        model, ref = policies.lora(model, job.lora_r, 2 * job.lora_r), None
    prompts = [" ".join(f"w{BATCH * i + j}" for j in range(PROMPT)) for i in range(BATCH)]
    settings = Config(
        algorithm=job.algorithm,
        batch_size=BATCH,
        max_new_tokens=ANSWER,
        steps=CYCLE + job.steps,
        lora_r=job.lora_r,
        seed=job.seed,
        **NEEDS,
    )
    judge = as_preference(Judge())
    words = tokenizer(vocabulary)
    return Parts(settings, model, ref, words, prompts, [], judge, judge, None, device)


def tokenizer(vocabulary: int):
    """Words w0, w1, ... and a last token that ends and pads."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    end = "</s>"
    ids = {f"w{i}": i for i in range(vocabulary - 1)} | {end: vocabulary - 1}
    inner = Tokenizer(models.WordLevel(ids, unk_token=end))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token=end, pad_token=end, padding_side="left"
    )


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # kibibytes, but on macOS
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _table(case: tuple[str, int], found: dict) -> Table:
    lora_r = case[1]
    base = found[*case, BASE]
    rows = []
    for name in [BASE, *(n for n in algorithms.ALGORITHMS if n != BASE)]:
        cost = found[*case, name]
        rows.append(
            [
                name,
                cost.seconds,
                f"{cost.seconds / base.seconds:.2f}",
                round(cost.tokens_per_second),
                f"{cost.memory / 2**20:.0f}",
                f"{cost.memory / base.memory:.2f}",
            ]
        )
    weights = f"LoRA of rank {lora_r}" if lora_r else "all weights trained"
    columns = ["algorithm", "seconds a step", "x RLHF", "tokens a second", "memory, MiB", "x RLHF"]
    return Table(f"{base.parameters / 1e6:.3g} million parameters, {weights}", columns, rows)


def _plot(figure, cases: tuple, found: dict) -> None:
    figure.set_size_inches(11, 6)
    axes = figure.subplots(1, 2, sharey=True)
    names = list(algorithms.ALGORITHMS)
    height = 0.8 / len(cases)
    for axis, attribute in zip(axes, ("seconds", "memory"), strict=True):
        for i, case in enumerate(cases):
            base = getattr(found[*case, BASE], attribute)
            ratios = [getattr(found[*case, name], attribute) / base for name in names]
            places = [row + i * height for row in range(len(names))]
            label = f"{case[0]}, LoRA" if case[1] else case[0]
            axis.barh(places, ratios, height, label=label)
        axis.axvline(1, color="grey", linewidth=0.8)
        axis.set(xlabel=f"{attribute} of a step, times RLHF's")
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks([row + 0.4 - height / 2 for row in range(len(names))], names)
    axes[0].invert_yaxis()
    axes[1].legend()


def _meaning(cases: tuple, found: dict) -> str:
    lines = []
    for case in cases:
        base = found[*case, BASE]
        ratio = {n: found[*case, n].seconds / base.seconds for n in algorithms.ALGORITHMS}
        memory = {n: found[*case, n].memory / base.memory for n in algorithms.ALGORITHMS}
        slow, big = max(ratio, key=ratio.get), max(memory, key=memory.get)
        lines.append(
            f"At {case[0]}{' with LoRA' if case[1] else ''} a step of Nash-MD-PG takes "
            f"{ratio['nash_md_pg']:.2f} times as long as one of RLHF ({number(base.seconds)} s); "
            f"the slowest is {slow} ({ratio[slow]:.2f}), and {big} needs the most memory "
            f"({memory[big]:.2f} times as much)."
        )
    return " ".join(lines)
