"""What the compiler makes of every kernel, for GPUs that need not be there.

Compiles each Triton kernel and .cu file for sm_80, sm_90 and sm_100, reads registers, spills, load
widths and the instructions of an element from the machine code, and predicts from these what an
H200 could reach. Exit status 1 if a kernel spills, needs more registers than its bound or loads
contiguous logits in narrow pieces. Needs TRITON_INTERPRET unset: the interpreter and the compiler
cannot share a process.
"""

import argparse
import concurrent.futures
import dataclasses
import hashlib
import itertools
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench import h200, rows, sass
from bench.kernels import KERNELS, WARP, signature

ARCHITECTURES = (80, 90, 100)
# an H200's
PREDICTED = 90
DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}
USUAL = ("float32", "bfloat16")
REGISTERS_FLOAT64 = 224
# how many kernels a process compiles before it disassembles them
TOGETHER = 16
UNITS = ("mufu", "fma", "other", "alu", "load", "store")
SAVED = rows.RESULTS / "aot.jsonl"
# what the last run over all kernels found, and what it found it of
KEPT = rows.ROOT / "build" / "aot.json"
MAKERS = ("aot", "h200", "kernels", "sass", "yardsticks")


@dataclass(frozen=True)
class Job:
    kernel: str
    variant: str
    dtype: str
    arch: int


def jobs() -> list[Job]:
    """What is compiled: the first variant of a kernel for every dtype, the others for two.

    float64 is for checks, not for speed, and takes the compiler longest: one architecture.
    """
    chosen = []
    for name, kernel in KERNELS.items():
        for place, variant in enumerate(kernel.variants):
            dtypes = kernel.of(variant).dtypes or (USUAL if place else tuple(DTYPES))
            for dtype in dtypes:
                targets = (PREDICTED,) if dtype == "float64" else ARCHITECTURES
                chosen += [Job(name, variant, dtype, target) for target in targets]
    return chosen


def quick(job: Job) -> bool:
    """One architecture and dtype: numbers per token are float32 where logits are bfloat16."""
    dtypes = KERNELS[job.kernel].dtypes or USUAL
    dtype = "bfloat16" if "bfloat16" in dtypes else "float32"
    return job.arch == PREDICTED and job.dtype == dtype


def compiled(job: Job) -> tuple[str, bytes, int]:
    """(what cuobjdump says of the kernel, its machine code, bytes of shared memory of a block)."""
    kernel = KERNELS[job.kernel].of(job.variant)
    variant = kernel.variants[job.variant]
    source = ASTSource(kernel.function, *signature(kernel, variant, DTYPES[job.dtype]))
    target = GPUTarget("cuda", job.arch, WARP)
    found = triton.compile(source, target=target, options=kernel.options)
    cubin = found.asm["cubin"]
    usage = run_tool(triton.knobs.nvidia.cuobjdump.path, "-res-usage", cubin)
    return usage, sass.section(cubin, f".text.{job.kernel}"), found.metadata.shared


