"""How much of the machine this process may use: what it has, or what a container allows of it."""

from __future__ import annotations

import os
from pathlib import Path

# Inside a container, or a unit of systemd with a mount of its own, its limits; version 2 alone.
CGROUP = Path("/sys/fs/cgroup")


def usable_cpus(cgroup: Path = CGROUP) -> int:
    """Return on how many processors threads of this process can run at a time, at least one.

    Args:
        cgroup: Where the limits of a container are.
    """
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count() or 1
    # Microseconds in each period. Threads beyond that wait, all of them, for the next period.
    quota, period = _words(cgroup / "cpu.max") or ["max", "100000"]
    return count if quota == "max" else max(1, min(count, int(quota) // int(period)))


def usable_memory(cgroup: Path = CGROUP) -> int:
    """Return how many bytes of memory this process and its neighbours in a container may use.

    Args:
        cgroup: Where the limits of a container are.
    """
    import psutil

    total: int = psutil.virtual_memory().total
    (limit,) = _words(cgroup / "memory.max") or ["max"]
    return total if limit == "max" else min(total, int(limit))


def _words(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii").split()
    except OSError:
        return []
