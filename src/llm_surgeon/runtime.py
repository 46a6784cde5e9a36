"""Settings of the process that make a run on a CPU faster; for whoever owns the process, never made on import."""

from __future__ import annotations

import ctypes
import sys

# glibc's mallopt: requests above the first go to the kernel one by one, free memory above the second goes back.
_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -3, -1
_KEEP = 1 << 30


def keep_freed_memory() -> bool:
    """Let the C allocator keep freed memory for the next tensors instead of handing it back to the kernel.

    A pass allocates and frees the same tensors of many megabytes again and again; by default each goes back to the
    kernel, and every page of the next one is a page fault: a fifth of the time of a pass on a CPU.

    Returns:
        Whether the setting was made; only Linux with glibc has it.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _KEEP)) and bool(mallopt(_M_TRIM_THRESHOLD, _KEEP))
