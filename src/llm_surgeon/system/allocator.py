"""Settings of the C allocator that make a run on a CPU faster; made by the owner of the process, never on import."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the command line sets up the process before it imports torch
    from torch import Tensor

# Options of glibc's mallopt. Requests above the first threshold go to the kernel one by one, and free memory above the
# second goes back to it.
_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -3, -1
_KEEP = 1 << 30
_MADV_DONTNEED = 4


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


class _Mallinfo(ctypes.Structure):
    """glibc's ``struct mallinfo2``."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    )


def freed_bytes() -> int:
    """Bytes of freed memory that the C allocator keeps for the next tensors; 0 without glibc, which alone tells."""
    if not sys.platform.startswith("linux"):
        return 0
    try:
        mallinfo = ctypes.CDLL(None).mallinfo2
    except (OSError, AttributeError):
        return 0
    mallinfo.restype = _Mallinfo
    return int(mallinfo().fordblks)


def hand_back_freed_memory() -> None:
    """Hand the freed memory that the C allocator keeps back to the kernel; only glibc can.

    The next tensors take page faults again, so this is for when others need the memory more.
    """
    if not sys.platform.startswith("linux"):
        return
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def forget_pages(tensor: Tensor) -> None:
    """Drop the pages of a file-backed tensor from this process's memory; only Linux can.

    Nothing is lost: the mapping is shared, so all that was written is in the file, and is read again when it is needed.
    Tensors without a file are left alone.
    """
    if tensor.untyped_storage().filename is not None and sys.platform.startswith("linux"):
        ctypes.CDLL(None).madvise(ctypes.c_void_p(tensor.data_ptr()), ctypes.c_size_t(tensor.nbytes), _MADV_DONTNEED)
