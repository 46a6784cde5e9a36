"""Memory of this process and of its device, in bytes: peaks, and what is available."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import psutil
import torch

# Files in which Linux keeps the peak of the resident memory, and by which it resets that.
_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_HIGH_WATER_MARK = "5"


def peak_resident_bytes() -> int:
    """Largest resident memory of this process so far, or since ``reset_peak``, in bytes.

    Pages of memory-mapped files (safetensors) count while they are resident. Memory of a GPU does not count, see
    ``peak_device_bytes``.
    """
    try:
        found = re.search(r"^VmHWM:\s+(\d+) kB$", _STATUS.read_text(encoding="ascii", errors="replace"), re.MULTILINE)
    except OSError:
        found = None
    return int(found.group(1)) * 1024 if found else _peak_from_rusage()


def peak_device_bytes(device: torch.device | str) -> int:
    """Largest memory of tensors on a CUDA device so far, or since ``reset_peak(device)``, in bytes; 0 elsewhere."""
    return torch.cuda.max_memory_allocated(device) if _uses_cuda(device) else 0


def peak_bytes(device: torch.device) -> int:
    """Peak bytes of the device if it is a GPU, else of the process's resident memory, since the last reset."""
    return peak_device_bytes(device) if device.type == "cuda" else peak_resident_bytes()


def reset_peak(device: torch.device | str = "cpu") -> bool:
    """Reset the peaks to the memory that is held now.

    Args:
        device: A CUDA device whose peak is reset as well.

    Returns:
        Whether the resident peak was reset. Only Linux can, and a sandbox may forbid it. If not, later peaks count from
        the start of the process.
    """
    if _uses_cuda(device):
        torch.cuda.reset_peak_memory_stats(device)
    try:
        _CLEAR_REFS.write_text(_RESET_HIGH_WATER_MARK, encoding="ascii")
    except OSError:
        return False
    return True


def available_bytes(device: torch.device) -> int:
    """Bytes that new tensors on a device may take: free on a CUDA device, available on the host."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available)


def in_main_memory(directory: str | Path) -> bool:
    """Whether files of a directory lie in main memory, as those of a ``tmpfs`` do, as far as the system tells."""
    place = Path(directory).resolve()
    mounts = {Path(mount.mountpoint): mount.fstype for mount in psutil.disk_partitions(all=True)}
    kind = next((mounts[parent] for parent in (place, *place.parents) if parent in mounts), "")
    return kind in ("tmpfs", "ramfs")


def _uses_cuda(device: torch.device | str) -> bool:
    # Asking an idle CUDA for its peak would start it, and take hundreds of megabytes.
    return torch.device(device).type == "cuda" and torch.cuda.is_initialized()


def _peak_from_rusage() -> int:
    import resource  # here, because Windows has no such module

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
