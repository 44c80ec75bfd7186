"""How a run ends early. A signal that asks for it is noted, and obeyed after the step: what was computed is saved."""

from __future__ import annotations

import os
import signal
import sys
import threading
from multiprocessing.queues import Queue
from types import FrameType, TracebackType
from typing import Any, Self

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # Ctrl-C; a cluster that stops a job; one that warns of it


class TrainingStopped(RuntimeError):
    """The run cannot go on under its settings: a row that cannot be read, a loss that is not finite. Names the rows."""


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

    A batch that cannot be sent, for want of open files, ends the process: Python would print why and drop the batch,
    and the run would wait for it for ever.
    """
    for sign in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(sign, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    Queue._on_queue_feeder_error = staticmethod(_end_reader)  # type: ignore[attr-defined]


def _end_reader(error: Exception, batch: object) -> None:
    print(f"a process that reads ahead cannot send a batch: {error}", file=sys.stderr, flush=True)
    os._exit(0)  # with another code torch raises wherever the run is by then: when it says why it ends, for example
