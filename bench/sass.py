"""Reads what cuobjdump and nvdisasm print of a kernel: resources, loops, instructions by unit.

A loop is the natural loop of a branch back: the target dominates the branch, so that code that the
assembler moved behind the end of a kernel, and that jumps back into it, is none.
"""

import bisect
import itertools
import re
import struct
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*?)\s*;")
FMA = re.compile(r"(FFMA|FMUL|FADD|HFMA|HMUL|HADD)[2-4]?(32I)?")
# integers, logic, comparisons, selections and the packing of 16-bit numbers: half the FMA rate
ALU = re.compile(
    r"FMNMX3?|FSETP?|FSEL|FCHK|F2FP|I2FP|IADD3?|IABS|ISETP|V?IMNMX3?|VIADD|LOP3|PLOP3|SHF|LEA|"
    r"SEL|PRMT|BMSK|SGXT|P2R|R2P|HMNMX2|HSETP2"
)


class Instruction(NamedTuple):
    address: int
    # the predicate in front, "" where there is none
    guard: str
    opcode: str
    operands: str

    @property
    def name(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def ends(self) -> bool:
        """Whether nothing goes on to the next instruction."""
        if self.name == "BRA":
            return not self.guard and "," not in self.operands
        return not self.guard and self.name in ("EXIT", "RET")

    @property
    def target(self) -> int | None:
        """Where a branch goes."""
        if self.name in ("BRX", "JMP", "JMX"):
            raise ValueError(f"{self.opcode} {self.operands}: its targets are not in the text")
        if self.name != "BRA":
            return None
        return int(re.search(r"0x([0-9a-f]+)$", self.operands).group(1), 16)


def section(elf: bytes, name: str) -> bytes:
    """The content of a section of a 64-bit ELF file."""
    (table,) = struct.unpack_from("<Q", elf, 40)
    size, count, names = struct.unpack_from("<3H", elf, 58)
    # name, type, flags, address, offset, size
    headers = [struct.unpack_from("<2I4Q", elf, table + i * size) for i in range(count)]
    strings = headers[names][4]
    for header in headers:
        start = strings + header[0]
        if elf[start : elf.index(b"\0", start)] == name.encode():
            return elf[header[4] : header[4] + header[5]]
    raise ValueError(f"section: no section {name!r}")


def parts(text: str, sizes: list[int]) -> list[str]:
    """The lines of each of several codes of so many bytes, disassembled one behind the other.

    Addresses and the targets of branches stay those of the whole.
    """
    ends = list(itertools.accumulate(sizes))
    lines = [[] for _ in sizes]
    for line in text.splitlines():
        if found := LINE.search(line):
            lines[bisect.bisect(ends, int(found[1], 16))].append(line)
    return ["\n".join(part) for part in lines]


def instructions(text: str) -> list[Instruction]:
    found = LINE.findall(text)
    return [Instruction(int(address, 16), *rest) for address, *rest in found]


def resources(text: str) -> dict[str, int]:
    """Registers, stack bytes, spill instructions and the widest global load (bits)."""
    code = instructions(text)
    # the second straight to shared memory
    loads = [x for x in code if x.name in ("LDG", "LDGSTS")]
    widths = [int(w) for x in loads for w in re.findall(r"\.(64|128|256)\b", x.opcode)]
    return {
        "registers": int(re.search(r"REG:(\d+)", text).group(1)),
        "stack": int(re.search(r"STACK:(\d+)", text).group(1)),
        "spills": sum(x.name in ("LDL", "STL") for x in code),
        "load_bits": max(widths, default=32 if loads else 0),
    }


def live_code(code: list[Instruction]) -> list[Instruction]:
    """What can be reached without a call: no padding, no subroutine for rare operands."""
    return sorted(x for block in _blocks(code)[0] for x in block)


def innermost_loops(code: list[Instruction]) -> list[list[Instruction]]:
    """The bodies of the loops that hold no other loop, in the order of the code."""
    blocks, after = _blocks(code)
    dominators = _dominators(after)
    before = [{u for u, ends in enumerate(after) if v in ends} for v in range(len(blocks))]
    loops: dict[int, set[int]] = {}
    for u, ends in enumerate(after):
        for head in ends & dominators[u]:
            body = loops.setdefault(head, {head})
            found = [u]
            while found:
                block = found.pop()
                if block not in body:
                    body.add(block)
                    found += before[block]
    innermost = [x for x in loops.values() if not any(y < x for y in loops.values())]
    return sorted(sorted(i for b in body for i in blocks[b]) for body in innermost)


def counts(code: Iterable[Instruction]) -> Counter:
    """Instructions by unit: mufu (and ``MUFU.EX2`` ... apart), fma, load, store and other.

    ``alu`` counts those of ``other`` that run at half the rate of the FMA pipe.
    """
    found = Counter()
    for x in code:
        if x.name == "MUFU":
            found[".".join(x.opcode.split(".")[:2])] += 1
        if x.name != "NOP":
            found[_unit(x)] += 1
        found["alu"] += bool(ALU.fullmatch(x.name))
    return found


def _unit(x: Instruction) -> str:
    if x.name == "MUFU":
        return "mufu"
    if FMA.fullmatch(x.name):
        return "fma"
    # LDC reads constants, LDSM and STSM shared memory; LDGSTS goes from global to shared
    if re.fullmatch(r"LD(G|S|SM|L|GSTS)?", x.name):
        return "load"
    if re.fullmatch(r"ST(G|S|SM|L)?|RED[GS]?|ATOM[GS]?", x.name):
        return "store"
    return "other"


def _blocks(code: list[Instruction]) -> tuple[list[list[Instruction]], list[set[int]]]:
    """The basic blocks that the first one reaches, and the blocks that follow each."""
    place = {x.address: i for i, x in enumerate(code)}
    starts = {0}
    for i, x in enumerate(code):
        if x.target is not None:
            starts |= {place[x.target], i + 1}
        elif x.ends:
            starts.add(i + 1)
    starts = sorted(starts - {len(code)})
    stops = [*starts[1:], len(code)]
    after = {}
    waiting = [0]
    while waiting:
        start = waiting.pop()
        if start in after:
            continue
        stop = stops[starts.index(start)]
        last = code[stop - 1]
        after[start] = {place[last.target]} if last.target is not None else set()
        if not last.ends and stop < len(code):
            after[start].add(stop)
        waiting += after[start]
    number = {start: n for n, start in enumerate(sorted(after))}
    blocks = [code[start : stops[starts.index(start)]] for start in number]
    return blocks, [{number[x] for x in after[start]} for start in number]


def _dominators(after: list[set[int]]) -> list[set[int]]:
    """Per block, the blocks that every way to it passes, itself among them."""
    everything = set(range(len(after)))
    dominators = [{0}, *(set(everything) for _ in after[1:])]
    changed = True
    while changed:
        changed = False
        for v in range(1, len(after)):
            ways = [dominators[u] for u, ends in enumerate(after) if v in ends]
            found = {v} | set.intersection(*ways)
            changed |= found != dominators[v]
            dominators[v] = found
    return dominators
