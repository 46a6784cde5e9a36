"""Processes that work for another: they end with it, and leave nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PARENT = """
import sys
from pathlib import Path
from llm_surgeon.system.worker import ask_worker
from llm_surgeon.records import Failure
def command(order, answer):
    return [sys.executable, "-c", CHILD, str(order), str(answer)]
CHILD = '''
import sys, time
from pathlib import Path
from llm_surgeon.system.worker import answer_worker
from llm_surgeon.records import Failure
def work(task):
    Path(sys.argv[1]).with_name("busy").touch()
    time.sleep(60)
answer_worker(work, *sys.argv[1:])
'''
ask_worker(command, Failure(cause="", remedy=""), "")
"""


@pytest.mark.usefixtures("real_python")
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="children are looked up in /proc")
def test_a_process_whose_parent_is_killed_ends_and_clears_up(tmp_path):
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", PARENT], env=environment) as parent:
        deadline = time.monotonic() + 60
        while not (busy := [*tmp_path.glob("*/busy")]) and time.monotonic() < deadline:
            time.sleep(0.05)
        (child,) = children(parent.pid)
        parent.send_signal(signal.SIGKILL)
    assert busy
    while (Path("/proc") / str(child)).exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not (Path("/proc") / str(child)).exists()
    assert not [*tmp_path.iterdir()]


def children(process):
    return [int(number) for number in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
