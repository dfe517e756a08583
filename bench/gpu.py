"""``python -m bench gpu --out DIR``: everything that wants a GPU, in one command and in minutes.

Parts run one after the other, what matters most first, each in processes of its own with a time
limit: a part that hangs is cut and named. Rows are in DIR/rows.jsonl the moment they are printed.
"""

import argparse
import dataclasses
import json
import os
import shlex
import signal
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import TextIO

import torch

from bench import cli, gpu_summary
from bench.gpu_parts import NARROWED_BY, PARTS, Command, Part
from bench.rows import ROOT

# for the summary, and for a child to end in
RESERVE = 8
GRACE = 3


def main(argv: list[str]) -> int:
    try:
        options = _parser().parse_args(argv)
        wanted = narrowing(options.only)
        if options.minutes <= 0:
            raise cli.BadInput(f"--minutes must be positive, got {options.minutes:g}")
        if options.device == "cuda" and not torch.cuda.is_available():
            raise cli.BadInput("torch finds no CUDA device; --device cpu is a dry run of all parts")
        out = Path(options.out or tempfile.mkdtemp(prefix="nlhf-gpu-")).resolve()
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise cli.BadInput(f"--out {out}: {error.strerror}") from error
    except cli.BadInput as error:
        cli.say(f"python -m bench gpu: {error}")
        return 2
    parts = [
        make(options.device, wanted[name], out) for name, make in PARTS.items() if name in wanted
    ]
    # whoever cuts the whole run short still gets the summary
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    return run(stretched(parts, 60 * options.minutes), out, 60 * options.minutes)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise cli.BadInput(f"{message} (--help lists the flags)")


