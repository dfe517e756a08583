"""The pages: all of them are in the navigation, and their links lead somewhere."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml

import nlhf_kernels as nk

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
READABLE = [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"]


def navigation() -> list[str]:
    def paths(entry):
        if isinstance(entry, str):
            return [entry]
        parts = entry if isinstance(entry, list) else list(entry.values())
        return [path for part in parts for path in paths(part)]

    return paths(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])


def test_the_navigation_has_every_page_once():
    assert sorted(navigation()) == [page.name for page in PAGES]


def anchors(text: str) -> set[str]:
    """What a heading is called in a link, on GitHub and by Python-Markdown alike."""
    heads = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    plain = [re.sub(r"[^\w\s-]", "", head.lower()).strip() for head in heads]
    return {re.sub(r"\s+", "-", head) for head in plain}


@pytest.mark.parametrize("page", READABLE, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        other = (page.parent / path) if path else page
        assert other.exists(), target
        if anchor:
            assert anchor in anchors(other.read_text(encoding="utf-8")), target


@pytest.mark.parametrize("page", READABLE, ids=lambda page: page.name)
def test_files_that_are_named_exist(page):
    text = page.read_text(encoding="utf-8")
    named = set(
        re.findall(r"`((?:docs|tests|nlhf|nlhf_kernels|bench|csrc|examples)/[\w./-]+)`", text)
    )
    # the lab book tells of files as they were
    if page.name != "log.md":
        assert not {name for name in named if not (ROOT / name).exists()}


def test_commands_that_are_named_exist():
    from nlhf import cli

    known = {command.__name__.rpartition(".")[2] for command in cli.COMMANDS}
    for page in READABLE:
        text = page.read_text(encoding="utf-8")
        used = set(re.findall(r"(?:^|`)nlhf ([a-z][a-z-]+)", text, flags=re.M))
        assert used <= known, page


def test_the_api_has_every_op_and_every_module(monkeypatch):
    # what mkdocs gives to the hooks, which is not installed here
    import sys
    import types

    files = types.ModuleType("mkdocs.structure.files")
    files.File = object
    names = ("mkdocs", "mkdocs.structure", "mkdocs.structure.files")
    for name in names:
        monkeypatch.setitem(sys.modules, name, files)
    hooks = {"__file__": str(DOCS / "hooks.py")}
    exec((DOCS / "hooks.py").read_text(encoding="utf-8"), hooks)
    pages = hooks["pages"]()
    ops = pages["nlhf_kernels"][1]
    for name in nk.__all__:
        assert re.search(rf"^::: nlhf_kernels\.[\w.]*\b{name}$", ops, flags=re.M), name
    modules = {p.stem for p in (ROOT / "nlhf").iterdir() if not p.name.startswith("_")}
    packages = {"configs", "recipes", "citations", "py"}
    assert {f"nlhf.{name}" for name in modules - packages} <= set(pages)


def test_both_packages_say_that_they_are_typed():
    for name in ("nlhf", "nlhf_kernels"):
        assert (ROOT / name / "py.typed").exists()
    tracked = ["git", "ls-files", "nlhf/py.typed", "nlhf_kernels/py.typed", "nlhf/citations.bib"]
    found = subprocess.run(tracked, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert len(found.splitlines()) == 3
    import tomllib

    tool = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    data = tool["setuptools"]["package-data"]
    assert {"py.typed", "citations.bib"} <= set(data["nlhf"])
    assert "py.typed" in data["nlhf_kernels"]