def run_tool(path: str, *arguments: str | bytes) -> str:
    """What a tool prints of a file with these bytes, its last argument."""
    *flags, content = arguments
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        command = [path, *flags, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def disassembled(arch: int, codes: list[bytes]) -> list[str]:
    """The text of each. One call for all, since nvdisasm takes long to start."""
    # as Triton names the targets
    name = f"SM{arch}a" if arch >= 90 else f"SM{arch}"
    text = run_tool(triton.knobs.nvidia.nvdisasm.path, "--binary", name, b"".join(codes))
    return sass.parts(text, [len(code) for code in codes])


def examine(job: Job) -> dict:
    """The row of one kernel, with what is wrong with it."""
    return examine_all([job])[0]


def examine_all(work: list[Job]) -> list[dict]:
    found = [compiled(job) for job in work]
    texts = {}
    for arch in {job.arch for job in work}:
        at = [i for i, job in enumerate(work) if job.arch == arch]
        texts |= zip(at, disassembled(arch, [found[i][1] for i in at]), strict=True)
    return [
        judge(job, usage + texts[i], shared)
        for i, (job, (usage, _, shared)) in enumerate(zip(work, found, strict=True))
    ]


def judge(job: Job, text: str, shared: int) -> dict:
    kernel = KERNELS[job.kernel].of(job.variant)
    variant = kernel.variants[job.variant]
    code = sass.instructions(text)
    loops = sass.innermost_loops(code) if variant.loops else [sass.live_code(code)]
    hot = loops[: len(loops) - variant.rare]
    found = sass.counts(x for loop in hot for x in loop)
    per_element = {unit: found[unit] / kernel.elements for unit in UNITS}
    kinds = {name: count for name, count in found.items() if name.startswith("MUFU.")}
    row = {
        "kind": "aot",
        **dataclasses.asdict(job),
        "arch": f"sm_{job.arch}",
        **sass.resources(text),
        "shared_bytes": shared,
        "per_element": per_element,
        "mufu": {name[5:]: count / kernel.elements for name, count in sorted(kinds.items())},
        "loops": len(loops) if variant.loops else 0,
        "bound": None,
        "limit_gbps": None,
        "limit_share": None,
        "occupancy": None,
        "triton": triton.__version__,
    }
    if predicted(job):
        moved = variant.values * BYTES[job.dtype] + variant.more
        warps = kernel.options["num_warps"]
        row["bound"], row["limit_gbps"], row["limit_share"] = h200.limit(per_element, moved)
        row["occupancy"] = h200.occupancy(row["registers"], shared, warps)
    return row | {"faults": faults(job, row)}


def predicted(job: Job) -> bool:
    # an exponential in float64 is a subroutine, and its units are others
    return job.arch == PREDICTED and job.dtype != "float64"


def faults(job: Job, row: dict) -> list[str]:
    kernel = KERNELS[job.kernel]
    loops = kernel.variants[job.variant].loops
    most = REGISTERS_FLOAT64 if job.dtype == "float64" else kernel.registers
    wrong = []
    if row["stack"] or row["spills"]:
        wrong.append("spills")
    if row["registers"] > most:
        wrong.append(f"more than {most} registers")
    if row["load_bits"] < kernel.load_bits:
        wrong.append(f"no {kernel.load_bits}-bit load")
    if predicted(job) and row["loops"] != loops:
        wrong.append(f"{row['loops']} hot loops, must be {loops}")
    return wrong


def compile_cuda() -> tuple[str, list[str]]:
    """Compile every ``.cu``; returns what was done, and the faults."""
    sources = sorted((rows.ROOT / "csrc" / "cuda").glob("*.cu"))
    nvcc = shutil.which("nvcc")
    if not sources or nvcc is None:
        found = "found" if nvcc else "not found"
        return f"{len(sources)} .cu files, nvcc {found}: none compiled", []
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    wrong = []
    for source in sources:
        with tempfile.TemporaryDirectory() as folder:
            output = ["-o", f"{folder}/object.o", f"-I{rows.ROOT / 'csrc'}"]
            command = [nvcc, "-c", "-O3", "-std=c++17", "-Xptxas=-v", *targets, *output, source]
            result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            wrong.append(f"{source.name}: {result.stderr}")
        elif re.search(r"\b[1-9]\d* bytes spill", result.stderr):
            wrong.append(f"{source.name}: spills")
    return (
        f"{len(sources)} .cu files compiled for sm_{', sm_'.join(map(str, ARCHITECTURES))}",
        wrong,
    )


def compile_all(work: list[Job]) -> Iterator[dict]:
    """The row of each job, in their order, as soon as it is there."""
    parts = [work[i : i + TOGETHER] for i in range(0, len(work), TOGETHER)]
    context = multiprocessing.get_context("spawn")
    workers = min(os.cpu_count() or 1, 8, len(parts))
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        yield from itertools.chain.from_iterable(pool.map(examine_all, parts))


def fingerprint() -> str:
    """Of the kernels, of what reads their code, and of the compiler."""
    sources = [*(rows.ROOT / "nlhf_kernels" / "backends" / "triton").rglob("*.py")]
    sources += [rows.ROOT / "bench" / f"{name}.py" for name in MAKERS]
    digest = hashlib.sha256(triton.__version__.encode())
    for path in sorted(sources):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def keep(found: list[dict]) -> None:
    KEPT.parent.mkdir(exist_ok=True)
    KEPT.write_text(json.dumps({"of": fingerprint(), "rows": found}), encoding="utf-8")


def kept() -> list[dict]:
    """The rows of the last run over all kernels; none if anything has changed since."""
    if not KEPT.exists():
        return []
    last = json.loads(KEPT.read_text(encoding="utf-8"))
    return last["rows"] if last["of"] == fingerprint() else []


RESOURCES = (
    f"{'kernel':27} {'variant':12} {'dtype':8} {'arch':7} regs stack spills shared load bits"
)
PREDICTIONS = f"""
What an H200 could reach with these instructions: predicted, not measured. Assumed:
{h200.COPY / 1e12:.1f} TB/s, {h200.SMS} SMs at {h200.CLOCK / 1e9:.2f} GHz, per SM and cycle \
{h200.LANES["mufu"]} special functions, {h200.LANES["fma"]} FMA,
{h200.LANES["alu"]} integer and comparison (alu, a part of other), {h200.LANES["issue"]} of all \
instructions. Instructions are per element.

{"kernel":27} {"variant":12} {"dtype":8} \
 mufu   fma other   alu  load store  occ. bound   GB/s share
"""


def resource_line(row: dict) -> str:
    numbers = "{registers:4} {stack:5} {spills:6} {shared_bytes:6} {load_bits:9}".format(**row)
    said = "".join(f" {x}" for x in row["faults"])
    return (
        f"{row['kernel']:27} {row['variant']:12} {row['dtype']:8} {row['arch']:7} {numbers}{said}"
    )


def prediction_line(row: dict) -> str:
    each = " ".join(f"{row['per_element'][unit]:5.2f}" for unit in UNITS)
    kinds = ", ".join(f"{name} {count:.2f}" for name, count in row["mufu"].items())
    return (
        f"{row['kernel']:27} {row['variant']:12} {row['dtype']:8} {each} {row['occupancy']:6.0%}"
        f" {row['bound']:6} {row['limit_gbps']:6.0f} {row['limit_share']:5.0%}  {kinds}"
    )


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench aot",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--list", action="store_true", help="name the kernels and stop")
    parser.add_argument("--kernel", choices=KERNELS, help="this kernel only")
    parser.add_argument("--arch", type=int, choices=ARCHITECTURES, help="this architecture only")
    parser.add_argument(
        "--quick", action="store_true", help=f"sm_{PREDICTED} and bfloat16 logits only"
    )
    parser.add_argument("--json", action="store_true", help="rows as JSON lines, nothing else")
    parser.add_argument(
        "--save", action="store_true",
        help=f"append the rows of sm_{PREDICTED} that have a prediction to bench/results/aot.jsonl",
    )  # fmt: skip
    args = parser.parse_args(argv)
    if args.quick and args.arch not in (None, PREDICTED):
        parser.error(f"--quick is sm_{PREDICTED}: leave out --arch {args.arch}")
    return args


