"""Every Triton kernel compiles for GPUs that are not here, within its bounds (see ``aot.py``)."""

import ast
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]


def run_aot(*arguments: str) -> subprocess.CompletedProcess:
    # the interpreter's mode is fixed at import: the compiler needs a process of its own
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, str(ROOT / "tests" / "aot.py"), *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )


def entry_kernels() -> set[str]:
    """The jit functions of the backend that no other jit function calls."""
    defined, called = set(), set()
    for path in (ROOT / "nlhf_kernels" / "backends" / "triton").rglob("*.py"):
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
    listed = run_aot("--list")
    assert listed.returncode == 0, listed.stderr
    assert set(listed.stdout.split()) == entry_kernels()


def test_kernels_compile_within_their_bounds():
    result = run_aot()
    assert result.returncode == 0, result.stdout + result.stderr
    assert "sm_80" in result.stdout
    assert "sm_100" in result.stdout
