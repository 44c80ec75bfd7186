"""The body of `photon-data phantom`."""

from __future__ import annotations

from pathlib import Path

from rich.progress import Progress

from photon_cli.options import console
from photon_data.errors import UsageError
from photon_data.phantom import make_phantoms


def phantom(directory: Path, n: int, seed: int, size: int, easy: bool) -> None:
    """Make n phantoms with a progress bar and say where they are."""
    with Progress(console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("painting", total=n)
        try:
            made = make_phantoms(directory, n, seed, size=size, easy=easy, progress=lambda _: bar.advance(task))
        except FileExistsError as error:
            raise UsageError(str(error)) from None
    questions = sum(len(phantom.questions) for phantom in made)
    console.print(f"{n} scans in {directory}/scans, masks in {directory}/masks, {questions} questions", soft_wrap=True)