def main(argv: list[str]) -> int:
    args = parse(argv)
    if args.list:
        print("\n".join(KERNELS))
        return 0
    if triton.knobs.runtime.interpret:
        print("unset TRITON_INTERPRET: it and the compiler cannot share a process", file=sys.stderr)
        return 2
    work = [
        job
        for job in jobs()
        if args.kernel in (None, job.kernel)
        and args.arch in (None, job.arch)
        and (not args.quick or quick(job))
    ]
    if not args.json:
        print(f"triton {triton.__version__}\n{RESOURCES}")
    found = []
    for row in compile_all(work):
        found.append(rows.stamp("cpu") | row)
        print(json.dumps(found[-1]) if args.json else resource_line(row), flush=True)
    wrong = [f"{name(row)}: {what}" for row in found for what in row["faults"]]
    predictions = [row for row in found if row["bound"]]
    if not args.json and predictions:
        print(PREDICTIONS + "\n".join(map(prediction_line, predictions)) + "\n")
    log = sys.stderr if args.json else sys.stdout
    if work == jobs():
        keep(found)
        done, more = compile_cuda()
        print(done, file=log)
        wrong += more
    if args.save:
        rows.append(SAVED, predictions)
    said = ["FAILED", *wrong] if wrong else [f"{len(work)} compilations, no fault"]
    print("\n".join(said), file=log)
    return 1 if wrong else 0


def name(row: dict) -> str:
    return " ".join(row[x] for x in ("kernel", "variant", "dtype", "arch"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
