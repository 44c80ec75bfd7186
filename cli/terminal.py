"""What both commands share on a terminal: exit codes, the console, errors as sentences, tables, the progress bar."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NoReturn, Self

import typer
from rich.console import Console

from photon_data.errors import Refused, UsageError

# Exit codes.
OK = 0  # everything that was requested is there
PARTIAL = 1  # some inputs were refused or failed (verify: problems were found); the rest is there
MISUSE = 2  # the command cannot be followed; nothing was written
STOPPED = 3  # the run could not go on (no space, no workers); what is done is kept
INTERRUPTED = 130  # Ctrl-C or SIGTERM; what is done is kept

LINE_S = 10  # without a terminal, a progress line is printed at most this often
WIDTH = None if sys.stdout.isatty() else 160  # a log file has room for a table


class _PipeSafeConsole(Console):
    """A console that falls silent when its reader is gone: `| head` neither ends the work nor changes the exit code."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


# No markup: file names hold brackets.
console = _PipeSafeConsole(highlight=False, markup=False, width=WIDTH)
errors = _PipeSafeConsole(stderr=True, highlight=False, markup=False)


def fail(message: str, code: int = MISUSE) -> NoReturn:
    """Print a message on stderr and end the command with an exit code."""
    errors.print(message, style="red", soft_wrap=True)
    raise typer.Exit(code)


@contextlib.contextmanager
def errors_as_exit_codes() -> Iterator[None]:
    """Turn whatever ends a command early into a sentence and an exit code. SIGTERM ends a command as Ctrl-C does.

    Python drops an exception that is raised while it destroys an object. An interrupt that is lost so is sent again.
    """
    from photon_data.prepare_file import NO_SPACE

    def unraisable(lost: Any) -> None:
        if issubclass(lost.exc_type, KeyboardInterrupt):
            threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
        else:
            previous_hook(lost)

    # Dask leaves a time-out behind when it closes; asyncio reports it
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    previous_hook, sys.unraisablehook = sys.unraisablehook, unraisable
    try:
        yield
    except (UsageError, Refused) as error:
        fail(str(error))
    except KeyboardInterrupt:
        fail("Interrupted. What is done is kept; the same command goes on from here.", INTERRUPTED)
    except OSError as error:
        if error.errno in NO_SPACE:
            fail(f"Stopped: {error.strerror}. What is done is kept.", STOPPED)
        fail(f"Stopped: {error.strerror or error}: {error.filename or ''}", STOPPED)
    finally:
        signal.signal(signal.SIGTERM, previous)
        sys.unraisablehook = previous_hook


def run_app(app: typer.Typer) -> None:
    """Run a command line. What the terminal's encoding lacks in file names and answers is printed as escapes."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    app()


def print_lines(lines: Iterable[str]) -> None:
    """Print lines of any length, which the terminal wraps."""
    for line in lines:
        console.print(line, soft_wrap=True)


def print_table(title: str, headings: Sequence[str], rows: Iterable[Sequence[str]], texts: int | None = None) -> None:
    """Print a table whose first `texts` columns are text (None: all of them), the others numbers."""
    from rich.table import Table

    table = Table(title=title, show_header=any(headings))
    for number, name in enumerate(headings):
        is_text = texts is None or number < texts
        table.add_column(name, justify="left" if is_text else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)


class ProgressBar:
    """A context manager: a live bar on a terminal, elsewhere a plain line now and then."""

    def __init__(self, description: str, total: int | None = None) -> None:
        from rich import progress as rich

        columns = ("{task.description}", rich.BarColumn(), rich.MofNCompleteColumn(), "{task.fields[detail]}")
        times = (rich.TimeElapsedColumn(), "left", rich.TimeRemainingColumn())
        self._progress = rich.Progress(*columns, *times, console=console, disable=not console.is_terminal)
        self._task = self._progress.add_task(description, total=total, detail="")
        self.start_s = self._last_line_s = time.monotonic()

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def update(self, **changes: Any) -> None:
        """Change what the bar shows: description, total, completed, advance, detail."""
        self._progress.update(self._task, **changes)

    def count(self, done: int, total: int) -> None:
        """Show that so many of all are done."""
        self.update(completed=done, total=total)

    def line(self, text: str) -> None:
        """Print a line where there is no terminal, unless another one was printed in the last LINE_S seconds."""
        if not console.is_terminal and time.monotonic() - self._last_line_s > LINE_S:
            self._last_line_s = time.monotonic()
            console.print(text)
