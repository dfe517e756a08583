"""What ``bench gpu`` is made of: which commands, for how long, and how they went."""

import dataclasses
import importlib.util
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from bench.losses import NAMES as LOSSES
from bench.sampling import NAMES as SAMPLING
from bench.setting import MODELS
from nlhf_kernels.testing import OPS

PYTHON = sys.executable
# those with targets on a GPU; tests/conftest.py makes one of every backend there
TESTS = (
    "ops", "sampling", "sampling_exact", "wrong_input", "estimator", "triton", "rollout",
    "decoding", "paths",
)  # fmt: skip
UPDATES = ("pair_loss", "ema_update")
# model, LoRA rank
STEPS = (("qwen2.5-1.5b", 0), ("llama3-8b", 16), ("qwen2.5-0.5b", 0))
# part -> what stands behind its colon in --only, and what that may be; () is anything
NARROWED_BY = {
    "check": ("OP", tuple(OPS)),
    "ops": ("OP", tuple(OPS)),
    "sampling": ("NAME", SAMPLING),
    "losses": ("NAME", LOSSES),
    "step": ("MODEL", tuple(MODELS)),
    "tests": ("EXPRESSION of pytest -k", ()),
    "sanitizer": ("OP", tuple(OPS)),
}


@dataclasses.dataclass(frozen=True)
class Command:
    name: str
    arguments: list[str]
    env: dict[str, str] = dataclasses.field(default_factory=dict)
    # at most; 0: all that its part has
    seconds: float = 0


@dataclasses.dataclass(frozen=True)
class Part:
    name: str
    # at most, and never more than is left of the whole
    seconds: float
    commands: tuple[Command, ...] = ()
    # why it does not run at all
    skip: str = ""
    # rows and log -> a note; one that begins with "wrong" says so
    judge: Callable[[list[dict], str], str] = lambda rows, log: ""
    # log -> why the tool turned out not to work here; "" if it did
    unavailable: Callable[[str], str] = lambda log: ""
    # a profiled run is not a measured one
    keep_rows: bool = True


def build(device: str, only: list[str], out: Path) -> Part:
    arguments = [PYTHON, "setup.py", "-q", "build_ext", "--inplace"]
    return Part("build", 60, (Command("build", arguments, {"NLHF_REQUIRE_NATIVE": "1"}),))


def check(device: str, only: list[str], out: Path) -> Part:
    ops = [x for op in only for x in ("--op", op)]
    arguments = [PYTHON, "-m", "bench.gpu_check", "--device", device, *ops]

    def judge(rows: list[dict], log: str) -> str:
        # no kernel may be absent; single cases may be refused
        right = {row["op"] for row in rows if row["status"] == "ok"}
        none = [op for op in only or OPS if op not in right]
        return f"wrong: not one case of {', '.join(none)} is right" if none else ""

    return Part("check", 90, (Command("check", arguments),), judge=judge)


def ops(device: str, only: list[str], out: Path) -> Part:
    arguments = [PYTHON, "-m", "bench", "--device", device, "--json", *_quick(device)]
    arguments += ["--op", ",".join(only)] if only else []
    return Part("ops", 110, (Command("ops", arguments),))


def sampling(device: str, only: list[str], out: Path) -> Part:
    arguments = [PYTHON, "-m", "bench", "sampling", "--device", device, "--json"]
    # all shapes, and what must be compiled, for who has asked for a part of it
    arguments += ["--only", ",".join(only)] if only else ["--quick"]
    return Part("sampling", 60, (Command("sampling", arguments),))


def losses(device: str, only: list[str], out: Path) -> Part:
    arguments = [PYTHON, "-m", "bench", "losses", "--device", device, "--json"]
    arguments += ["--only", ",".join(only)] if only else ["--quick"]
    return Part("losses", 75, (Command("losses", arguments),))


def step(device: str, only: list[str], out: Path) -> Part:
    steps = [x for x in STEPS if not only or x[0] in only]
    # a model that is not in the list runs without LoRA
    steps += [(model, 0) for model in only if model not in dict(STEPS)]
    if device == "cpu" and not only:
        return Part("step", 60, (Command("quick", _step(device, "", 0)),))
    return Part("step", 140, tuple(Command(m, _step(device, m, r), {}, 90) for m, r in steps))


def _step(device: str, model: str, lora_r: int, new_tokens: int = 512) -> list[str]:
    base = [PYTHON, "-m", "bench", "step", "--device", device, "--json", *_quick(device)]
    if model:
        base += ["--model", model]
    if device == "cuda":
        sizes = {"--prompts": 32, "--prompt-tokens": 512, "--new-tokens": new_tokens}
        base += ["--dtype", "bfloat16", *(str(x) for pair in sizes.items() for x in pair)]
    return [*base, "--lora-r", str(lora_r)] if lora_r else base


