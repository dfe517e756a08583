"""Progress on stderr: a bar on a terminal, plain lines at intervals anywhere else."""

import contextlib
import logging
import sys
import time
from collections.abc import Iterable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

# seconds between two lines where nothing is drawn over
INTERVAL = 10.0


class Progress(contextlib.AbstractContextManager):
    """``total`` units of work of which ``done`` lie behind, with a line of text about the last one.

    On a terminal it is a bar with the text below it, and what is logged or written to stderr in the
    meantime comes to stand above. Elsewhere (a file, a pipe) it is a line for the first and the
    last unit, and one every ``INTERVAL`` seconds between them, without control characters. With
    ``show=False`` it is nothing at all.
    """

    def __init__(self, title: str, total: int, done: int = 0, *, show: bool = True):
        self._title, self._total, self._done, self._before = title, total, done, done
        self._start = self._last = time.monotonic()
        self._show = show
        console = Console(file=sys.stderr)
        # what rich itself asks can be overridden by the environment, into a log file too
        live = show and sys.stderr.isatty() and not console.is_dumb_terminal
        self._bar = _Bar(console) if live else None
        self._task = self._bar.add_task(title, total=total, completed=done) if live else None
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "Progress":
        if self._bar:
            before = sys.stderr
            self._stack.enter_context(self._bar)
            self._stack.enter_context(_handlers_moved(before))
        return self

    def __exit__(self, *_) -> None:
        self._stack.close()

    def advance(self, count: int = 1, text: str = "") -> None:
        """``count`` more units are done."""
        self._done += count
        if self._bar:
            self._bar.text = text
            self._bar.update(self._task, completed=self._done)
            return
        now = time.monotonic()
        first, last = self._done - count == self._before, self._done >= self._total
        if self._show and (first or last or now - self._last >= INTERVAL):
            self._last = now
            sys.stderr.write(self._line(now, text) + "\n")
            sys.stderr.flush()

    def _line(self, now: float, text: str) -> str:
        line = f"{self._title}: {self._done}/{self._total}, {_duration(now - self._start)}"
        left = (now - self._start) / (self._done - self._before) * (self._total - self._done)
        line += f", {_duration(left)} left" if left > 0 else ""
        return f"{line}: {text}" if text else line


def track(items: Iterable, title: str, total: int, *, show: bool = True) -> Iterator:
    """The items, one unit each."""
    with Progress(title, total, show=show) as progress:
        for item in items:
            yield item
            progress.advance()


class _Bar(RichProgress):
    """A bar with a line of text below."""

    def __init__(self, console: Console):
        super().__init__(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=console,
            # what a command prints is no part of the progress, and may go to a file
            redirect_stdout=False,
        )
        self.text = ""

    def get_renderables(self):
        yield self.make_tasks_table(self.tasks)
        # the bar asks before it has a text of its own
        yield Text(getattr(self, "text", ""))


@contextlib.contextmanager
def _handlers_moved(stream) -> Iterator[None]:
    """What the root logger writes to ``stream`` goes to the present sys.stderr, above the bar."""
    moved = [h for h in logging.getLogger().handlers if getattr(h, "stream", None) is stream]
    for handler in moved:
        handler.setStream(sys.stderr)
    try:
        yield
    finally:
        for handler in moved:
            handler.setStream(stream)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
