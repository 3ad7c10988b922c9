"""What a process has used, as the kernel counts it: CPU time and resident memory, its descendants included.

CPU time is read from the process's own CPU clock, which counts user and system time of all its threads, ended ones
too, in nanoseconds; `/proc/PID/stat` has the same in steps of 10 ms.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

SETTLED_NS: Final = 50_000
SETTLE_STEP_SECONDS: Final = 0.005
SETTLE_STEPS: Final = 40


def cpu_ns(pid: int) -> int:
    """CPU time used by `pid` and its living descendants so far, nanoseconds."""
    return sum(time.clock_gettime_ns(_clock(member)) for member in family(pid))


def settled_cpu_ns(pid: int) -> int:
    """The same once it has stopped growing: what a request leaves behind (its log line) belongs to its cost.

    Waits 200 ms at most; a process that never rests is read as it is.
    """
    used = cpu_ns(pid)
    for _ in range(SETTLE_STEPS):
        time.sleep(SETTLE_STEP_SECONDS)
        before, used = used, cpu_ns(pid)
        if used - before < SETTLED_NS:
            break
    return used


def rss_bytes(pid: int) -> int:
    """Resident memory of `pid` and its living descendants, bytes. Pages they share are counted for each."""
    return sum(_status_bytes(member, "VmRSS") for member in family(pid))


def family(pid: int) -> Iterator[int]:
    """`pid` and its living descendants."""
    yield pid
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            listed = children.read_text().split()
        except OSError:  # the thread has ended meanwhile
            continue
        for child in listed:
            yield from family(int(child))


def _clock(pid: int) -> int:
    """The id of another process's CPU clock, as clock_getcpuclockid(3) makes it: scheduler time, all threads."""
    return (~pid << 3) | 2


def _status_bytes(pid: int, name: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    return 0
