from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from llm_surgeon import PruneConfig, load, plan, prune
from llm_surgeon.planning.forecast import seconds_of_phases
from llm_surgeon.system.progress import Forecast, Phase, Progress, RichProgress, SilentProgress, expect


class Clock:
    """A clock that moves only when told to."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run_phase(progress: Progress, clock: Clock, description: str = "shot 1/5: curvature") -> None:
    with progress.phase(description, 4096) as phase:
        for _ in range(4):
            clock.seconds += 0.5
            phase.advance(1024)


def test_a_log_gets_one_line_at_the_start_and_one_with_the_rate_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # as CI services set it
    clock, stream = Clock(), io.StringIO()
    run_phase(RichProgress(Console(file=stream, width=40), clock), clock, "shot [1/5]: curvature")
    assert stream.getvalue().splitlines() == [
        "shot [1/5]: curvature: 4,096 tokens",
        "shot [1/5]: curvature: done, 4,096 tokens in 2.0 s, 2,048 tokens/s",
    ]


def test_a_phase_that_fails_is_not_called_done() -> None:
    clock, stream = Clock(), io.StringIO()
    progress = RichProgress(Console(file=stream), clock)

    def fail() -> None:
        with progress.phase("evaluation", 100) as phase:
            clock.seconds += 1
            phase.advance(10)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert stream.getvalue().splitlines()[-1] == "evaluation: stopped, 10 tokens in 1.0 s, 10 tokens/s"


def test_a_phase_without_tokens_has_no_rate() -> None:
    stream = io.StringIO()
    with RichProgress(Console(file=stream), Clock()).phase("evaluation", 100):
        pass
    assert stream.getvalue().splitlines()[-1] == "evaluation: done, 0 tokens in 0.0 s, - tokens/s"


def test_a_terminal_gets_a_bar_with_rate_and_times() -> None:
    clock, stream = Clock(), Terminal()
    run_phase(RichProgress(Console(file=stream, width=100, _environ={"TERM": "xterm"}), clock), clock)
    last = stream.getvalue().rpartition("\r")[2]  # each drawing of the bar overwrites the one before
    for part in ("shot 1/5: curvature", "\u2501", "2,048 tokens/s", "0:00:02", "0:00:00"):
        assert part in last


def test_a_dumb_terminal_gets_lines() -> None:
    clock, stream = Clock(), Terminal()
    run_phase(RichProgress(Console(file=stream, _environ={"TERM": "dumb"}), clock), clock)
    assert len(stream.getvalue().splitlines()) == 2


def test_standard_output_is_left_to_results(capsys: pytest.CaptureFixture[str]) -> None:
    progress = RichProgress()
    with progress.phase("curvature", 10) as phase:
        phase.advance(10)
        print("result")
    captured = capsys.readouterr()
    assert captured.out == "result\n"
    assert "curvature: done, 10 tokens" in captured.err


def test_a_terminal_bar_does_not_take_over_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    stream = Terminal()
    with RichProgress(Console(file=stream, _environ={"TERM": "xterm"})).phase("curvature", 10):
        print("result")
    assert capsys.readouterr().out == "result\n"
    assert "result" not in stream.getvalue()


def test_silence_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    run_phase(SilentProgress(), Clock())
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""


def test_what_is_counted_has_a_name_and_a_slow_rate_a_decimal() -> None:
    clock, stream = Clock(), io.StringIO()
    with RichProgress(Console(file=stream), clock).phase("shot 1/1: selection", 7, "layers") as phase:
        for _ in range(7):
            clock.seconds += 4
            phase.advance(1)
    assert stream.getvalue().splitlines() == [
        "shot 1/1: selection: 7 layers",
        "shot 1/1: selection: done, 7 layers in 28.0 s, 0.2 layers/s",
    ]


PLANNED = {"shot 1/2: curvature": 10.0, "shot 1/2: update": 4.0, "shot 2/2: curvature": 10.0, "export": 6.0}


def test_at_first_all_that_is_planned_is_left() -> None:
    assert Forecast(PLANNED).left("shot 1/2: curvature") == 30
    assert Forecast(PLANNED).left("something else") == 30
    assert Forecast({}).left("something else") == 0


def test_what_is_left_is_scaled_by_what_finished_phases_of_its_kind_have_taken() -> None:
    forecast = Forecast(PLANNED)
    forecast.finish("shot 1/2: curvature", 30.0)
    # Of an update nothing is known but that curvature took three times as long as planned.
    assert forecast.left("shot 1/2: update") == 3 * (4 + 10 + 6)
    forecast.finish("shot 1/2: update", 2.0)
    overall = 32 / 14
    assert forecast.left("shot 2/2: curvature") == pytest.approx(3 * 10 + overall * 6)


def test_the_phase_under_way_tells_too_and_is_left_by_its_rest() -> None:
    # A half has taken what all of it should have.
    assert Forecast(PLANNED).left("shot 1/2: curvature", 0.5, 10.0) == 2 * (5 + 4 + 10 + 6)


def test_a_run_that_goes_on_has_less_left_and_what_is_not_planned_changes_nothing() -> None:
    forecast = Forecast(PLANNED)
    assert forecast.left("shot 2/2: curvature") == 16
    forecast.finish("copies", 100.0)
    assert forecast.left("shot 2/2: curvature") == 16
    forecast.finish("shot 2/2: curvature", 5.0)
    assert forecast.left("copies", 0.5, 100.0) == 3


def test_lines_say_what_is_left_of_all_where_there_is_a_plan() -> None:
    clock, stream = Clock(), io.StringIO()
    progress = RichProgress(Console(file=stream), clock)
    expect(progress, {"shot 1/5: curvature": 4.0, "speed": 600.0})
    run_phase(progress, clock)
    run_phase(progress, clock, "speed")
    # Two seconds instead of four, and so half the time for the rest.
    assert stream.getvalue().splitlines()[::2] == [
        "shot 1/5: curvature: 4,096 tokens, about 10 min left of all",
        "speed: 4,096 tokens, about 5 min left of all",
    ]


def test_a_bar_has_what_is_left_of_all_below_it_while_it_moves() -> None:
    clock, stream = Clock(), Terminal()
    progress = RichProgress(Console(file=stream, width=80, _environ={"TERM": "xterm"}), clock)
    expect(progress, {"shot 1/5: curvature": 4.0, "speed": 600.0})
    run_phase(progress, clock)
    assert "  about 10 min left of all" in stream.getvalue()
    assert "left of all" not in stream.getvalue().rpartition("shot 1/5")[2]


def test_a_display_without_use_for_a_plan_is_not_told() -> None:
    expect(SilentProgress(), PLANNED)


class Recorder(SilentProgress):
    """The descriptions of all phases, and what was announced and done in each."""

    def __init__(self) -> None:
        self.announced: dict[str, int] = {}
        self.done: dict[str, int] = {}

    @contextmanager
    def phase(self, description: str, total: int, unit: str = "tokens") -> Iterator[Phase]:
        assert description not in self.announced
        self.announced[description], self.done[description] = total, 0
        self._name = description
        yield self

    def advance(self, count: int) -> None:
        self.done[self._name] += count


@pytest.mark.parametrize(
    "recipe",
    [
        {"preset": "best"},
        {"preset": "fast", "cross_fit": False},
        {"preset": "none", "shots": 3, "steps_per_shot": 2},
        {"preset": "none", "shots": 2, "structure": "unstructured", "lora": True},
        {"method": "wanda"},
    ],
)
def test_a_run_has_the_phases_that_the_plan_has_seconds_of(
    recipe: dict[str, Any], checkpoint: Path, text_file: Path
) -> None:
    small = {"samples": 4, "seq_len": 16, "eval_window": 32, "eval_tokens": 64, "sparsity": 0.3, "device": "cpu"}
    config, recorder = PruneConfig.from_mapping({**small, "calibration": str(text_file), **recipe}), Recorder()
    foreseen = plan(str(checkpoint), config)
    prune(*load(str(checkpoint), device="cpu"), config, progress=recorder)
    phases = seconds_of_phases(foreseen, config)
    assert sum(phases.values()) == pytest.approx(foreseen.seconds - foreseen.phases[0].seconds)
    copies = ["copies of the calibration text"]
    planned = [name for name, seconds in phases.items() if seconds and name not in ("export and check", "speed")]
    assert [name for name in recorder.announced if name not in copies] == planned
    assert recorder.announced == recorder.done
