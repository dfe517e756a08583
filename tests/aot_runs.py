"""What ``test_aot`` asks of the compiler, all in one process, since it takes long to start."""

import contextlib
import dataclasses
import io
import json
import sys
from pathlib import Path

from bench import aot, kernels
from bench.kernels import KERNELS, Variant

# for the changes of a plan
SINGLE = {"SUMS": 3, "STEP": 1024}
NAMES = {"kernels": kernels, "Variant": Variant, "SINGLE": SINGLE}


def run(*arguments: str) -> dict:
    """The command's exit status, and what it printed."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        status = aot.main([*arguments])
    return {"status": status, "out": out.getvalue()}


def change(name: str, **fields) -> None:
    KERNELS[name] = dataclasses.replace(KERNELS[name], **fields)


def faults(planted: str, job: list) -> list[str]:
    before, plain = dict(KERNELS), kernels.PLAIN
    exec(planted, NAMES | {"change": change})
    try:
        return aot.examine(aot.Job(*job))["faults"]
    finally:
        KERNELS.update(before)
        kernels.PLAIN = plain


if __name__ == "__main__":
    plan = json.loads(Path(sys.argv[1]).read_text())
    known, compile_all = {}, aot.compile_all

    def remember(work):
        for job, row in zip(work, compile_all(work), strict=True):
            known[job] = row
            yield row

    aot.compile_all = remember
    done = {"all": run()}
    # the others choose among the same rows
    aot.compile_all = lambda work: map(known.__getitem__, work)
    done["quick"] = run("--quick", "--json")
    aot.SAVED = Path(plan["saved"])
    done["save"] = [run("--kernel", "mixture_filter_kernel", "--save") for _ in range(2)]
    done["saved"] = aot.SAVED.read_text()
    done["faults"] = {name: faults(*plant) for name, plant in plan["plants"].items()}
    sys.stdout.write(json.dumps(done))
