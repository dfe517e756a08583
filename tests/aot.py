"""Compile every kernel ahead of time for GPUs that need not be there, and read the machine code.

Run by ``make ci`` and ``tests/test_aot.py``, without ``TRITON_INTERPRET``: the interpreter and the
compiler cannot share a process. One row per kernel, dtype and architecture; exit status 1 if one
spills, needs more registers than its bound, or loads contiguous logits in narrow pieces.
"""

import concurrent.futures
import multiprocessing
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nlhf_kernels.backends.triton import common, mixture_sample, pairwise_pg_loss

ROOT = pathlib.Path(__file__).resolve().parents[1]
ARCHITECTURES = (80, 90, 100)
DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}
LOGITS = ("logits_ptr", "grad_ptr", "policy_ptr", "ref_ptr")
INTEGERS = ("tokens_ptr", "seed_rows_ptr", "position_rows_ptr", "cu_seqlens_ptr")
FLOATS = ("temperature", "softcap", "coef", "tau", "baseline")
# the values that the launches leave out of the specialisation
PLAIN = ("length", "batch", "tiles", "seed_low", "seed_high", "position")

ROW = {"BLOCK": common.BLOCK}
ROW_OPTIONS = {"num_warps": common.WARPS}
NO_MASK = {"mask_ptr": None}
NO_ENTROPY = {"entropy_ptr": None, "grad_entropy_ptr": None}
NO_ROWS = {"coef_rows_ptr": None, "temperature_rows_ptr": None}
NO_DRAW_ROWS = {**NO_ROWS, "seed_rows_ptr": None, "position_rows_ptr": None}
NO_REF = {"ref_ptr": None}

# kernel -> (function, launch options, bits of the widest load that is due, {variant: constants});
# every variant that a launch can ask for in the common paths
KERNELS = {
    "row_statistics_kernel": (
        common.row_statistics_kernel,
        ROW_OPTIONS,
        128,
        {
            "plain": {**ROW, **NO_MASK, "SOFTCAP": False},
            "mask+softcap": {**ROW, "SOFTCAP": True},
        },
    ),
    "row_gradient_kernel": (
        common.row_gradient_kernel,
        ROW_OPTIONS,
        128,
        {
            "entropy": {**ROW, **NO_MASK, "grad_scale_ptr": None, "SOFTCAP": False},
            "mask": {**ROW, **NO_ENTROPY, "SOFTCAP": False},
            "mask+softcap": {**ROW, **NO_ENTROPY, "SOFTCAP": True},
        },
    ),
    "sequence_coefficient_kernel": (
        pairwise_pg_loss.sequence_coefficient_kernel,
        ROW_OPTIONS,
        0,
        {
            "padded": {"SUMS": 0, "STEP": pairwise_pg_loss.STEP, "cu_seqlens_ptr": None},
            "packed": {"SUMS": 1, "STEP": pairwise_pg_loss.STEP},
        },
    ),
    "mixture_tile_kernel": (
        mixture_sample.mixture_tile_kernel,
        mixture_sample.TILE_OPTIONS,
        128,
        {
            "mixture": {"GROUP": mixture_sample.GROUP, **NO_ROWS},
            "plain": {"GROUP": mixture_sample.GROUP, **NO_ROWS, **NO_REF},
        },
    ),
    "mixture_draw_kernel": (
        mixture_sample.mixture_draw_kernel,
        mixture_sample.DRAW_OPTIONS,
        64,
        {
            # 152 thousand ids
            "rows": {"TILES": 256},
            "scalars": {"TILES": 256, **NO_DRAW_ROWS},
        },
    ),
}
# the most that may be used: triton 3.9 needs two thirds, and its versions differ by a quarter
REGISTERS = {
    "row_statistics_kernel": 64,
    "row_gradient_kernel": 112,
    "sequence_coefficient_kernel": 144,
    "mixture_tile_kernel": 104,
    "mixture_draw_kernel": 96,
}
REGISTERS_FLOAT64 = 224


def signature(function, constants: dict, dtype: str):
    """(types, constants, hints) of a kernel as its launch would specialise it."""
    statistics = "fp64" if dtype == "fp64" else "fp32"
    types, hints = {}, {}
    for place, name in enumerate(function.arg_names):
        if name in constants:
            types[name] = "constexpr"
            continue
        if name in LOGITS:
            types[name] = f"*{dtype}"
        elif name in INTEGERS:
            types[name] = "*i64"
        elif name == "mask_ptr":
            types[name] = "*u8"
        elif name.endswith("_ptr"):
            types[name] = "*i64" if name == "tokens_ptr" else f"*{statistics}"
        else:
            types[name] = "fp64" if name in FLOATS else "i32"
        if name not in FLOATS + PLAIN:
            hints[(place,)] = [["tt.divisibility", 16]]
    places = {(function.arg_names.index(name),): value for name, value in constants.items()}
    return types, places, hints


