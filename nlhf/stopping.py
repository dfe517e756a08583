"""Signals that ask a run to end: what is under way is finished and saved first."""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# a launcher passes on the Ctrl-C that its processes have had from the terminal too
_ECHO = 1.0


class Stopped(BaseException):
    """A signal ended the work; no error, so nothing that handles errors catches it."""


class Interrupted(Exception):
    """A signal ended a run; what it has reached is saved, and the text says how to go on."""


class Stop:
    """``asked``: the signal that came, "" before; inside the ``with`` alone, in the main thread.

    Inside of ``finishing`` a signal is noted, and who works there looks at ``asked`` when it suits
    them; outside it raises ``Stopped`` at once. A second Ctrl-C raises ``KeyboardInterrupt``
    anywhere.
    """

    def __init__(self) -> None:
        self.asked = ""
        self._finishing = False
        self._since = 0.0

    def __enter__(self) -> "Stop":
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._note) for s in _SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def finishing(self) -> Iterator[None]:
        """What runs inside it is not broken off."""
        before, self._finishing = self._finishing, True
        try:
            yield
        finally:
            self._finishing = before

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        again = self.asked and number == signal.SIGINT and now - self._since > _ECHO
        if again:
            raise KeyboardInterrupt
        if not self.asked:
            self.asked, self._since = signal.Signals(number).name, now
            if not self._finishing:
                raise Stopped(self.asked)
