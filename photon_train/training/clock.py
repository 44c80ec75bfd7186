"""How long a step took, and how much of it went by waiting for data."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Seconds since the last restart, and how many of them were waits."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Begin a step."""
        self._started, self._waited = time.perf_counter(), 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count what happens within as waiting."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._waited += time.perf_counter() - started

    def row(self, questions: float, volumes: float) -> dict[str, float]:
        """Return the timing of the step, with rates from the questions and volumes of all devices."""
        seconds = time.perf_counter() - self._started
        return {
            "seconds": seconds,
            "questions_per_second": questions / seconds,
            "volumes_per_second": volumes / seconds,
            "data_wait_share": self._waited / seconds,
        }
