"""What the command does at the terminal: streams that fail, signals, faults, what it says first, and its help."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import fresh
from llm_surgeon import __version__
from llm_surgeon.cli import app
from llm_surgeon.cli.helping import LiteralCommand, LiteralGroup
from llm_surgeon.cli.shared import errors_as_messages, print_error
from llm_surgeon.system.logs import STARTING

ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
# Made commands: one that works as all do, with a file, a child process, and results at the end; one that fails; one
# that waits.
SCRIPT = """
import subprocess, sys, time
from pathlib import Path
from llm_surgeon.cli import app, main
from llm_surgeon.cli.shared import console, errors_as_messages
from llm_surgeon.system.logs import log_to_stderr

@app.command()
def work(out: Path) -> None:
    with errors_as_messages(), out.open("w") as file:
        assert file.fileno() > 2, "the file has the number of a standard stream"
        log_to_stderr().print("1.20\u00d7 begins")
        child = "import sys; print('child', file=sys.stderr, flush=True)"
        file.write("complete" if subprocess.run([sys.executable, "-c", child]).returncode == 0 else "child failed")
        for _ in range(5_000):
            console().print("1.20\u00d7 in [bold] :M:")

@app.command()
def fail() -> None:
    with errors_as_messages():
        {}["nothing"]

@app.command()
def wait() -> None:
    with errors_as_messages(lambda: "interrupted; " + "and so on"):
        print("waits", flush=True)
        time.sleep(60)

