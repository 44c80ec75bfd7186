"""What can be wrong with a person's data, as one exception with a code to count by and a sentence to read."""

from __future__ import annotations

import difflib
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path


class Refused(ValueError):
    """A scan that must not become a store, and why.

    `code` is a short stable slug to group by ("truncated", "hu-implausible"); `message` says what was wanted, what was
    found and what to do. Neither may quote free text of a header: that is where patients' names live.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class UsageError(ValueError):
    """A command, option or table that cannot be followed: wanted, found, remedy. Nothing was written."""


def first_few(names: Sequence[str], most: int = 3) -> str:
    """Return names in a sentence, "a, b, c, ..." where there are more than `most`."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def nearest_name(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that is spelled most like `name`, in upper or lower case; None where none is like it."""
    by_lower = {other.casefold(): other for other in known}
    near = difflib.get_close_matches(name.casefold(), by_lower, n=1, cutoff=0.5)
    return by_lower[near[0]] if near else None


def name_hint(name: str, known: Iterable[str]) -> str:
    """Return "did you mean 'spacing_mm'?" for a misspelled name; where no known name is like it, "there are a, b, c"."""
    known = list(known)
    near = nearest_name(name, known)
    return f"did you mean {near!r}?" if near else f"there are {', '.join(known)}"


def unforeseen(error: Exception) -> str:
    """Return where an unforeseen error arose. Its text is left out: it may quote a header, and headers name patients."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"an unforeseen {type(error).__name__} in {Path(frame.filename).name}, line {frame.lineno}"
