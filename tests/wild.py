"""What nobody would type, and what may be said of it."""

import os

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from nlhf import config
from nlhf.commands.settings import EvaluateConfig, GenerateConfig, ReproduceConfig, SolveConfig

KINDS = {
    "train": config.Config,
    "preference": config.FitConfig,
    "generate": GenerateConfig,
    "evaluate": EvaluateConfig,
    "solve": SolveConfig,
    "reproduce": ReproduceConfig,
}
# more examples than these, and others each time
TIMES = int(os.environ.get("NLHF_FUZZ", "0"))
LONGEST = 2500


def tried(times: int):
    return settings(
        max_examples=times * max(TIMES, 1),
        derandomize=not TIMES,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


def refused(call, *names: str) -> str:
    """What is said of bad input, in one line that has one of the names; "" for a right answer."""
    try:
        call()
    except ValueError as error:
        said = str(error)
        assert said.splitlines() == [said]
        assert len(said) < LONGEST
        assert any(name in said for name in names), said
        return said
    return ""


ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32", "latin-1", "cp1252")
numbers = st.one_of(
    st.floats(), st.integers(), st.sampled_from([0.5, 1, True, 10**400, -(10**30), 1e-320])
)
WORDS = (
    *("", " ", "-", "--", "0", "-0", "010", "1:30", "0x10", "1_000", "1e-3", "1e400", "-1e400"),
    *(".inf", ".nan", "nan", "inf", "true", "no", "~", "null", "2024-01-01", "=", "<<", "*a"),
    *("&a b", "!!int ''", "!!bool x", "!!timestamp x", "!!binary x", "!!float x", "[1, 2]"),
    *("{a: b}", "|", "'", '"', "\u2028", "\x85", "é", "\x1b[31m", "%s", "{prompt}", "9" * 5000),
    *("x" * 5000, "a\nb: c", "/dev/zero", "/dev/null", "/", ".", "..", "~", "a=b", "http://[", "@"),
    *("https://h:99999/v1", "!!python/object/apply:os.mkdir [pwned]", "cpu:99", "meta", "cuda"),
)
words = st.one_of(st.sampled_from(WORDS), st.text(max_size=10), numbers.map(repr))


@st.composite
def damage(draw, content: bytes) -> bytes:
    """Bytes of it changed, left out, put in or repeated; or nothing."""
    for _ in range(draw(st.integers(0, 2))):
        a, b = sorted(draw(st.tuples(*[st.integers(0, len(content))] * 2)))
        kind = draw(st.sampled_from(["cut", "drop", "put", "flip", "twice"]))
        if kind == "cut":
            content = content[:a]
        elif kind == "drop":
            content = content[:a] + content[b:]
        elif kind == "put":
            content = content[:a] + draw(st.binary(max_size=8)) + content[a:]
        elif kind == "twice":
            content = content[:b] + content[a:]
        elif content:
            place = min(a, len(content) - 1)
            bit = bytes([content[place] ^ 1 << draw(st.integers(0, 7))])
            content = content[:place] + bit + content[place + 1 :]
    return content
