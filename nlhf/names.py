"""What an error message says of a name that is not there."""

import difflib
from collections.abc import Iterable


def nearest(name: object, known: Iterable[str]) -> str:
    """A hint for an error message: ``; do you mean dice?``, or nothing if no name is near."""
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f"; do you mean {close[0]}?" if close and close[0] else ""