def compile_one(job: tuple[str, str, str, int]) -> dict:
    """Registers, stack bytes, spill instructions and the widest load (bits) of one kernel."""
    kernel, variant, dtype, architecture = job
    function, options, _, variants = KERNELS[kernel]
    source = ASTSource(function, *signature(function, variants[variant], DTYPES[dtype]))
    target = GPUTarget("cuda", architecture, 32)
    cubin = triton.compile(source, target=target, options=options).asm["cubin"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        command = [tool, "-res-usage", "-sass", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    loads = re.findall(r"\bLDG\.([\w.]+)", text)
    widths = [int(w) for load in loads for w in re.findall(r"\b(64|128|256)\b", load)]
    return {
        "registers": int(re.search(r"REG:(\d+)", text).group(1)),
        "stack": int(re.search(r"STACK:(\d+)", text).group(1)),
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", text)),
        "width": max(widths, default=32 if loads else 0),
    }


def faults(job: tuple, found: dict) -> list[str]:
    kernel, _, dtype, _ = job
    most = REGISTERS_FLOAT64 if dtype == "float64" else REGISTERS[kernel]
    wrong = []
    if found["stack"] or found["spills"]:
        wrong.append("spills")
    if found["registers"] > most:
        wrong.append(f"more than {most} registers")
    if found["width"] < KERNELS[kernel][2]:
        wrong.append(f"no {KERNELS[kernel][2]}-bit load")
    return wrong


def jobs() -> list[tuple[str, str, str, int]]:
    """What is compiled: the first variant of a kernel for every dtype, the others for two.

    float64 is for checks, not for speed, and takes the compiler longest: one architecture.
    """
    chosen = []
    for kernel, (*_, variants) in KERNELS.items():
        for place, variant in enumerate(variants):
            dtypes = tuple(DTYPES) if place == 0 else ("float32", "bfloat16")
            if kernel == "sequence_coefficient_kernel":
                # numbers per token, in the statistics dtype
                dtypes = ("float32", "float64")
            for dtype in dtypes:
                targets = (90,) if dtype == "float64" else ARCHITECTURES
                chosen += [(kernel, variant, dtype, target) for target in targets]
    return chosen


def compile_cuda() -> list[str]:
    """Compile every ``.cu``; returns the faults."""
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    nvcc = shutil.which("nvcc")
    if not sources or nvcc is None:
        print(f"{len(sources)} .cu files, nvcc {'found' if nvcc else 'not found'}: none compiled")
        return []
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    wrong = []
    for source in sources:
        with tempfile.TemporaryDirectory() as folder:
            output = ["-o", f"{folder}/object.o", f"-I{ROOT / 'csrc'}"]
            command = [nvcc, "-c", "-O3", "-std=c++17", "-Xptxas=-v", *targets, *output, source]
            result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            wrong.append(f"{source.name}: {result.stderr}")
        elif re.search(r"\b[1-9]\d* bytes spill", result.stderr):
            wrong.append(f"{source.name}: spills")
    print(f"{len(sources)} .cu files compiled for sm_{', sm_'.join(map(str, ARCHITECTURES))}")
    return wrong


def main() -> int:
    if "--list" in sys.argv:
        print("\n".join(KERNELS))
        return 0
    if triton.knobs.runtime.interpret:
        print("unset TRITON_INTERPRET: it and the compiler cannot share a process")
        return 2
    work = jobs()
    print(f"triton {triton.__version__}")
    print(f"{'kernel':28} {'variant':13} {'dtype':9} {'arch':7} regs stack spills load bits")
    wrong = []
    context = multiprocessing.get_context("spawn")
    workers = min(os.cpu_count() or 1, 8)
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        for job, found in zip(work, pool.map(compile_one, work, chunksize=4), strict=True):
            kernel, variant, dtype, architecture = job
            numbers = "{registers:4} {stack:5} {spills:6} {width:9}".format(**found)
            said = faults(job, found)
            print(
                f"{kernel:28} {variant:13} {dtype:9} sm_{architecture:<4} {numbers}",
                *said,
                flush=True,
            )
            wrong += [f"{' '.join(map(str, job))}: {what}" for what in said]
    wrong += compile_cuda()
    print("\n".join(["FAILED", *wrong]) if wrong else f"{len(work)} compilations, no fault")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