main()
"""
needs_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")


@pytest.fixture
def script(tmp_path, real_python):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT, encoding="utf8")
    return path


@pytest.fixture
def work(script, tmp_path):
    """Runs a made command with standard streams as the shell makes them."""

    def run(redirected="", **environment):
        command = ["sh", "-c", f'exec "$0" "$@" {redirected}', sys.executable, script, "work", tmp_path / "out"]
        env = os.environ | environment
        done = subprocess.run(command, capture_output=True, text=True, env=env, check=False, encoding="utf8")
        assert (tmp_path / "out").read_text() == "complete"
        assert "Traceback" not in done.stdout + done.stderr
        return done

    return run


def test_results_are_shown_as_they_are(work):
    done = work()
    assert (done.returncode, set(done.stdout.splitlines())) == (0, {"1.20\u00d7 in [bold] :M:"})


def test_streams_that_take_ascii_only_get_substitutes(work):
    done = work(**ASCII)
    assert (done.returncode, set(done.stdout.splitlines())) == (0, {"1.20? in [bold] :M:"})
    assert "1.20\\xd7 begins" in done.stderr


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", "<&- >&- 2>&-"])
def test_closed_streams_do_not_end_a_run(work, closed):
    assert work(closed).returncode == 0


@needs_full
@pytest.mark.parametrize("environment", [{}, {"PYTHONUNBUFFERED": "1"}])
def test_full_standard_output_is_a_message_and_an_exit_status(work, environment):
    done = work(">/dev/full", **environment)
    assert done.returncode == 1
    assert "error: Standard output cannot be written: No space left on device." in done.stderr


@needs_full
def test_full_standard_error_does_not_end_a_run(work):
    done = work("2>/dev/full")
    assert (done.returncode, len(done.stdout.splitlines())) == (0, 5_000)


def test_a_reader_of_standard_output_that_goes_is_an_exit_status_without_words(script, tmp_path):
    command = [sys.executable, script, "work", tmp_path / "out"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf8") as run:
        run.stdout.readline()
        run.stdout.close()
        assert "error" not in run.stderr.read().lower()
    assert run.returncode == 1
    assert (tmp_path / "out").read_text() == "complete"


def test_a_reader_of_standard_error_that_goes_does_not_end_a_run(script, tmp_path):
    command = [sys.executable, script, "work", tmp_path / "out"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf8") as run:
        run.stderr.close()
        assert len(run.stdout.read().splitlines()) == 5_000
    assert run.returncode == 0
    assert (tmp_path / "out").read_text() == "complete"


@needs_full
@pytest.mark.usefixtures("real_python")
def test_help_that_cannot_be_written_is_a_message():
    command = f'exec "{sys.executable}" -m llm_surgeon prune --help >/dev/full'
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: Standard output cannot be written")


@pytest.mark.slow
@pytest.mark.parametrize("command", ["plan", "prune", "eval", "compare"])
def test_every_command_works_where_standard_output_takes_ascii_only(command, checkpoint, text_file, tmp_path):
    texts = ["--calibration", text_file, "--samples", 8, "--seq-len", 32, "--eval-window", 64, "--eval-tokens", 256]
    arguments = {
        "plan": [*texts, "--device", "cpu", "--sparsity", 0.2],
        "prune": [*texts, "--out", tmp_path / "out", "--sparsity", 0.2, "--preset", "none", "--shots", 1],
        "eval": ["--data", text_file, "--window", 32, "--tokens", 128],
        "compare": [*texts, "--out", tmp_path / "out", "--methods", "magnitude"],
    }[command]
    # The whole way of a run in real processes, once.
    python = fresh.REAL if command == "prune" else sys.executable
    line = [python, "-m", "llm_surgeon", command, checkpoint, *arguments]
    done = subprocess.run([*map(str, line)], capture_output=True, text=True, env=os.environ | ASCII, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii()
    assert done.stdout


def test_an_error_that_was_not_foreseen_asks_for_a_report(script):
    done = subprocess.run([sys.executable, script, "fail"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    trace, _, message = done.stderr.partition("error: ")
    assert trace.rstrip().endswith("KeyError: 'nothing'")
    for part in ("Please report it", f"llm-surgeon {__version__}", "torch ", "transformers ", "Python "):
        assert part in message


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_request_to_end_is_answered_as_an_interrupt_is(script, number, status):
    with subprocess.Popen([sys.executable, script, "wait"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run:
        run.stdout.readline()
        run.send_signal(number)
        assert run.stderr.read() == b"interrupted; and so on\n"
    assert run.returncode == status


def test_a_request_to_end_that_is_ignored_stays_so(script):
    command = ["sh", "-c", "trap '' TERM; exec \"$@\"", "sh", sys.executable, script, "wait"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run:
        run.stdout.readline()
        run.send_signal(signal.SIGTERM)
        run.send_signal(signal.SIGINT)
        assert run.stderr.read() == b"interrupted; and so on\n"
    assert run.returncode == 130


@pytest.mark.usefixtures("real_python")
@pytest.mark.parametrize("command", ["prune", "plan", "bench"])
def test_something_is_said_before_what_takes_seconds_is_imported(command, tmp_path):
    code = f"import sys; sys.modules['torch'] = None; sys.argv[1:] = {[command, 'x']}"
    if command == "prune":
        code += f"; sys.argv += ['--out', {str(tmp_path / 'out')!r}]"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; import llm_surgeon.cli; llm_surgeon.cli.main()"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr.splitlines()[0].rstrip() == STARTING
    assert "ModuleNotFoundError" in done.stderr


@pytest.mark.parametrize(
    "text", ["a [bold]b[/] c", "[/nothing]", ":M: :smile: N:M:", "[N:M] [a:b:c]", "\\[x]:M:\\", "2:4"]
)
def test_messages_and_help_are_literal(text, capsys):
    print_error(text, "")
    assert capsys.readouterr().err == f"error: {text}\n\n"
    small = typer.Typer(cls=LiteralGroup, help=f"Whole {text} ends.")
    small.command("one", cls=LiteralCommand)(_command_with(text))
    small.command("two", cls=LiteralCommand)(lambda: None)
    wide = {"COLUMNS": "300"}
    for arguments, shown in (
        (["--help"], (f"Whole {text} ends.", f"Does {text} well.")),
        (["one", "--help"], (f"Does {text} well.", f"Takes {text} here.", f"Has {text} set.")),
    ):
        output = CliRunner().invoke(small, arguments, env=wide).output
        for part in shown:
            assert part in output


def _command_with(text):
    def command(
        argument: str = typer.Argument(help=f"Takes {text} here."),
        some: str = typer.Option("", help=f"Has {text} set."),
    ) -> None:
        pass

    command.__doc__ = f"Does {text} well."
    return command


def test_an_interrupt_of_a_command_has_its_own_words(capsys):
    with pytest.raises(typer.Exit) as ended, errors_as_messages("interrupted [here]"):
        raise KeyboardInterrupt
    assert ended.value.exit_code == 130
    assert capsys.readouterr().err == "interrupted [here]\n"


def test_every_command_shows_its_help_as_it_is_written():
    # typer has commands and options as they are shown; what was written is at the functions.
    for registered in app.registered_commands:
        name = registered.name or registered.callback.__name__.replace("_", "-")
        whole = "-h" if registered.cls is LiteralCommand else "--help-all"
        output = CliRunner().invoke(app, [name, whole], env={"COLUMNS": "1000", "TERM": "dumb"}).output
        parameters = typer.main.get_params_from_function(registered.callback).values()
        written = [parameter.default.help for parameter in parameters]
        assert len(written) > 3
        for text in written:
            assert text in output


def test_the_version():
    done = CliRunner().invoke(app, ["--version"])
    assert (done.exit_code, done.output) == (0, f"llm-surgeon {__version__}\n")


def test_completion_of_the_shell():
    completing = {
        "_LLM_SURGEON_COMPLETE": "complete_bash",
        "COMP_WORDS": "llm-surgeon prune --spars",
        "COMP_CWORD": "2",
    }
    code = "import sys; sys.argv = ['llm-surgeon']; import llm_surgeon.cli; llm_surgeon.cli.main()"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | completing, check=False
    )
    assert done.stdout.split() == ["--sparsity", "--sparsegpt-block"]
    assert "--install-completion" in CliRunner().invoke(app, ["-h"]).output
