"""What an error message says of what it was given."""

import difflib
import reprlib
from collections.abc import Iterable

_LONGEST = 100
_REPR = reprlib.Repr()
_REPR.maxlevel = 2
_REPR.maxstring = _REPR.maxlong = _REPR.maxother = _LONGEST


def nearest(name: object, known: Iterable[str]) -> str:
    """A hint for an error message: ``; do you mean dice?``, or nothing if no name is near."""
    close = difflib.get_close_matches(str(name)[:_LONGEST], list(known), n=1)
    return f"; do you mean {close[0]}?" if close and close[0] else ""


def shown(value: object) -> str:
    """The repr of a value for an error message: one line, short however large the value is."""
    try:
        return _REPR.repr(value)
    # of an integer with more digits than Python writes
    except ValueError:
        return f"a large {type(value).__name__}"


def unusable(text: str) -> str:
    """What is wrong with a text that no file name or tokenizer takes; "" if nothing is."""
    if "\0" in text:
        return "a NUL character"
    try:
        text.encode()
    except UnicodeEncodeError:
        # JSON and YAML can spell it, and so arrive arguments that are not UTF-8
        return "half a surrogate pair"
    return ""
