"""Progress of a run: phases of a known amount of work, mostly tokens, and a forecast of the time that is left.

This is the only display of progress in the package.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, runtime_checkable

from rich.console import Console, RenderableType
from rich.progress import BarColumn, ProgressColumn, Task, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.text import Text

from llm_surgeon.recipe.quantity import duration
from llm_surgeon.system.logs import error_console

# Seconds of a plan below which it is not compared with the time taken: moments say nothing of minutes.
_ENOUGH = 1.0


class Phase(Protocol):
    """A phase under way."""

    def advance(self, count: int) -> None:
        """Report that ``count`` more tokens, or other units of the phase, have been processed."""


class Progress(Protocol):
    """A display of how far a run is. Phases follow one another; they do not nest."""

    def phase(self, description: str, total: int, unit: str = "tokens") -> AbstractContextManager[Phase]:
        """Open a phase.

        Args:
            description: The work in a few words; the first word behind a colon is the kind of the phase.
            total: Number of tokens, or of other units, that will be processed.
            unit: The unit, in the plural.

        Returns:
            A context manager around the phase; it yields the object to advance.
        """


@runtime_checkable
class ForeseeingProgress(Progress, Protocol):
    """A display that also shows how much time is left of the whole run."""

    def expect(self, planned: Mapping[str, float]) -> None:
        """Take in the plan of the run.

        Args:
            planned: Seconds of each phase of the run by its description, in order; work that is no phase counts too.
        """


def expect(progress: Progress, planned: Mapping[str, float]) -> None:
    """Tell a display the plan of the run, if it has a use for that; see ``ForeseeingProgress.expect``."""
    if isinstance(progress, ForeseeingProgress):
        progress.expect(planned)


class SilentProgress:
    """A display that shows nothing: the default of the Python API."""

    @contextmanager
    def phase(self, description: str, total: int, unit: str = "tokens") -> Iterator[Phase]:
        """Open a phase that is not shown."""
        yield _Counter()


class RichProgress:
    """Bars on a terminal; elsewhere (a CI log, a file) one plain line at the start and one at the end of a phase.

    Args:
        console: Console to write to; unset: standard error, so that standard output stays for results.
        clock: Returns the time in seconds.
    """

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.perf_counter) -> None:
        self._console = console or error_console()
        self._clock = clock
        self._forecast: Forecast | None = None

    def expect(self, planned: Mapping[str, float]) -> None:
        """Show how much time is left of the whole run from now on; see ``ForeseeingProgress.expect``."""
        self._forecast = Forecast(planned)

    @contextmanager
    def phase(self, description: str, total: int, unit: str = "tokens") -> Iterator[Phase]:
        """Open a phase; see ``Progress.phase``."""
        # Asked of the stream, not of rich: FORCE_COLOR makes rich call a CI log a terminal.
        on_terminal = self._console.file.isatty() and not self._console.is_dumb_terminal
        show = self._bar if on_terminal else self._lines
        start = self._clock()
        with show(description, total, unit) as phase:
            yield phase
        if self._forecast is not None:
            self._forecast.finish(description, self._clock() - start)

    @contextmanager
    def _bar(self, description: str, total: int, unit: str) -> Iterator[Phase]:
        bars = _Bars(
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
        bars.forecast = self._forecast
        with bars:
            task = bars.add_task(description, total=total, unit=unit)
            yield _Bar(bars, task)

    @contextmanager
    def _lines(self, description: str, total: int, unit: str) -> Iterator[Phase]:
        counter = _Counter()
        left = "" if self._forecast is None else f", {_left(self._forecast.left(description))}"
        self._write(f"{description}: {total:,} {unit}{left}")
        start = self._clock()
        end = "stopped"
        try:
            yield counter
            end = "done"
        finally:
            seconds = self._clock() - start
            rate = _rate(counter.count, seconds, unit)
            self._write(f"{description}: {end}, {counter.count:,} {unit} in {seconds:,.1f} s, {rate}")

    def _write(self, line: str) -> None:
        self._console.print(line, markup=False, emoji=False, highlight=False, soft_wrap=True)


class Forecast:
    """Forecast of the time left: the plan, scaled by how long finished phases of the same kind took against theirs.

    Before a phase of a kind has finished, the kind is scaled as all kinds together.

    Args:
        planned: Seconds of each phase by its description, in order.
    """

    def __init__(self, planned: Mapping[str, float]) -> None:
        self._planned = dict(planned)
        self._positions = {description: position for position, description in enumerate(planned)}
        self._taken: dict[str, float] = {}

    def finish(self, description: str, seconds: float) -> None:
        """Take in how long a phase has taken; a phase that was not planned is ignored."""
        if description in self._planned:
            self._taken[description] = seconds

    def left(self, description: str, share: float = 0.0, seconds: float = 0.0) -> float:
        """Seconds that are left of the whole run.

        Args:
            description: Description of the phase under way; all phases planned before it are over.
            share: Fraction of the phase that is done.
            seconds: Seconds that this has taken.
        """
        done = {name: (taken, self._planned[name]) for name, taken in self._taken.items()}
        after = 1 + max((self._positions[name] for name in self._taken), default=-1)
        position = self._positions.get(description, after)
        if share and description in self._planned:
            done[description] = seconds, share * self._planned[description]
        overall = _ratio(done.values(), 1.0)
        total = 0.0
        for name, planned in list(self._planned.items())[position:]:
            alike = [pair for other, pair in done.items() if _kind(other) == _kind(name)]
            total += planned * (1 - share if name == description else 1.0) * _ratio(alike, overall)
        return total


def _kind(description: str) -> str:
    return description.rpartition(": ")[2].partition(" ")[0]


def _ratio(pairs: Collection[tuple[float, float]], otherwise: float) -> float:
    """Ratio of the seconds taken to the seconds planned, or ``otherwise`` if too few were planned to tell."""
    taken, planned = sum(pair[0] for pair in pairs), sum(pair[1] for pair in pairs)
    return taken / planned if planned >= _ENOUGH else otherwise


class _Counter:
    """A phase that counts and shows nothing."""

    def __init__(self) -> None:
        self.count = 0

    def advance(self, count: int) -> None:
        self.count += count


class _Bar:
    """A phase that moves one bar."""

    def __init__(self, bars: Bars, task: TaskID) -> None:
        self._bars = bars
        self._task = task

    def advance(self, count: int) -> None:
        self._bars.advance(self._task, count)


class _RateColumn(ProgressColumn):
    """Column of tokens per second since the start of the phase, in the words of the plain lines."""

    def render(self, task: Task) -> Text:
        return Text(_rate(task.completed, task.elapsed or 0.0, task.fields["unit"]), style="progress.data.speed")


class _Bars(Bars):
    """Bars, with a line below a moving bar for the time left of the whole run: beside the bar there is no room."""

    forecast: Forecast | None = None

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        if self.forecast is not None and not self.finished:
            task = self.tasks[0]
            share = task.completed / task.total if task.total else 0.0
            left = self.forecast.left(task.description, min(share, 1.0), task.elapsed or 0.0)
            yield Text(f"  {_left(left)}", style="progress.remaining")


def _left(seconds: float) -> str:
    return f"about {duration(seconds)} left of all"


def _rate(count: float, seconds: float, unit: str) -> str:
    if not count or seconds <= 0:
        return f"- {unit}/s"
    rate = count / seconds
    return f"{rate:,.0f} {unit}/s" if rate >= 10 else f"{rate:.1f} {unit}/s"
