"""The clocks by which requests arrive: the wall's, or the CPU time of this process."""

import time


class Clock:
    """Seconds since `start`, of CPU time or of the wall.

    By CPU time a load on a shared machine is what it would be alone on its cores: other programs stop this clock. Where
    nothing is left to do before the next arrival, `wait` moves it on.
    """

    def __init__(self, kind: str):
        self._now = time.process_time if kind == "cpu" else time.perf_counter
        self._is_cpu, self._started, self._skipped = kind == "cpu", 0.0, 0.0

    def start(self) -> None:
        """Set it to zero."""
        self._started, self._skipped = self._now(), 0.0

    def now(self) -> float:
        """Seconds since it was started."""
        return self._now() - self._started + self._skipped

    def wait(self, until: float) -> None:
        """Let nothing happen until then."""
        left = max(until - self.now(), 0.0)
        if self._is_cpu:
            self._skipped += left
        else:
            time.sleep(left)
