"""A whole step of Nash-MD: nlhf, a plain loop, TRL, and what limits the rollout.

Each contestant runs in a process of its own, on the same models (random weights), prompts, lengths
and optimiser: y from the policy, y' from its mixture with the reference, a preference between them
by a small reward model, the loss, its gradient, one update. All responses have T tokens. Memory
counts weights, gradients, the optimiser's moments and, on the CPU, the process as state.

  nlhf     the public API            graphs  the same with CUDA graphs (on CUDA)
  plain    transformers, one cache a model, two loops, torch.multinomial, log_softmax
  bare     the forward passes alone that a rollout on transformers' layers cannot avoid, alternating
           with that of nlhf, which has linear layers of its own on the CPU
  reading  the time of reading weights and caches once a token
  rlhf     policy gradient on a reward: one response a prompt (what NLHF costs beyond it)
  trl      NashMDTrainer of trl==1.13.0, in the mode that is right: without a cache

Without flags, the standing run: on the CPU the tiny model at T = 64, and SmolLM2-135M at B = 4,
P = 32, T = 128: about 8 minutes on 2 cores, of which TRL takes 3. Any flag of the setting makes it
a run of that one setting.
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from bench import cli, reading, rows, trl_faults
from bench.measure import limits
from bench.setting import CONTEXT, MODELS, Setting
from bench.text import number, ratio

VARIANTS = {
    "reading": "reading weights and caches",
    "graphs": "nlhf, CUDA graphs",
    "nlhf": "nlhf",
    "bare": "bare forwards",
    "plain": "plain loop",
    "rlhf": "rlhf",
    "trl": "trl 1.13.0",
}
CUDA_ONLY = ("graphs",)
# limits, and another algorithm
NO_RIVALS = [VARIANTS[name] for name in ("reading", "bare", "rlhf")]
FAULTS = {"cached": "trl 1.13.0, use_cache", "lora": "trl 1.13.0, LoRA"}
TRL = "trl==1.13.0"
PROG = "python -m bench step"
PHASES = ("rollout", "scoring", "update", "step")
NO_TRL = f"no Python with {TRL}: run `make peers`, or give --trl-python or $NLHF_BENCH_TRL"


def parser() -> cli.Parser:
    p = cli.Parser("step", __doc__)
    p.add_argument("--model", choices=MODELS, help="a shape; the weights are random")
    p.add_argument("--prompts", type=cli.positive, metavar="B")
    p.add_argument("--prompt-tokens", type=cli.positive, metavar="P")
    p.add_argument("--new-tokens", type=cli.positive, metavar="T")
    p.add_argument("--dtype", choices=("float32", "bfloat16"))
    p.add_argument("--lora-r", type=cli.positive, metavar="R", help="train adapters of this rank")
    p.add_argument(
        "--steps",
        type=cli.positive,
        help="measured steps of each (default: 3 on the CPU, 1 on CUDA, 1 of TRL)",
    )
    p.add_argument(
        "--only",
        type=cli.names_of(list(VARIANTS)),
        metavar="NAME[,NAME]",
        help="these contestants alone, by the names above",
    )
    p.add_argument(
        "--trl-python",
        metavar="PATH",
        help=f"an interpreter that has {TRL} (default: $NLHF_BENCH_TRL, .venv-trl, this one)",
    )
    p.add_argument(
        "--wrong-too",
        action="store_true",
        help="how wrong TRL is with its cache, and with LoRA and no ref_model: never a time",
    )
    p.add_argument("--efficiency", action="store_true", help="nlhf beside rlhf, by model size")
    p.add_argument(
        "--quick", action="store_true", help="the tiny model, and TRL only if it is here"
    )
    p.add_argument(
        "--profile",
        type=lambda text: str(Path(text).resolve()),
        metavar="DIR",
        help="profile a step of nlhf into this folder, and print commands for Nsight",
    )
    return p


def settings(arguments: argparse.Namespace) -> list[Setting]:
    cuda = arguments.device == "cuda"
    flags = {
        "model": arguments.model,
        "B": arguments.prompts,
        "P": arguments.prompt_tokens,
        "T": arguments.new_tokens,
        "dtype": arguments.dtype,
        "lora_r": arguments.lora_r,
    }
    given = {name: value for name, value in flags.items() if value is not None}
    common = {"device": arguments.device, "dtype": "bfloat16" if cuda else "float32"}
    if arguments.quick:
        standing = [{"model": "tiny", "B": 4, "P": 16, "T": 16}]
    elif arguments.efficiency and cuda:
        standing = [
            {"model": model, "B": 32, "P": 128, "T": 128}
            for model in ("qwen2.5-0.5b", "qwen2.5-1.5b")
        ]
    elif arguments.efficiency:
        standing = [
            {"model": model, "B": 4, "P": 32, "T": 32}
            for model in ("tiny", "llama-35m", "smollm2-135m")
        ]
    elif cuda:
        standing = [
            {"model": "qwen2.5-1.5b", "B": 32, "P": 512, "T": 512},
            {"model": "llama3-8b", "B": 32, "P": 512, "T": 512, "lora_r": 16},
            {"model": "qwen2.5-0.5b", "B": 32, "P": 512, "T": 512},
        ]
    else:
        standing = [
            {"model": "tiny", "B": 4, "P": 32, "T": 64},
            {"model": "smollm2-135m", "B": 4, "P": 32, "T": 128},
        ]
    if given and ("model" in given or not arguments.efficiency):
        # what is not given is as in the main setting
        standing = [standing[0] if cuda else standing[-1]]
    found = [Setting(**common | fields | given) for fields in standing]
    for setting in found:
        if setting.P + setting.T > CONTEXT:
            raise cli.BadInput(
                f"{PROG}: --prompt-tokens and --new-tokens are {setting.P + setting.T} in all, "
                f"over the context of {CONTEXT}"
            )
    return found


def find_trl(given: str | None) -> str | None:
    """A Python that should have TRL; None where nothing points to one."""
    named = given or os.environ.get("NLHF_BENCH_TRL")
    if named:
        if not Path(named).is_file():
            raise cli.BadInput(f"{PROG}: no Python at {named}: run `make peers`")
        return named
    local = rows.ROOT / ".venv-trl" / "bin" / "python"
    if local.is_file():
        return str(local)
    return sys.executable if importlib.util.find_spec("trl") else None


def run_child(
    python: str, module: str, *arguments: str, show: bool = False
) -> tuple[dict | None, str]:
    """The object that the child prints last, or None and the reason in one line.

    ``show`` passes on what it says on standard error.
    """
    done = subprocess.run(
        [python, "-m", module, *arguments],
        cwd=rows.ROOT,
        # nothing that is measured is on a hub
        env=os.environ | {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if show:
        cli.say(done.stderr)
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0 and lines:
        return json.loads(lines[-1]), ""
    said = [line for line in done.stderr.splitlines() if line.strip()]
    return None, f"failed: {(said or [f'exit status {done.returncode}'])[-1].strip()[:300]}"


def spread(steps: list[dict]) -> dict[str, list[float]]:
    """Phase -> minimum, median, maximum over the steps, in seconds."""
    found = {}
    for phase in PHASES:
        values = [step[phase] for step in steps if phase in step]
        if values:
            found[phase] = [min(values), statistics.median(values), max(values)]
    return found


def make_row(setting: Setting, name: str, steps: list[dict], note: str = "") -> dict:
    """A row of kind "step"; without steps there is a note that says why."""
    memory = {}
    for key in ("peak_mb", "state_mb"):
        values = [step[key] for step in steps if step.get(key) is not None]
        memory[key] = statistics.median(values) if values else None
    return {
        "kind": "step",
        "setting": setting.as_dict(),
        "variant": VARIANTS[name],
        "status": "ok" if steps else "missing",
        "note": note,
        "seconds": spread(steps) or None,
        **memory,
        "tokens": (1 if name == "rlhf" else 2) * setting.B * setting.T,
    }


def ours(setting: Setting, names: list[str], steps: int, folder: str | None = None) -> list[dict]:
    """Rows of a contestant, and of the bare forwards in the same process if they are named."""
    text = json.dumps(setting.as_dict())
    arguments = [text, str(steps), ",".join(names), *([folder] if folder else [])]
    found, note = run_child(sys.executable, "bench.contestants", *arguments, show=bool(folder))
    results = found or {}
    return [
        make_row(setting, name, results.get("bare" if name == "bare" else "steps", []), note)
        for name in names
    ]


def trl(setting: Setting, python: str | None, steps: int) -> dict:
    if python is None:
        return make_row(setting, "trl", [], NO_TRL)
    text = json.dumps(setting.as_dict())
    found, note = run_child(python, "bench.trl_step", text, str(steps))
    if found is None:
        return make_row(setting, "trl", [], note)
    if setting.lora_r:
        note = "with a ref_model, a second copy of the weights: without one it is wrong"
    row = make_row(setting, "trl", found["steps"], note) | versions(found["versions"])
    return row | {"variant": f"trl {found['versions']['trl']}"}


def faults(python: str | None) -> list[dict]:
    """A row for each mode of TRL that is wrong, with the size of the error and without a time."""
    found = []
    for fault, variant in FAULTS.items():
        seen, note = run_child(python, "bench.trl_faults", fault) if python else (None, NO_TRL)
        row = make_row(trl_faults.SETTINGS[fault], "trl", [], note) | {"variant": variant}
        if seen is not None:
            # should it be right one day, that is no time either
            row |= {"status": "wrong" if seen["wrong"] else "missing", "note": seen["note"]}
            row |= versions(seen["versions"])
        found.append(row)
    return found


def versions(peers: dict[str, str]) -> dict:
    return {"versions": rows.versions() | peers}


def step_rows(setting: Setting, names: list[str], steps: int | None, trl_python, folder):
    """The rows of one setting, as they come: what matters most first, what takes longest last."""
    if "reading" in names:
        rate, unit = limits(setting.device)["read"]
        least = reading.rollout_bytes(setting) / rate / 1e9
        yield make_row(setting, "reading", [{"rollout": least}], f"at {rate:,.0f} {unit}")
        if setting.device == "cuda":
            # the device belongs to the contestants
            torch.cuda.empty_cache()
    many = steps or (3 if setting.device == "cpu" and not folder else 1)
    for group in (("graphs",), ("nlhf", "bare"), ("plain",), ("rlhf",)):
        together = [name for name in group if name in names]
        if together:
            yield from ours(setting, together, many, folder)
    if "trl" in names:
        yield trl(setting, trl_python, steps or 1)


def table(found: list[dict]) -> str:
    """All settings, one after the other."""
    parts = []
    for text in dict.fromkeys(json.dumps(row["setting"]) for row in found):
        setting = json.loads(text)
        these = [row for row in found if row["setting"] == setting]
        parts.append(setting_table(setting, these))
    return "\n\n".join(parts)


def setting_table(setting: dict, found: list[dict]) -> str:
    def median(row: dict | None, phase: str) -> float | None:
        times = (row["seconds"] or {}).get(phase) if row else None
        return times and times[1]

    by_name = {row["variant"]: row for row in found if row["status"] == "ok"}
    bare = median(by_name.get(VARIANTS["bare"]), "rollout")
    rival = next((v for v in by_name if v.startswith("trl ")), VARIANTS["plain"])
    rival = rival if rival in by_name else None
    title = ", ".join([setting["model"], *(f"{k}={setting[k]}" for k in "BPT"), setting["dtype"]])
    title += f", LoRA r={setting['lora_r']}" if setting["lora_r"] else ""
    header = [f"{title}: seconds", *PHASES, "rollout / bare"]
    header += [f"rollout x {rival}", f"step x {rival}"] if rival else []
    body, notes = [], []
    for row in found:
        if row["note"]:
            notes.append(f"{row['variant']}: {row['status']}: {row['note']}")
        if row["status"] != "ok":
            continue
        cells = [median(row, phase) for phase in PHASES]
        cells.append(ratio(cells[0], bare))
        if rival:
            other = None if row["variant"] in NO_RIVALS else by_name[rival]
            cells += [ratio(median(other, p), median(row, p)) for p in ("rollout", "step")]
        peak, state = row["peak_mb"], row["state_mb"]
        cells += [peak, None if peak is None or state is None else peak - state]
        body.append([row["variant"], *map(number, cells)])
    lines = [cli.table([*header, "peak MB", "beyond state"], body)] if body else [title]
    return "\n".join([*lines, *notes])


def main(argv: Sequence[str]) -> int:
    try:
        arguments = parser().parse(argv)
        trl_python = find_trl(arguments.trl_python)
        names = choose(arguments)
        plan = settings(arguments)
    except cli.BadInput as error:
        return cli.refuse(error)
    out = cli.Rows(arguments)
    for setting in plan:
        start = time.perf_counter()
        for row in step_rows(setting, names, arguments.steps, trl_python, arguments.profile):
            out.add(row)
            cli.say(f"{setting.model}, {row['variant']}: {time.perf_counter() - start:.0f} s")
    if arguments.wrong_too:
        for row in faults(trl_python):
            out.add(row)
    if not arguments.json:
        print(table(out.found))
    ours_failed = [
        row
        for row in out.found
        if row["status"] == "missing" and not row["variant"].startswith("trl")
    ]
    return 1 if ours_failed else 0


def choose(arguments: argparse.Namespace) -> list[str]:
    """The contestants."""
    names = arguments.only
    if arguments.profile and arguments.save:
        raise cli.BadInput(f"{PROG}: --profile makes times longer: leave out --save")
    if names is None:
        cuda = arguments.device == "cuda"
        names = [name for name in VARIANTS if cuda or name not in CUDA_ONLY]
        names = ["nlhf", "rlhf"] if arguments.efficiency else names
        names = ["nlhf"] if arguments.profile else names
    elif arguments.device == "cpu" and "graphs" in names:
        raise cli.BadInput(f"{PROG}: --only graphs needs --device cuda")
    return names


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
