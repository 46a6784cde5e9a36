"""The program that stands for Python does what Python does, and has nothing of this package."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

import fresh

pytestmark = pytest.mark.skipif(
    os.environ.get(fresh.VARIABLE, fresh.REAL) == fresh.REAL, reason="the tests start real processes only"
)
SHOWN = """
import hashlib, locale, os, signal, sys, tempfile, threading
streams = (sys.stdin, sys.stdout, sys.stderr)
variables = sorted(set(os.environ.items()) - {("_", os.environ.get("_"))})
for shown in (
    sys.argv, sys.path, __name__, globals().get("__file__"), os.getcwd(), tempfile.gettempdir(), os.umask(0),
    hashlib.sha256(repr(variables).encode()).hexdigest(), locale.getencoding(), open(os.devnull).encoding,
    [s and (s.encoding, s.errors, s.line_buffering, s.write_through, s.fileno(), s.isatty()) for s in streams],
    [s and (s.name, s.mode, type(s.buffer).__name__) for s in streams],
    signal.getsignal(signal.SIGINT) is signal.default_int_handler, signal.getsignal(signal.SIGTERM),
    threading.active_count(), os.listdir("/proc/self/fd"), "llm_surgeon" in sys.modules,
):
    print(shown, file=sys.stdout or sys.stderr)
"""
FREE = {"TMPDIR": "/var/tmp", "PYTHONPATH": "/nowhere:/else", "COLUMNS": "33"}


def both(arguments, **how):
    """What the program and the real Python do with the same arguments."""
    ends = []
    for python in (sys.executable, fresh.REAL):
        done = subprocess.run([python, *arguments], capture_output=True, text=True, check=False, **how)
        ends.append([done.returncode, *done.stdout.splitlines(), *done.stderr.splitlines()])
    return ends


@pytest.mark.parametrize("environment", [{}, FREE, {"PYTHONUNBUFFERED": "1"}, fresh.ASCII_ONLY])
@pytest.mark.parametrize("kind", ["-c", "-m", "-P -m", "-u -c", ""])
def test_a_process_is_as_python_makes_it(tmp_path, kind, environment):
    *options, last = kind.split(" ")
    code = SHOWN
    (tmp_path / "script.py").write_text(code)
    what = {"-c": [last, code], "-m": [last, "script"], "": ["script.py"]}[last]
    paths = os.pathsep.join(filter(None, [environment.get("PYTHONPATH"), str(tmp_path)]))
    env = os.environ | {**environment, "PYTHONPATH": paths}
    played, real = both([*options, *what, "one", "--two"], cwd=tmp_path, env=env, stdin=subprocess.DEVNULL)
    assert real[0] == 0, real
    assert played == real


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&-", ">/dev/null"])
def test_streams_are_as_the_shell_leaves_them(closed):
    command = ["sh", "-c", f'exec "$0" "$@" {closed}']
    played, real = (
        subprocess.run([*command, python, "-c", SHOWN], capture_output=True, text=True)
        for python in (sys.executable, fresh.REAL)
    )
    assert played.stdout.splitlines() == real.stdout.splitlines()
    assert (played.stderr, played.returncode) == (real.stderr, real.returncode)


@pytest.mark.parametrize(
    "code",
    [
        "import sys; sys.exit(3)",
        "import sys; sys.exit('words')",
        "import sys; sys.exit(None)",
        "import os; os._exit(7)",
        "import os; os.kill(os.getpid(), 9)",
        "import os; os.abort()",
        "import signal; signal.raise_signal(signal.SIGTERM)",
        "import atexit; atexit.register(print, 'at the end'); print('first')",
        "import threading, time; threading.Thread(target=lambda: (time.sleep(0.2), print('later'))).start()",
        "import sys; print(sys.stdin.read()[::-1])",
        "from llm_surgeon import __version__; print(__version__)",
    ],
)
def test_it_ends_as_python_does(code):
    played, real = both(["-c", code], input="given")
    assert played == real


@pytest.mark.parametrize("code", ["{}['nothing']", "raise KeyboardInterrupt", "1 +", "import nothing_like_it"])
def test_errors_end_with_the_same_line(code):
    played, real = both(["-c", code])
    assert played[0] == real[0]
    assert played[-1] == real[-1]


def test_a_full_standard_output_is_the_same_status():
    status = [
        subprocess.run(["sh", "-c", f"exec {python} -c 'print(1)' >/dev/full 2>/dev/null"]).returncode
        for python in (sys.executable, fresh.REAL)
    ]
    assert status[0] == status[1] != 0


def test_signals_are_passed_on():
    code = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(5)); print(flush=True); "
    for number, status in ((signal.SIGTERM, 5), (signal.SIGINT, -signal.SIGINT), (signal.SIGKILL, -signal.SIGKILL)):
        command = [sys.executable, "-c", code + "time.sleep(60)"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as run:
            run.stdout.readline()
            run.send_signal(number)
            # Ends with whoever holds it.
            assert run.stdout.read() == b""
        assert run.returncode == status


def test_it_is_quick_for_it_has_imported_what_is_not_of_this_package():
    code = "import sys; print('torch' in sys.modules, [name for name in sys.modules if 'llm_surgeon' in name])"
    played, real = both(["-c", code])
    assert (played[1], real[1]) == ("True []", "False []")


def test_it_stays_so_whatever_packages_put_into_the_environment():
    for name in ("datasets", "lm_eval.evaluator", "lm_eval.models.huggingface", "peft", "accelerate", "gguf"):
        pytest.importorskip(name)
    assert both(["-c", "import sys; print('torch' in sys.modules)"])[0][1] == "True"


@pytest.mark.parametrize("options", [["-X", "utf8"], ["-W", "error"], ["-S"], ["-I"]])
def test_what_it_cannot_play_is_done_by_the_real_one(options):
    played, real = both([*options, "-c", "import sys; print(sys.flags, sys.executable, sorted(sys.modules))"])
    assert played == real


def test_what_is_read_early_is_read_again_or_by_the_real_one():
    code = (
        "import sys; from transformers.dynamic_module_utils import HF_MODULES_CACHE; import huggingface_hub.constants "
    )
    code += "as c; print(HF_MODULES_CACHE, c.HF_HUB_OFFLINE, c.HF_HOME)"
    for variables in ({"HF_MODULES_CACHE": "/modules", "HF_HUB_OFFLINE": "1"}, {"HF_HOME": "/home-of-models"}):
        played, real = both(["-c", code], env=os.environ | variables)
        assert played == real
        assert next(iter(variables.values())) in played[1]
