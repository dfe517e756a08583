"""Every Triton kernel compiles for GPUs that are not here, and its machine code is read right."""

import ast
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

from bench import aot, h200, sass

ROOT = pathlib.Path(__file__).resolve().parents[1]
FIELDS = {
    "kind", "kernel", "variant", "dtype", "arch", "registers", "stack", "spills", "shared_bytes",
    "load_bits", "per_element", "bound", "limit_gbps", "limit_share", "occupancy", "triton",
    "run", "commit", "dirty", "device", "threads", "versions", "mufu", "loops", "faults",
}  # fmt: skip


def run_python(*arguments: str) -> str:
    # the interpreter's mode is fixed at import: the compiler needs a process of its own
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> dict:
    """What the command printed for several flags, what it saved, and the faults of each plant."""
    folder = tmp_path_factory.mktemp("aot")
    plants = {name: plant[:2] for name, plant in PLANTS.items()}
    plan = {"saved": str(folder / "aot.jsonl"), "plants": plants}
    (folder / "plan.json").write_text(json.dumps(plan))
    return json.loads(run_python("-m", "tests.aot_runs", str(folder / "plan.json")))


def entry_kernels() -> set[str]:
    """The jit functions of the backend, and of the yardstick, that no other jit function calls."""
    defined, called = set(), set()
    backend = ROOT / "nlhf_kernels" / "backends" / "triton"
    for path in [*backend.rglob("*.py"), ROOT / "bench" / "yardsticks.py"]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and any(
                "jit" in ast.unparse(decorator) for decorator in node.decorator_list
            ):
                defined.add(node.name)
                called |= {
                    inner.func.attr if isinstance(inner.func, ast.Attribute) else inner.func.id
                    for inner in ast.walk(node)
                    if isinstance(inner, ast.Call)
                    and isinstance(inner.func, ast.Attribute | ast.Name)
                }
    return defined - called


def test_every_kernel_is_listed():
    assert set(run_python("-m", "bench.aot", "--list").split()) == entry_kernels()


def test_kernels_compile_within_their_bounds(done):
    said = done["all"]["out"]
    assert done["all"]["status"] == 0, said
    for architecture in ("sm_80", "sm_90", "sm_100"):
        assert re.search(rf"^mixture_tile_kernel .*\b{architecture}\b", said, re.M)
    assert "predicted, not measured" in said


def test_rows_have_every_field(done):
    assert done["quick"]["status"] == 0, done["quick"]["out"]
    rows = [json.loads(line) for line in done["quick"]["out"].splitlines()]
    assert {row["kernel"] for row in rows} == entry_kernels()
    for row in rows:
        assert set(row) == FIELDS
        assert (row["kind"], row["arch"], row["faults"]) == ("aot", "sm_90", [])
        assert set(row["per_element"]) == {"mufu", "fma", "other", "alu", "load", "store"}
        assert row["per_element"]["mufu"] == pytest.approx(sum(row["mufu"].values()))
        assert row["bound"] in ("memory", "mufu", "fma", "alu", "issue")
        assert 0 < row["limit_share"] <= 1
        assert 0 < row["occupancy"] <= 1
    # three distributions: as many special functions for each id, memory binds
    (tile,) = (r for r in rows if (r["kernel"], r["variant"]) == ("mixture_tile_kernel", "mixture"))
    assert tile["mufu"] == {"EX2": 3.0}
    assert tile["load_bits"] == 128
    assert tile["bound"] == "memory"
    # a power for each logit of each model, and no other for the sums
    rows = {r["variant"]: r for r in rows if r["kernel"] == "row_statistics_kernel"}
    assert rows["plain"]["mufu"] == {"EX2": 1.0}
    assert rows["kl"]["mufu"] == {"EX2": 2.0}
    for row in (rows["plain"], rows["kl"]):
        assert row["load_bits"] == 128
        assert row["bound"] == "memory"


def test_what_is_saved_has_a_prediction(done):
    for run in done["save"]:
        assert run["status"] == 0, run["out"]
    rows = [json.loads(line) for line in done["saved"].splitlines()]
    assert {(row["arch"], row["dtype"]) for row in rows} == {
        ("sm_90", "float32"), ("sm_90", "bfloat16"), ("sm_90", "float16")
    }  # fmt: skip
    # rows are only ever added
    assert len(rows) == 2 * 5


