"""How far a command is: a live bar in a terminal, elsewhere a plain line now and then."""

from __future__ import annotations

import time
from typing import Any, Self

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from photon_cli.options import console

LINE_S = 10  # without a terminal a line is printed this often


class Bar:
    """What is being done, how much of it is done, and a detail. Use it as a context manager."""

    def __init__(self, description: str) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[detail]}"))
        times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
        self._progress = Progress(*columns, *times, console=console, disable=not console.is_terminal)
        self._task = self._progress.add_task(description, total=None, detail="")
        self._last_line = time.monotonic()

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def update(self, **seen: Any) -> None:
        """Change what is seen: description, total, completed, advance, detail."""
        self._progress.update(self._task, **seen)

    def line(self, text: str) -> None:
        """Print a line where there is no terminal, unless the last one is not long ago."""
        if not console.is_terminal and time.monotonic() - self._last_line > LINE_S:
            self._last_line = time.monotonic()
            console.print(text)
