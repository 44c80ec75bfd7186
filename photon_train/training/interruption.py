"""A signal that asks a run to end is noted, and obeyed after the step: what was computed is saved."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # Ctrl-C; a cluster that stops a job; one that warns of it


class TrainingInterrupted(Exception):
    """A signal ended the run; its message says which checkpoint holds what is done."""


class Interruption:
    """A context in which the first of SIGNALS only sets `asked`; the second raises KeyboardInterrupt.

    Processes that read ahead do as `read_on` says. In a thread that gets no signals nothing is noted.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {sign: signal.signal(sign, self._note) for sign in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for sign, handler in self._before.items():
            signal.signal(sign, handler)

    def _note(self, sign: int, frame: FrameType | None) -> None:
        again, self.asked = self.asked, True
        if again and sign != signal.SIGUSR1:  # which may come every minute
            raise KeyboardInterrupt


def read_on(worker: int) -> None:
    """Make a process that reads ahead ignore a signal to all of its job: the step still needs it.

    Torch ends such a process by itself; where it does so with SIGTERM, it comes a second time.
    """
    for sign in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(sign, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
