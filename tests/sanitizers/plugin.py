"""For a module that a sanitizer watches: every test at every tile level, and a list of its calls.

A function of the module that is not called at each level, with each type of element that it takes,
fails the run. ``.ci/sanitize`` loads this with ``-p tests.sanitizers.plugin``.
"""

import functools
import os
from pathlib import Path

import pytest

HALVES = ("float16", "bfloat16", "float32")
# the types of the tensors that a function reads; what is not here has one, or its submodule's
TYPED = (
    "mixture_sample",
    "token_logprobs",
    "token_logprobs_grad",
    "token_kl",
    "token_kl_grad",
)
TYPES = {f"float32.{name}": HALVES for name in TYPED}
TYPES |= {f"float64.{name}": ("float64",) for name in TYPED}
TYPES |= {"linear_mixture_sample": HALVES, "ema_update": (*HALVES, "float64")}
# they choose and name the levels themselves
CONTROLS = ("tile_levels", "use_tile_level", "take_tile_levels_run")
Call = tuple[str, str, str]


class Watched:
    """The compiled module, or a submodule; notes (function, tile level, dtype) of each call."""

    def __init__(self, module, state: "State", prefix: str = ""):
        self._module, self._state, self._prefix = module, state, prefix

    def __getattr__(self, name: str):
        found = getattr(self._module, name)
        if name in CONTROLS or name == "dtype_codes":
            return found
        if not callable(found):
            return Watched(found, self._state, f"{name}.")

        @functools.wraps(found)
        def call(*arguments):
            self._state.note(self._prefix + name, arguments)
            return found(*arguments)

        return call


class State:
    def __init__(self, module):
        self.module = module
        self.level = module.tile_levels()[0]
        self.called: set[Call] = set()
        self._names = {code: name for name, code in module.dtype_codes.items()}

    def note(self, function: str, arguments: tuple) -> None:
        for name in self._types(arguments) if function in TYPES else {""}:
            self.called.add((function, self.level, name))

    def _types(self, arguments: tuple) -> set[str]:
        """Of matrices (address, dtype, ...) and of pairs of tensors (..., dtype, dtype)."""
        found = set()
        for x in arguments:
            if isinstance(x, list):
                found |= {self._names[code] for pair in x for code in pair[-2:]}
            elif isinstance(x, tuple) and x[0]:
                found.add(self._names[x[1]])
        return found


def functions(module, prefix: str = "") -> list[str]:
    """Every function of the compiled module, those of its submodules as ``submodule.function``."""
    found = []
    for name in sorted(set(dir(module)) - {*CONTROLS, "dtype_codes"}):
        if name.startswith("_"):
            continue
        member = getattr(module, name)
        found += [prefix + name] if callable(member) else functions(member, f"{name}.")
    return found


def required(names: list[str], levels: list[str]) -> set[Call]:
    return {(f, level, t) for f in names for level in levels for t in TYPES.get(f, ("",))}


STATE: list[State] = []


@pytest.hookimpl(trylast=True)
def pytest_configure(config) -> None:
    # the first import of the package comes after conftest.py, which sets how it runs
    from nlhf_kernels.backends import native

    sanitizer = os.environ["NLHF_SANITIZE"]
    maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    library = {"address": "libasan", "thread": "libtsan"}[sanitizer]
    if library not in maps:
        raise pytest.UsageError(f"{library} is not loaded: run .ci/sanitize {sanitizer}")
    if f"build/{sanitizer}/" not in native._native.__file__:
        raise pytest.UsageError(f"the module is {native._native.__file__}, which is not watched")
    STATE.append(State(native._native))
    native._native = Watched(native._native, STATE[0])


def pytest_generate_tests(metafunc) -> None:
    if "tile_level" in metafunc.fixturenames:
        levels = STATE[0].module.tile_levels()
        # the planted faults are other processes'
        count = 1 if metafunc.module.__name__.startswith("tests.sanitizers") else len(levels)
        metafunc.parametrize("tile_level", levels[:count], indirect=True)


@pytest.fixture(autouse=True)
def tile_level(request):
    state = STATE[0]
    state.level = request.param
    state.module.use_tile_level(request.param)
    yield
    state.module.use_tile_level(state.module.tile_levels()[0])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node) -> None:
    STATE[0].called |= {tuple(x) for x in getattr(node, "workeroutput", {}).get("called", [])}


def pytest_sessionfinish(session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["called"] = sorted(STATE[0].called)
    elif session.exitstatus == 0 and _missing():
        session.exitstatus = 1


def _missing() -> set[Call]:
    state = STATE[0]
    return required(functions(state.module), state.module.tile_levels()) - state.called


def pytest_terminal_summary(terminalreporter) -> None:
    state = STATE[0]
    levels = state.module.tile_levels()
    terminalreporter.section(f"called at the levels {', '.join(levels)}")
    for name in functions(state.module):
        types = " ".join(TYPES.get(name, ())) or "(one type)"
        terminalreporter.write_line(f"{name:30} {types}")
    for name, level, kind in sorted(_missing()):
        terminalreporter.write_line(f"NEVER CALLED: {name} at {level} {kind}")
