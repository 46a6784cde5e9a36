"""The one progress display of the library: phases of a known number of tokens."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, Task, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.text import Text


class Phase(Protocol):
    """One phase under way."""

    def advance(self, tokens: int) -> None:
        """Report that ``tokens`` more tokens have been processed."""


class Progress(Protocol):
    """Shows how far a run is. Phases follow one another; they do not nest."""

    def phase(self, description: str, total_tokens: int) -> AbstractContextManager[Phase]:
        """Open a phase.

        Args:
            description: What is being done, a few words.
            total_tokens: Tokens that will be processed.

        Returns:
            A context manager around the phase; it gives the object to advance.
        """


class SilentProgress:
    """Shows nothing: the default of the Python API."""

    @contextmanager
    def phase(self, description: str, total_tokens: int) -> Iterator[Phase]:
        """Open a phase that is not shown."""
        yield _Counter()


class RichProgress:
    """Bars on a terminal; elsewhere (a CI log, a file) one plain line at the start and one at the end of a phase.

    Args:
        console: Where to write; unset: standard error, so that standard output stays for results.
        clock: Gives the time in seconds.
    """

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.perf_counter) -> None:
        self._console = console or Console(stderr=True)
        self._clock = clock

    @contextmanager
    def phase(self, description: str, total_tokens: int) -> Iterator[Phase]:
        """Open a phase; see ``Progress.phase``."""
        # Asked of the stream, not of rich: FORCE_COLOR makes rich call a CI log a terminal.
        on_terminal = self._console.file.isatty() and not self._console.is_dumb_terminal
        show = self._bar if on_terminal else self._lines
        with show(description, total_tokens) as phase:
            yield phase

    @contextmanager
    def _bar(self, description: str, total_tokens: int) -> Iterator[Phase]:
        bars = Bars(
            # Not markup: a description may hold brackets.
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            _RateColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            get_time=self._clock,
            refresh_per_second=4,
            # A batch may take a minute; over rich's 30 s there would be no two points to estimate from.
            speed_estimate_period=600,
            # Standard output may be a pipe that waits for the result; rich would send it to this console.
            redirect_stdout=False,
        )
        with bars:
            task = bars.add_task(description, total=total_tokens)
            yield _Bar(bars, task)

    @contextmanager
    def _lines(self, description: str, total_tokens: int) -> Iterator[Phase]:
        counter = _Counter()
        self._write(f"{description}: {total_tokens:,} tokens")
        start = self._clock()
        end = "stopped"
        try:
            yield counter
            end = "done"
        finally:
            seconds = self._clock() - start
            rate = _rate(counter.tokens, seconds)
            self._write(f"{description}: {end}, {counter.tokens:,} tokens in {seconds:,.1f} s, {rate}")

    def _write(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


class _Counter:
    """Counts and shows nothing."""

    def __init__(self) -> None:
        self.tokens = 0

    def advance(self, tokens: int) -> None:
        self.tokens += tokens


class _Bar:
    """Moves one bar."""

    def __init__(self, bars: Bars, task: TaskID) -> None:
        self._bars = bars
        self._task = task

    def advance(self, tokens: int) -> None:
        self._bars.advance(self._task, tokens)


class _RateColumn(ProgressColumn):
    """Tokens per second since the start of the phase, as the plain lines say it."""

    def render(self, task: Task) -> Text:
        return Text(_rate(task.completed, task.elapsed or 0.0), style="progress.data.speed")


def _rate(tokens: float, seconds: float) -> str:
    return f"{tokens / seconds:,.0f} tokens/s" if tokens and seconds > 0 else "- tokens/s"
