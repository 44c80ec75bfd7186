"""What a person sees while rows are answered, and what became of them: `photon predict --manifest`, `photon eval --model`."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from photon_cli.bar import Bar
from photon_cli.options import console
from photon_train.answering.manifest import WHOLE, Outcome, Shard
from photon_train.answering.predictor import Reply, RequestGroup

SHOWN_FAILURES = 10


class Show(Bar):
    """Counts the rows that are answered, and what was kept."""

    def __init__(self) -> None:
        super().__init__("answering")
        self.began = time.monotonic()
        self.total = self.done = self.kept = self.visual = 0
        self.unshown: dict[str, str] = {}

    def start(self, total: int, before: int) -> None:
        """Say how much there is to do."""
        self.total, self.done = total, before
        console.print(f"{total} rows, {before} of them answered before", soft_wrap=True)
        self.update(total=total, completed=before)

    def replies(self, group: RequestGroup, replies: Sequence[Reply]) -> None:
        """Count a batch."""
        self.done += len(replies)
        self.kept += sum(reply.prediction.kept_tokens for reply in replies)
        self.visual += sum(reply.prediction.visual_tokens for reply in replies)
        self.update(completed=self.done, detail=self.share())
        self.line(f"{self.done} of {self.total} {self.share()}")

    @contextmanager
    def costing_itself(self, name: str) -> Iterator[None]:
        """Note a volume that cannot be shown, which is no reason not to answer the others."""
        try:
            yield
        except (ValueError, OSError) as error:
            self.unshown[name] = str(error)

    def share(self) -> str:
        """Return the share of visual tokens kept so far, as text."""
        return f"{self.kept / self.visual:.1%} of visual tokens kept" if self.visual else ""


def print_outcome(outcome: Outcome, output: Path, show: Show, part: Shard = WHOLE) -> None:
    """Print how many rows were answered, why some were not, and where the predictions are."""
    seconds = time.monotonic() - show.began
    rate = f", {outcome.answered / seconds:.2f} questions/s" if outcome.answered else ""
    console.print(f"{outcome.answered} answered, {outcome.before} before, {len(outcome.failed)} failed{rate} {show.share()}")
    if outcome.changed:
        console.print(f"{outcome.changed} of them anew: their questions or volumes are others than when they were answered")
    print_some("failed", outcome.failed, "their lines have an error")
    print_some("no overlay of", show.unshown, "none of these has an overlay")
    where = output if outcome.merged else f"{part.path(output)}; the last part to end writes {output}"
    console.print(f"predictions: {where}", soft_wrap=True)


def print_some(what: str, reasons: dict[str, str], rest: str) -> None:
    """Print the first reasons, by the names of what they are about."""
    for name, reason in list(reasons.items())[:SHOWN_FAILURES]:
        console.print(f"{what} {name}: {reason}", soft_wrap=True)
    if len(reasons) > SHOWN_FAILURES:
        console.print(f"and {len(reasons) - SHOWN_FAILURES} more; {rest}")