@pytest.mark.parametrize(
    "arguments", [["--kernel", "nonsense"], ["--arch", "75"], ["--quick", "--arch", "80"], ["x"]]
)
def test_bad_input_is_one_line_and_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as left:
        aot.main(arguments)
    assert left.value.code == 2
    assert "python -m bench aot: error: " in capsys.readouterr().err.splitlines()[-1]


def test_the_interpreter_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert aot.main(["--quick"]) == 2
    assert capsys.readouterr().err.startswith("unset TRITON_INTERPRET")


PLANTS = {
    # unknown strides: no two logits of a thread can be loaded at once
    "narrow load": (
        "kernels.PLAIN += ('batch_stride', 'row_stride')",
        ("row_statistics_kernel", "plain", "bfloat16", 90),
        "no 128-bit load",
    ),
    "spill": (
        "change('row_gradient_kernel', options={'num_warps': 1, 'maxnreg': 64})",
        ("row_gradient_kernel", "mask", "float32", 80),
        "spills",
    ),
    "registers": (
        "change('row_gradient_kernel', registers=16)",
        ("row_gradient_kernel", "mask", "float32", 100),
        "more than 16 registers",
    ),
    # the prediction would count one of the two
    "loop": (
        "change('sequence_coefficient_kernel', variants={'packed': Variant(SINGLE, 5, loops=2)})",
        ("sequence_coefficient_kernel", "packed", "float32", 90),
        "1 hot loops, must be 2",
    ),
}


@pytest.mark.parametrize("plant", PLANTS)
def test_planted_faults_are_reported(plant, done):
    assert PLANTS[plant][2] in done["faults"][plant]


# a loop inside a loop, a rare path behind the end that comes back into the inner one, a subroutine
# that is called for rare operands, padding; as cuobjdump prints them
SASS = """
 Function small_kernel:
  REG:40 STACK:8 SHARED:16 LOCAL:0 CONSTANT[0]:600 TEXTURE:0 SURFACE:0 SAMPLER:0
        code for sm_90
        /*0000*/                   LDC R1, c[0x0][0x28] ;    /* 0x00000a00ff017b82 */
                                                             /* 0x000fe20000000800 */
        /*0010*/              @!P0 BRA 0x0150 ;
        /*0020*/                   LDG.E.64 R2, desc[UR6][R4.64] ;
        /*0030*/                   MUFU.LG2 R3, R2 ;
        /*0040*/              @!P1 LDG.E.128 R4, desc[UR6][R22.64] ;
        /*0050*/                   BRA.DIV UR4, 0x0190 ;
        /*0060*/                   MUFU.EX2 R31, R34 ;
        /*0070*/                   MUFU.EX2 R32, R35 ;
        /*0080*/                   MUFU.RCP R6, R33 ;
        /*0090*/                   FFMA.FTZ R8, R5, R8, R5 ;
        /*00a0*/              @!P0 FMUL R35, R35, 16777216 ;
        /*00b0*/                   FADD R19, R31, -R36.reuse ;
        /*00c0*/                   HFMA2.MMA R15, -RZ, RZ, 0, 0 ;
        /*00d0*/                   FSEL R23, R19, -INF , !P1 ;
        /*00e0*/                   STS [R18+UR5], R9 ;
        /*00f0*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0100*/                   LDS R8, [R13+UR5] ;
        /*0110*/              @!P1 BRA 0x0040 ;
        /*0120*/                   STL [R1], R8 ;
        /*0130*/                   CALL.REL.NOINC 0x01d0 ;
        /*0140*/                   BRA.U !UP0, 0x0020 ;
        /*0150*/                   STG.E desc[UR6][R2.64], R11 ;
        /*0160*/               @P3 EXIT ;
        /*0170*/                   STG.E desc[UR6][R6.64], R9 ;
        /*0180*/                   EXIT ;
        /*0190*/                   IADD3 R9, R17, UR4, RZ ;
        /*01a0*/               @P5 MUFU.RCP R6, R33 ;
        /*01b0*/                   BRA 0x0060 ;
        /*01c0*/                   BRA 0x01c0;
        /*01d0*/                   MUFU.RSQ R7, R7 ;
        /*01e0*/                   RET.REL.NODEC R20 0x0 ;
        /*01f0*/                   NOP;
"""