def _parser() -> argparse.ArgumentParser:
    narrow = ", ".join(f"{part}:{what}" for part, (what, _) in NARROWED_BY.items())
    parser = _Parser(
        "python -m bench gpu",
        description="Build, check, bench and test on a CUDA GPU; rows and logs go to a folder.",
        epilog=f"Parts, in their order: {', '.join(PARTS)}. Some can be narrowed: {narrow}. "
        "Status 0: nothing was wrong; 1: something was; 2: it could not start.",
        allow_abbrev=False,
    )
    parser.add_argument("--out", help="folder for rows.jsonl, summary.txt and a log per part")
    parser.add_argument(
        "--only",
        help="these parts alone, e.g. check,ops:mixture_sample,step:qwen2.5-1.5b",
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument(
        "--minutes", type=float, default=9.0, help="for everything together (default 9)"
    )
    return parser


def narrowing(only: str | None) -> dict[str, list[str]]:
    """Part -> what it is narrowed to, [] for all of it."""
    if only is None:
        return {name: [] for name in PARTS}
    wanted: dict[str, list[str]] = {}
    for item in only.split(","):
        part, _, what = item.strip().partition(":")
        if part not in PARTS:
            raise cli.BadInput(f"--only: there is no part {part!r}: choose of {', '.join(PARTS)}")
        if what and part not in NARROWED_BY:
            raise cli.BadInput(f"--only: {part} cannot be narrowed, only {', '.join(NARROWED_BY)}")
        known = NARROWED_BY[part][1] if what else ()
        if known and what not in known:
            raise cli.BadInput(f"--only: {part} knows no {what!r}: choose of {', '.join(known)}")
        wanted.setdefault(part, []).extend([what] if what else [])
    return wanted


def stretched(parts: list[Part], seconds: float) -> list[Part]:
    """A few parts alone get more time each than all of them together would."""
    factor = max(1.0, (seconds - RESERVE) / max(1, sum(part.seconds for part in parts)))
    return [
        dataclasses.replace(
            part,
            seconds=factor * part.seconds,
            commands=tuple(
                dataclasses.replace(x, seconds=factor * x.seconds) for x in part.commands
            ),
        )
        for part in parts
    ]


def run(parts: list[Part], out: Path, seconds: float) -> int:
    """Run the parts within so many seconds; print the summary, return the exit status."""
    deadline = time.monotonic() + seconds - min(RESERVE, seconds / 4)
    rows: list[dict] = []
    reports: list[dict] = []
    lines: list[str] = []
    interrupted = False
    for part in parts:
        report = {"kind": "part", "part": part.name, "status": "skipped", "seconds": 0.0}
        if interrupted or part.skip:
            report["note"] = part.skip or "interrupted"
        elif time.monotonic() > deadline:
            report["note"] = "no time was left"
        else:
            cli.say(f"gpu: {part.name} ...")
            try:
                report |= _run_part(part, out, rows, deadline)
            except KeyboardInterrupt:
                interrupted = True
                report |= {"status": "cut", "note": "interrupted"}
        reports.append(report)
        with (out / "rows.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(report) + "\n")
        # again after each part: a run that is killed leaves what it had
        lines = gpu_summary.summary(rows, reports, out)
        (out / "summary.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines), flush=True)
    if interrupted:
        return 130
    return int(any(report["status"] == "wrong" for report in reports))


def _run_part(part: Part, out: Path, rows: list[dict], deadline: float) -> dict:
    """What became of a part: its commands one after the other, within its limit and the whole's."""
    start = time.monotonic()
    end = min(deadline, start + part.seconds)
    mine: list[dict] = []
    failed, cut = "", []
    path = out / f"{part.name}.log"
    try:
        with path.open("w", encoding="utf-8") as log:
            for command in part.commands:
                seconds = end - time.monotonic()
                seconds = min(seconds, command.seconds or seconds)
                status = _run_command(command, seconds, log, mine, part, out)
                if status is None:
                    cut.append(command.name)
                # status 1 says that something was wrong, and a row says what
                elif status > 1 or status < 0 or (status == 1 and not _wrong(mine, peers=True)):
                    failed = failed or f"{command.name}: {_ended(status)}: {_last_line(path)}"
    finally:
        if part.keep_rows:
            rows += mine
    text = path.read_text(encoding="utf-8", errors="replace")
    said = part.judge(mine, text)
    status, notes = "ok", [failed, said]
    if why := part.unavailable(text):
        status, notes = "skipped", [why]
    elif failed or _wrong(mine) or said.startswith("wrong"):
        status = "wrong"
    elif cut:
        status = "cut"
    seconds = round(time.monotonic() - start, 1)
    if cut:
        notes.append(f"not finished after {seconds:.0f} s: {', '.join(cut)}")
    return {"status": status, "note": "; ".join(filter(None, notes)), "seconds": seconds}


def _wrong(rows: list[dict], peers: bool = False) -> bool:
    """Whether one of ours is wrong; a peer that is wrong is a finding."""
    return any(x.get("status") == "wrong" and (peers or not gpu_summary.is_peer(x)) for x in rows)


def _run_command(
    command: Command, seconds: float, log: TextIO, rows: list[dict], part: Part, out: Path
) -> int | None:
    """The exit status; None if it was cut, or had no time to start in."""
    if seconds <= 0:
        return None
    line = shlex.join(command.arguments).replace("\n", "\\n")
    log.write(f"$ {line}\n")
    log.flush()
    child = subprocess.Popen(
        command.arguments,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        errors="replace",
        cwd=ROOT,
        env=_environment() | command.env,
        # a group of its own, so that whatever it starts ends with it
        start_new_session=True,
    )
    path = out / "rows.jsonl" if part.keep_rows else Path(os.devnull)
    arguments = (child.stdout, log, path, rows, part.name)
    reader = threading.Thread(target=_read, args=arguments, daemon=True)
    reader.start()
    try:
        return child.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        _end(child)
        # it ends with the last process that holds the other end, which may have left the group
        reader.join(GRACE)


def _environment() -> dict[str, str]:
    # nothing needs to be installed; what else is on the path stays
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}


def _read(stream: TextIO, log: TextIO, path: Path, rows: list[dict], part: str) -> None:
    """Rows into the file as they come, everything else into the log."""
    with stream, path.open("a", encoding="utf-8") as file:
        for line in stream:
            row = _row(line)
            if row is None:
                log.write(line)
                log.flush()
                continue
            # these two are of no use to the results, and come from more than one part
            if row["kind"] in ("check", "test"):
                row["part"] = part
            rows.append(row)
            file.write(json.dumps(row) + "\n")
            file.flush()


def _row(line: str) -> dict | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and "kind" in row else None


def _end(child: subprocess.Popen) -> None:
    """The whole group, also what a child that has ended left behind."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(child.pid, number)
        except ProcessLookupError:
            break
        try:
            child.wait(timeout=GRACE)
        except subprocess.TimeoutExpired:
            continue
    child.wait()


def _ended(status: int) -> str:
    return f"status {status}" if status >= 0 else signal.Signals(-status).name


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1].strip()[:200] if len(lines) > 1 else "it said nothing"
