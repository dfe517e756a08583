"""The rules of the repository that a machine can keep: layers, sizes, bans, the places of an op."""

import ast
import inspect
import re
import subprocess
from pathlib import Path

import pytest

import nlhf_kernels as nk
from nlhf_kernels import eager, registry
from nlhf_kernels.testing import cases

ROOT = Path(__file__).parent.parent
FILES = [ROOT / name for name in subprocess.run(
    ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
    cwd=ROOT, capture_output=True, text=True, check=True,
).stdout.splitlines()]  # fmt: skip
PYTHON = [f for f in FILES if f.suffix == ".py" and f.exists()]
PACKAGES = [f for f in PYTHON if f.relative_to(ROOT).parts[0] in ("nlhf", "nlhf_kernels")]
BENCH = [f for f in PYTHON if f.relative_to(ROOT).parts[0] == "bench"]

PUBLIC = "nlhf_kernels"
MEASURED = rf"{PUBLIC}(\.testing(\..*)?)?|nlhf(\..*)?|bench(\..*)?"
# who may import whom, inside the repository: the first pattern that matches a module decides
LAYERS = [
    (r"nlhf_kernels\.eager(\..*)?", r"nlhf_kernels\.(noise|eager\..*)"),
    (r"nlhf_kernels\.(noise|registry)", r""),
    (r"nlhf_kernels\.backends\.native", r"nlhf_kernels\._native"),
    (
        r"nlhf_kernels\.backends\.triton(\..*)?",
        r"nlhf_kernels\.backends\.triton\.(common|token_rows|mixture_draw|mixture_filters)",
    ),
    (r"nlhf_kernels\.backends", r""),
    (r"nlhf_kernels\.ops\.common", r"nlhf_kernels\.(eager|registry)"),
    (r"nlhf_kernels\.ops\.(sampling|pg)", r"nlhf_kernels\.(eager|registry|ops\.common)"),
    (r"nlhf_kernels\.ops\.vocabulary", r"nlhf_kernels\.(eager\.logits|ops\.common)"),
    (r"nlhf_kernels\.ops\.heads", r"nlhf_kernels\.(registry|ops\.(common|vocabulary))"),
    (
        r"nlhf_kernels\.ops\..*",
        r"nlhf_kernels\.(eager(\.pair_loss)?|registry|ops\.(common|sampling|pg|vocabulary|heads))",
    ),
    (r"nlhf_kernels\.ops", r""),
    (r"nlhf_kernels\.integrations\.(versions|patching)", r""),
    (r"nlhf_kernels\.integrations(\..*)?", r"nlhf_kernels(\.integrations\..*)?"),
    (r"nlhf_kernels\.testing.*", r"nlhf_kernels(\.(eager|registry|testing(\..*)?))?"),
    (r"nlhf_kernels(\.__main__)?", r"nlhf_kernels(\.(eager|registry|ops\..*))?"),
    # kernels are compiled ahead of time one by one, below any public name
    (r"bench\.(aot|kernels)", rf"{MEASURED}|nlhf_kernels\.backends\.triton(\..*)?"),
    (r"bench(\..*)?", MEASURED),
]
# nlhf, from the bottom: a module may import those of the lines above its own
LOOP = [
    ["names", "progress", "loading"],
    ["config", "data", "http", "tabular", "distributed", "stopping"],
    ["snapshots"],
    ["store"],
    ["preference"],
    ["preference_fit"],
    ["preference_run"],
    ["policy"],
    ["caches", "graphs", "linears"],
    ["decoding"],
    ["rollout"],
    ["heads", "packing", "memory", "serving"],
    ["vocabulary"],
    ["responses"],
    ["losses"],
    ["importance"],
    ["algorithms", "reward"],
    ["players", "optimizers"],
    ["quickstart", "plots", "diagnosis"],
    ["parts", "engines"],
    ["learner"],
    ["checkpoint"],
    ["tracking"],
    ["evaluate", "arena"],
    ["model_card"],
    ["train"],
    ["trl_compat"],
    ["experiments"],
    ["commands"],
    ["cli"],
    ["__main__"],
]


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> set[str]:
    """The modules of this repository that a file imports, anywhere in it."""
    known = {module_of(f) for f in PYTHON} | {"nlhf_kernels._native"}
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in known else node.module for name in inner}
    return found & known