def test_resources_are_read():
    want = {"registers": 40, "stack": 8, "spills": 1, "load_bits": 128}
    assert sass.resources(SASS) == want
    narrow = SASS.replace("LDG.E.128", "LDG.E").replace("LDG.E.64", "LDG.E.U16")
    assert sass.resources(narrow)["load_bits"] == 32


def test_codes_that_lie_one_behind_the_other_are_told_apart():
    lines = [line for line in SASS.splitlines() if sass.LINE.search(line)]
    text = "\n".join([".headerflags", *lines])
    first, none, rest = sass.parts(text, [0x120, 0, 0xE0])
    assert [first.splitlines(), none, rest.splitlines()] == [lines[:18], "", lines[18:]]


def test_a_section_of_a_file_is_found_by_its_name():
    elf = pathlib.Path(sys.executable).resolve().read_bytes()
    assert sass.section(elf, ".interp").startswith(b"/lib")
    with pytest.raises(ValueError, match=r"no section '\.text\.f'"):
        sass.section(elf, ".text.f")


def test_the_innermost_loop_is_found_and_counted():
    (loop,) = sass.innermost_loops(sass.instructions(SASS))
    # the rare path goes on inside the loop, so it is of the loop
    assert [x.address for x in loop] == [*range(0x40, 0x120, 16), 0x190, 0x1A0, 0x1B0]
    assert sass.counts(loop) == {
        "MUFU.EX2": 2, "MUFU.RCP": 2, "mufu": 4, "fma": 4, "load": 2, "store": 1, "alu": 2,
        # the two of alu, a barrier and three branches
        "other": 6,
    }  # fmt: skip


def test_straight_code_leaves_out_padding_and_subroutines():
    code = sass.live_code(sass.instructions(SASS))
    assert [x.address for x in code] == list(range(0, 0x1C0, 16))
    straight = SASS.replace("@!P1 BRA 0x0040", "@!P1 BRA 0x0120").replace("!UP0, 0x0020", "0x0150")
    assert sass.innermost_loops(sass.instructions(straight)) == []
    # two loops one after the other
    two = SASS.replace("BRA.U !UP0, 0x0020", "BRA.U !UP0, 0x0120")
    loops = sass.innermost_loops(sass.instructions(two))
    assert [len(x) for x in loops] == [17, 3]


def test_a_jump_table_is_refused():
    text = SASS.replace("BRA.U !UP0, 0x0020", "BRX R2 -0x10")
    with pytest.raises(ValueError, match="its targets are not in the text"):
        sass.innermost_loops(sass.instructions(text))


def test_the_slowest_unit_binds():
    lanes = h200.SMS * h200.CLOCK
    each = {"mufu": 0, "fma": 0, "other": 0, "alu": 0, "load": 0, "store": 0}
    assert h200.limit(each, 4) == ("memory", pytest.approx(4300), pytest.approx(1))
    # bytes of an element times the elements of all lanes in a second
    assert h200.limit(each | {"mufu": 5}, 4)[:2] == ("mufu", pytest.approx(4 * lanes * 16 / 5e9))
    busy = each | {"mufu": 3, "other": 30, "alu": 30, "fma": 12}
    assert h200.limit(busy, 4)[:2] == ("alu", pytest.approx(4 * lanes * 64 / 30e9))
    busy = each | {"mufu": 3, "other": 30, "alu": 20, "fma": 11, "load": 1, "store": 1}
    unit, rate, share = h200.limit(busy, 4)
    assert (unit, rate) == ("issue", pytest.approx(4 * lanes * 128 / 46e9))
    assert share == pytest.approx(rate / 4300)


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "want"),
    [
        (32, 0, 4, 1.0),
        # 40 registers a thread: 12 warps in each quarter of the registers
        (40, 16, 4, 0.75),
        (64, 64, 8, 0.5),
        # just too many for another block
        (65, 64, 8, 0.375),
        # two blocks of 100 KB
        (32, 100 * 1024, 8, 0.25),
        # 32 blocks at most
        (16, 0, 1, 0.5),
    ],
)
def test_occupancy(registers, shared, warps, want):
    assert h200.occupancy(registers, shared, warps) == want
