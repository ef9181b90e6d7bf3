"""A processor that nobody slows down, for measurements that wait for the host.

On a machine that others use, too, a processor now and then takes half as long again for everything, most likely because its
other half works for somebody else: for tenths of a second, unseen by `top` and not counted as stolen time. What a short loop
takes shows it. So a sample is taken where such a loop is as fast as it has been, and once more if it is not when the sample
ends.
"""

from __future__ import annotations

import os
import time

TOLERANCE = 1.2  # undisturbed loops differ by 0.1, disturbed ones take 1.3 to 1.9 as long
PATIENCE = 0.5  # seconds that an undisturbed one is sought for


def set_processors(allowed: set[int]) -> None:
    """For all threads of this process."""
    for thread in os.listdir("/proc/self/task"):
        try:
            os.sched_setaffinity(int(thread), allowed)
        except ProcessLookupError:  # it has ended meanwhile
            pass


class QuietProcessor:
    """Moves this process to another processor. Where that cannot be done (only Linux can), it waits for a better time.

    Attributes:
        best: seconds of the loop at its fastest, of all processors that this process may use.
    """

    def __init__(self) -> None:
        self.processors = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else []
        self.best = float("inf")
        for processor in self.processors:
            set_processors({processor})
            self.is_quiet()
        if self.processors:
            set_processors(set(self.processors))

    def loop(self) -> float:
        """Seconds of a fixed piece of Python, some 0.3 ms."""
        start = time.perf_counter()
        total = 0
        for i in range(10000):
            total += i
        return time.perf_counter() - start

    def is_quiet(self) -> bool:
        """Whether the processor that this runs on is undisturbed now."""
        seconds = min(self.loop() for _ in range(3))
        self.best = min(self.best, seconds)
        return seconds <= TOLERANCE * self.best

    def seek(self) -> bool:
        """Stay, or go to an undisturbed processor, and stay there; False if there was none for half a second."""
        until = time.perf_counter() + PATIENCE
        while not (found := self.is_quiet()) and time.perf_counter() < until:
            for processor in self.processors:
                set_processors({processor})
                if self.is_quiet():
                    return True
        return found