def allowed(module: str) -> str:
    if module.split(".")[0] == "nlhf":
        # the modules of a package stand on one line, and may import each other
        name = module.partition(".")[2].partition(".")[0]
        level = next((i for i, row in enumerate(LOOP) if name in row), None)
        if level is None:
            return "" if module == "nlhf" else f"(no line of LOOP has {module})"
        below = [name for row in LOOP[:level] for name in row]
        below += [name] * (ROOT / "nlhf" / name).is_dir()
        return rf"{PUBLIC}|nlhf|nlhf\.({'|'.join(below)})(\..*)?"
    return next(pattern for name, pattern in LAYERS if re.fullmatch(name, module))


@pytest.mark.parametrize("path", [*PACKAGES, *BENCH], ids=module_of)
def test_layers(path):
    module = module_of(path)
    wrong = {name for name in imports(path) if not re.fullmatch(allowed(module), name)}
    assert not wrong, f"{module} must not import {wrong}"


def test_nothing_imports_tests_and_examples_import_public_names():
    for path in PYTHON:
        top = path.relative_to(ROOT).parts[0]
        used = imports(path)
        if top != "tests":
            assert not {n for n in used if n.split(".")[0] == "tests"}, path
        if top == "examples":
            used = {n for n in used if n != "nlhf_kernels.integrations"}
            assert not {n for n in used if n.startswith("nlhf_kernels.")}, path


def test_no_torch_header_in_csrc():
    sources = [f for f in FILES if f.parts[len(ROOT.parts)] == "csrc"]
    assert sources
    for path in sources:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"#include\s*[<\"](torch|ATen|c10)/", text), path
        if path.name != "bindings.cpp":
            assert "pybind11" not in text, path


def test_files_are_short():
    code = [f for f in FILES if f.suffix in (".py", ".cpp", ".h", ".cu") and f.exists()]
    for path in code:
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 500, path


def test_bans():
    for path in PYTHON:
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ExceptHandler):
                name = getattr(node.type, "id", None)
                assert node.type is not None, path
                assert name not in ("Exception", "BaseException"), path
            if isinstance(node, ast.Call) and path in PACKAGES:
                assert getattr(node.func, "id", "") != "print", path
        # a to-do says where it is tracked
        assert not re.search(r"(TO" r"DO|FIX" r"ME)(?!\()", text), path


@pytest.mark.parametrize("name", [*registry.OPS, *registry.UPDATES])
def test_an_op_stands_everywhere(name):
    public = getattr(nk, name)
    assert name in nk.__all__
    assert public.__doc__ == getattr(eager, name).__doc__
    assert inspect.signature(public) == inspect.signature(getattr(eager, name))
    for heading in ("Args:", "Returns:", "Raises:", "Numerics:", "Formula"):
        assert heading in public.__doc__, heading
    # a file is called by the noun alone
    assert (ROOT / "nlhf_kernels" / "ops" / f"{name.rstrip('_')}.py").exists()
    assert f"## {name}\n" in (ROOT / "docs" / "math.md").read_text(encoding="utf-8")
    assert f"| `{name}` |" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_an_op_of_logits_has_cases(op):
    assert cases.OPS[op].tests
    assert all(cases.OPS[op].bench[device] for device in registry.ORDER)


def test_readme_names_what_make_has():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    verbs = set(re.findall(r"^make ([a-z-]+)", readme, flags=re.M))
    assert {"run", "test"} <= verbs
    for verb in verbs:
        assert re.search(rf"^{verb}:", makefile, flags=re.M), verb
    assert re.search(r"^ci:.*\btest\b", makefile, flags=re.M)
    assert "make ci" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
