"""Is there memory for what is asked for? Linux grants more than there is, and then kills who uses it."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Of the container, if there is one: of cgroups' second and first version."""


def check_memory(argument: str, needed: int, there: int | None) -> None:
    """Raise ValueError where an argument, named with its value, asks for more bytes than there are."""
    if there is not None and needed > there:
        raise ValueError(f"{argument}, which takes {_size(needed)}; expected at most {_size(there)}, as is free")


def available() -> int | None:
    """Bytes that this process can have: free ones, and those that a file's cache would make room for; None unknown."""
    found = []
    with contextlib.suppress(OSError, ValueError, IndexError):
        (line,) = (line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable:"))
        found.append(1024 * int(line.split()[1]))
    if not found:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for path in _LIMITS:
        with contextlib.suppress(OSError, ValueError):  # "max": none
            found.append(int(Path(path).read_text()))
    return min(found, default=None)


def _size(count: int) -> str:
    return f"{count / 2**30:.3g} GiB"
