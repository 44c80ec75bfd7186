"""Numbers as tables tell them, on the terminal and on the page."""

from __future__ import annotations

from typing import NamedTuple

from photon_train.evaluation.scores import Estimate


def told(estimate: Estimate | None) -> str:
    """Return "82.01", "-" for what is not defined."""
    return "-" if estimate is None or estimate.value is None else f"{estimate.value:.2f}"


def told_interval(estimate: Estimate | None) -> str:
    """Return "80.10 to 83.90"."""
    return "-" if estimate is None or estimate.low is None else f"{estimate.low:.2f} to {estimate.high:.2f}"


def told_value(value: float | None) -> str:
    """Return "82.01" for a number in points."""
    return told(Estimate(value, None, None))


class Sheet(NamedTuple):
    """A table as the terminal and the page have it: the first column names the line, numbers are text already."""

    title: str
    headings: tuple[str, ...]
    lines: list[tuple[str, ...]]
