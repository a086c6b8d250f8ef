"""Find out how much of this process's cores other processes take, from Linux's /proc/stat."""

import os
import re
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

STAT = Path("/proc/stat")
LEAST = 0.2  # seconds to observe; the kernel counts in steps of 0.01 s
MUCH = 0.3  # cores; less does not slow a run down noticeably


class CoreTime(NamedTuple):
    """CPU seconds so far."""

    clock: float  # seconds
    busy: float  # of the cores that this process may use, whoever uses them
    own: float  # of this process, its threads and the children that have ended


def core_time() -> CoreTime | None:
    """Return the CPU time until now; None if the system does not tell."""
    with suppress(OSError, ValueError, AttributeError):  # macOS has neither the file nor the affinity
        usable, busy = os.sched_getaffinity(0), 0
        for number, counts in re.findall(r"(?m)^cpu(\d+) (.*)$", STAT.read_text()):
            if int(number) in usable:
                user, nice, system, _idle, _wait, *interrupts = map(int, counts.split()[:8])
                busy += user + nice + system + sum(interrupts)
        return CoreTime(time.monotonic(), busy / os.sysconf("SC_CLK_TCK"), sum(os.times()[:4]))
    return None


def taken_by_others(since: CoreTime | None) -> str:
    """Return in words how much of the cores other processes have taken since then; "" if it was little."""
    now = core_time()
    if since is None or now is None or now.clock - since.clock < LEAST:
        return ""
    usable = len(os.sched_getaffinity(0))
    taken = (now.busy - since.busy - (now.own - since.own)) / (now.clock - since.clock)
    return f"other processes take {taken:.1f} of the {usable} core(s) that this one may use" if taken > MUCH else ""
