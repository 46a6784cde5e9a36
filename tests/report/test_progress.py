from __future__ import annotations

import io

import pytest
from rich.console import Console

from llm_surgeon.report.progress import Progress, RichProgress, SilentProgress


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
