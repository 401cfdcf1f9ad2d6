"""How much memory this process could still take, and in what pages."""

import ctypes
import os
import sys
from pathlib import Path

import torch

_CGROUP = Path("/sys/fs/cgroup")
_STATUS = Path("/proc/self/status")

_HUGE_BYTES = 2 << 20
# Of <linux/mman.h>: make huge pages of what is there now (since Linux 6.1).
_MADV_COLLAPSE = 25


def free_memory_bytes(device: str) -> int:
    """Memory that a new process could take on the device, a container's limit respected."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = _available_bytes()
    try:
        limit = int((_CGROUP / "memory.max").read_text())  # "max" where there is none
        return max(min(free, limit - int((_CGROUP / "memory.current").read_text())), 0)
    except (OSError, ValueError):
        return free


def own_memory_bytes() -> int:
    """Memory that this process could still take for data, its own limit respected."""
    free = free_memory_bytes("cpu")
    try:
        import resource  # not on every system
    except ImportError:
        return free
    limit = resource.getrlimit(resource.RLIMIT_DATA)[0]
    return free if limit == resource.RLIM_INFINITY else max(min(free, limit - _data_bytes()), 0)


def ask_huge_pages(address: int, byte_count: int) -> bool:
    """Ask for huge pages under some memory of this process; whether that was granted.

    What reads megabytes in a row then waits less for the tables of pages. Nothing else changes, and
    a system that knows no such request goes on as before.
    """
    if not sys.platform.startswith("linux"):
        return False
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)

    def collapse(first: int, after: int) -> bool:
        start, size = first * _HUGE_BYTES, (after - first) * _HUGE_BYTES
        return size > 0 and madvise(start, size, _MADV_COLLAPSE) == 0

    end = address + byte_count
    # with what lies beside it, unless nothing does
    return collapse(address // _HUGE_BYTES, -(-end // _HUGE_BYTES)) or collapse(
        -(-address // _HUGE_BYTES), end // _HUGE_BYTES
    )


def _data_bytes() -> int:
    """What the process's limit of data counts: heaps, stacks, private pages of files."""
    return _kilobytes(_STATUS, "VmData:") or 0


def _available_bytes() -> int:
    available = _kilobytes(Path("/proc/meminfo"), "MemAvailable:")
    if available is not None:
        return available
    # no such file outside Linux; half of all memory is then a cautious guess
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _kilobytes(table: Path, name: str) -> int | None:
    """The bytes of a line `name n kB`; None if there is none."""
    try:
        for line in table.read_text().splitlines():
            if line.startswith(name):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None
