"""One GPU among processes: many may prepare at once, a measurement has it alone."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path


class DeviceLock:
    """One GPU among processes: `shared()` while preparing, `exclusive()` while measuring. Released when a process ends.

    Who wants it exclusively closes a gate first, so that preparations that begin meanwhile wait.
    """

    def __init__(self, folder: Path, device: str) -> None:
        self.gate, self.use = (os.open(folder / f"{device}.{name}", os.O_CREAT | os.O_RDWR) for name in ("gate", "use"))

    def shared(self) -> None:
        fcntl.flock(self.gate, fcntl.LOCK_EX)
        fcntl.flock(self.use, fcntl.LOCK_SH)
        fcntl.flock(self.gate, fcntl.LOCK_UN)

    def exclusive(self, deadline: float) -> bool:
        """Whether it was had before `deadline` (time.monotonic())."""
        return self._wait(self.gate, deadline) and self._wait(self.use, deadline)

    def release(self) -> None:
        fcntl.flock(self.use, fcntl.LOCK_UN)
        fcntl.flock(self.gate, fcntl.LOCK_UN)

    def _wait(self, lock: int, deadline: float) -> bool:
        while time.monotonic() < deadline:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                time.sleep(0.01)
        return False
