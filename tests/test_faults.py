"""The fault test with few kills; ``benchmarks/faults.py`` is the long one."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "faults.py"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the test forks")
def test_killed_runs_end_with_the_weights_of_one_that_was_not():
    done = subprocess.run([sys.executable, str(SCRIPT), "--quick", "--kills", "8"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # A run may end before its first kill; not all of them do.
    assert re.search(r"'kills': \[[^\]]", done.stderr)
    assert done.stderr.count("'same': True") >= 1
