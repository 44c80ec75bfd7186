"""Text of command-line options -> values; errors end the command with the exit code for misuse."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NoReturn

import typer
from rich.console import Console

from photon_cli.exits import INTERRUPTED, MISUSE, STOPPED

if TYPE_CHECKING:
    from photon_data.recipe import Policy, Recipe


class _Patient(Console):
    """A console that goes on in silence when nobody reads it any more, so that `| head` ends no work and no exit code lies."""

    def on_broken_pipe(self) -> None:
        """Write to nowhere from now on."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


# No markup: file names hold brackets. A log file has room for a table.
_WIDTH = None if sys.stdout.isatty() else 160
console = _Patient(highlight=False, markup=False, width=_WIDTH)
errors = _Patient(stderr=True, highlight=False, markup=False)


def fail(message: str, code: int) -> NoReturn:
    """Print a message on stderr and end the command."""
    errors.print(message, style="red", soft_wrap=True)
    raise typer.Exit(code)


@contextlib.contextmanager
def edges() -> Iterator[None]:
    """Turn what can end a command early into a sentence and an exit code; SIGTERM ends it as Ctrl-C does."""
    from photon_data.errors import Refused, UsageError
    from photon_data.prepare_file import NO_SPACE

    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # Dask leaves a time-out of its own behind, and asyncio says so
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except (UsageError, Refused) as error:
        fail(str(error), MISUSE)
    except KeyboardInterrupt:
        fail("Interrupted. What is done is kept; the same command goes on from here.", INTERRUPTED)
    except OSError as error:
        if error.errno in NO_SPACE:
            fail(f"Stopped: {error.strerror}. What is done is kept.", STOPPED)
        fail(f"Stopped: {error.strerror or error}: {error.filename or ''}", STOPPED)
    finally:
        signal.signal(signal.SIGTERM, previous)


def pairs(texts: list[str], option: str) -> dict[str, str]:
    """Return {"a": "b", "c": "d"} for ["a=b,c=d"] or ["a=b", "c=d"]; UsageError otherwise."""
    from photon_data.errors import UsageError

    found = {}
    for text in (part for item in texts for part in item.split(",")):
        key, equals, value = text.partition("=")
        if not (key.strip() and equals and value.strip()):
            raise UsageError(f"{option}: name=value wanted, got {text!r}")
        found[key.strip()] = value.strip()
    return found


def fractions(text: str) -> dict[str, float]:
    """Return {"train": 0.8, ...} for "train=0.8,val=0.1,test=0.1"; UsageError otherwise."""
    from photon_data.errors import UsageError

    named = pairs([text], "--split")
    try:
        return {name: float(share) for name, share in named.items()}
    except ValueError:
        raise UsageError(f"--split: numbers like train=0.8,val=0.2 wanted, got {text!r}") from None


def print_any_text() -> None:
    """Print what the terminal's encoding lacks as escapes: names of files need not be text, answers can hold anything."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def numbers(text: str, count: int, option: str) -> list[float]:
    """Return [1.0, 2.0] for "1,2" where `count` is 2; UsageError otherwise."""
    from photon_data.errors import UsageError

    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if len(found) != count:
        raise UsageError(f"{option}: {count} numbers with commas between wanted, got {text!r}")
    return found


def numbers_or_name(text: str, option: str) -> str | tuple[float, float]:
    """Return a text without comma as it is, else its two numbers."""
    if "," not in text:
        return text
    low, high = numbers(text, 2, option)
    return low, high


def make_recipe(
    name: str, settings: list[str], modality: str | None, nan: str | None, max_voxels: int | None = None
) -> tuple[Recipe, Policy]:
    """Return the named recipe and the policy, with --set and the options applied; UsageError for what neither knows."""
    from photon_data.recipe import named_recipe

    options = {"modality": modality, "non_finite": nan, "max_voxels": max_voxels}
    extra = [f"{key}={value}" for key, value in options.items() if value is not None]
    return named_recipe(name, [*settings, *extra])


def is_default(context: typer.Context, name: str) -> bool:
    """Tell whether nobody gave the option of that name."""
    source = context.get_parameter_source(name)
    return source is not None and source.name in ("DEFAULT", "DEFAULT_MAP")


def refuse_beside_manifest(context: typer.Context, names: Iterable[str]) -> None:
    """UsageError if an option was given that is the manifest's to say."""
    from photon_data.errors import UsageError

    given = [name for name in names if not is_default(context, name)]
    if given:
        raise UsageError(f"--manifest alone wanted, got {', '.join(given)} beside it; say it in the manifest")
