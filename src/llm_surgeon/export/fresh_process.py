"""Scripts in a fresh process that ends with this one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path


def run_script(
    script: Path,
    arguments: Sequence[str],
    environment: Mapping[str, str] | None = None,
    python: str = sys.executable,
) -> subprocess.CompletedProcess[str]:
    """Run a script with this Python or another one, and wait for it.

    The script has to watch its standard input, which is at its end as soon as this process has ended.

    Args:
        script: The script.
        arguments: Its arguments.
        environment: Variables in addition to those of this process.
        python: The Python to run it with.
    """
    # The fresh process's standard input is the reading end, and so ends with this process, however this process ends.
    reading, writing = os.pipe()
    try:
        # Without -P, modules beside the script would hide installed ones of the same names.
        return subprocess.run(
            [python, "-P", str(script), *arguments],
            stdin=reading,
            capture_output=True,
            text=True,
            env=os.environ | dict(environment or {}),
            check=False,
        )
    finally:
        os.close(reading)
        os.close(writing)