def tests(device: str, only: list[str], out: Path) -> Part:
    if importlib.util.find_spec("pytest") is None:
        return Part("tests", 0, skip="pytest is not installed")
    # the quickest proof that this part works is enough without a GPU
    names = TESTS if device == "cuda" else ("ops",)
    where = "(cuda or test_triton)" if device == "cuda" else "(matches_the_oracle and cpp)"
    which = f"{where} and ({' or '.join(only)})" if only else where
    files = [f"tests/test_{name}.py" for name in names]
    arguments = [PYTHON, "-m", "bench.gpu_tests", *files, "-k", which]
    return Part("tests", 80, (Command("tests", arguments),))


def scaling(device: str, only: list[str], out: Path) -> Part:
    arguments = [PYTHON, "-m", "bench", "scaling", "--device", device, "--json", *_quick(device)]
    return Part("scaling", 40, (Command("scaling", arguments),))


def sanitizer(device: str, only: list[str], out: Path) -> Part:
    tool = _compute_sanitizer()
    if device == "cpu":
        return Part("sanitizer", 0, skip="it watches GPU memory only")
    if not tool:
        return Part("sanitizer", 0, skip="compute-sanitizer is not here")
    arguments = [tool, "--tool", "memcheck", "--error-exitcode", "9", PYTHON]
    arguments += ["-m", "bench.gpu_check", "--small", "--shard", "0/1", "--device", device]
    arguments += [x for op in only for x in ("--op", op)]
    # torch would hand out pieces of large blocks, and an access beyond a piece is not one beyond
    # its block
    env = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}

    def judge(rows: list[dict], log: str) -> str:
        counts = [int(x) for x in re.findall(r"ERROR SUMMARY: (\d+) error", log)]
        if any(counts):
            return f"wrong: memcheck found {sum(counts)} errors, see sanitizer.log"
        return "memcheck found nothing" if counts else "memcheck did not get to its summary"

    def unavailable(log: str) -> str:
        found = re.search(r"Device not supported.*|Unable to .*profiler.*", log)
        return f"compute-sanitizer: {found[0].strip()}" if found else ""

    commands = [Command("memcheck", arguments, env)]
    # the ops that are not of logits have no cases; one that is asked for by name is one that has
    if not only and importlib.util.find_spec("pytest"):
        tests = [f"tests/test_{name}.py" for name in UPDATES]
        chosen = "triton-cuda and not (gradcheck or opcheck or compiles or unbiased)"
        arguments = [*arguments[:5], PYTHON, "-m", "pytest", "-p", "no:cacheprovider", *tests]
        commands.append(Command("memcheck updates", [*arguments, "-k", chosen], env))
    return Part("sanitizer", 90, tuple(commands), judge=judge, unavailable=unavailable)


def profile(device: str, only: list[str], out: Path) -> Part:
    model = STEPS[0][0] if device == "cuda" else ""
    # short: a trace grows with every kernel of every token
    arguments = [*_step(device, model, 0, new_tokens=8), "--profile", str(out / "profile")]

    def judge(rows: list[dict], log: str) -> str:
        traces = sorted(out.glob("profile/**/*.json"))
        if not traces:
            return "wrong: it left no trace"
        size = sum(x.stat().st_size for x in traces) / 1e6
        return f"{traces[0].relative_to(out)}, {size:.0f} MB"

    return Part("profile", 45, (Command("profile", arguments),), judge=judge, keep_rows=False)


PARTS = {
    "build": build,
    "check": check,
    "ops": ops,
    "sampling": sampling,
    "losses": losses,
    "step": step,
    "tests": tests,
    "scaling": scaling,
    "sanitizer": sanitizer,
    "profile": profile,
}


def _quick(device: str) -> list[str]:
    return ["--quick"] if device == "cpu" else []


def _compute_sanitizer() -> str:
    """On the path, beside nvcc, or in the usual place of the toolkit; "" if nowhere."""
    folders = [Path(nvcc).resolve().parent] if (nvcc := shutil.which("nvcc")) else []
    folders += [Path("/usr/local/cuda/bin"), Path("/usr/local/cuda/compute-sanitizer")]
    name = "compute-sanitizer"
    found = shutil.which(name) or next((x for f in folders if (x := shutil.which(f / name))), None)
    return str(found or "")
