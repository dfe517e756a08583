"""Adds the API to the pages: one of the ops, one of every module of ``nlhf``, the integrations."""

import ast
from pathlib import Path

from mkdocs.structure.files import File

_ROOT = Path(__file__).parent.parent


def on_config(config):
    config.nav.append({"API": [{title: path} for title, (path, _) in pages().items()]})
    return config


def on_files(files, config):
    for path, content in pages().values():
        files.append(File.generated(config, path, content=content))
    return files


def pages() -> dict[str, tuple[str, str]]:
    """(path, Markdown) of each page by its title."""
    named = {"nlhf_kernels": _ops()}
    modules = [p for p in (_ROOT / "nlhf").iterdir() if p.suffix == ".py" or _is_package(p)]
    integrations = _ROOT / "nlhf_kernels" / "integrations"
    modules += [integrations] * _is_package(integrations)
    for path in sorted(modules):
        if path.name.startswith("_"):
            continue
        name = ".".join(path.relative_to(_ROOT).with_suffix("").parts)
        inner = sorted(p.stem for p in path.glob("*.py") if not p.stem.startswith("_"))
        named[name] = f"::: {name}\n    options: {{heading_level: 1}}\n\n"
        named[name] += "\n".join(f"::: {name}.{module}\n" for module in inner)
    return {name: (f"api/{name}.md", text) for name, text in named.items()}


def _is_package(path: Path) -> bool:
    return (path / "__init__.py").is_file()


def _imports(package: Path) -> dict[str, str]:
    """The module that each name of an ``__init__.py`` is from."""
    tree = ast.parse((package / "__init__.py").read_text(encoding="utf-8"))
    nodes = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    return {alias.name: node.module for node in nodes for alias in node.names}


def _ops() -> str:
    """Every public name from where its docstring is: an op has that of its eager implementation."""
    eager = _imports(_ROOT / "nlhf_kernels" / "eager")
    lines = ["# nlhf_kernels\n", "`import nlhf_kernels as nk`; each of these is `nk.NAME`.\n"]
    # the ops before the tuples that they return
    names = sorted(_imports(_ROOT / "nlhf_kernels").items(), key=lambda item: item[0][0].isupper())
    for name, module in names:
        lines.append(f"::: {eager.get(name, module)}.{name}\n    options: {{heading: {name}}}\n")
    return "\n".join(lines)
