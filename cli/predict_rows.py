"""`photon predict --manifest ROWS --output PREDICTIONS`: progress, and what failed."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from photon_cli.kept import KeptOrder, show_rows
from photon_cli.options import console
from photon_cli.predict_model import Model
from photon_data.errors import UsageError
from photon_train import predict
from photon_train.answering import Reply
from photon_train.grouping import Group, read_rows
from photon_train.predict import Outcome, Shard, Watch

SHOWN_FAILURES = 10
LINE_S = 10  # without a terminal a line is printed this often


def predict_rows(model: Model, manifest: Path, output: Path, shard: str | None, kept: KeptOrder) -> bool:
    """Answer the rows and return whether all of this part have an answer."""
    rows = read_rows(manifest)
    part, local = _part(shard)
    device = f"cuda:{local}" if local is not None and model.device in ("auto", "cuda") and _has_gpu() else None
    asker = model.load(device)
    tokens_zyx = asker.processor.tokens_thw()

    def on_replies(group: Group, replies: Sequence[Reply]) -> None:
        show.replies(group, replies)
        if kept.overlay:
            with show.costing_itself(group.name):
                show_rows(kept, group, replies, tokens_zyx)

    with _Show() as show:
        outcome = predict.predict_rows(asker, rows, output, part, Watch(show.start, on_replies))
    _print_outcome(outcome, output, part, show)
    return not (outcome.failed or show.unshown)


class _Show:
    """A live bar in a terminal, plain lines elsewhere."""

    def __init__(self) -> None:
        columns = (TextColumn("answering"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[detail]}"))
        self.bar = Progress(*columns, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=console)
        self.bar.disable = not console.is_terminal
        self.task = self.bar.add_task("", total=None, detail="")
        self.began = self.last_line = time.monotonic()
        self.total = self.done = self.kept = self.visual = 0
        self.unshown: dict[str, str] = {}

    def __enter__(self) -> _Show:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def start(self, total: int, before: int) -> None:
        """Say how much there is to do."""
        self.total, self.done = total, before
        console.print(f"{total} rows, {before} of them answered before", soft_wrap=True)
        self.bar.update(self.task, total=total, completed=before)

    def replies(self, group: Group, replies: Sequence[Reply]) -> None:
        """Count a batch."""
        self.done += len(replies)
        self.kept += sum(reply.prediction.kept_tokens for reply in replies)
        self.visual += sum(reply.prediction.visual_tokens for reply in replies)
        self.bar.update(self.task, completed=self.done, detail=self.share())
        if not console.is_terminal and time.monotonic() - self.last_line > LINE_S:
            self.last_line = time.monotonic()
            console.print(f"{self.done} of {self.total} {self.share()}")

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


def _print_outcome(outcome: Outcome, output: Path, part: Shard, show: _Show) -> None:
    seconds = time.monotonic() - show.began
    rate = f", {outcome.answered / seconds:.2f} questions/s" if outcome.answered else ""
    console.print(f"{outcome.answered} answered, {outcome.before} before, {len(outcome.failed)} failed{rate} {show.share()}")
    _print_some("failed", outcome.failed, "their lines have an error")
    _print_some("no overlay of", show.unshown, "none of these has an overlay")
    where = output if outcome.merged else f"{part.path(output)}; the last part to end writes {output}"
    console.print(f"predictions: {where}", soft_wrap=True)


def _print_some(what: str, reasons: dict[str, str], rest: str) -> None:
    for name, reason in list(reasons.items())[:SHOWN_FAILURES]:
        console.print(f"{what} {name}: {reason}", soft_wrap=True)
    if len(reasons) > SHOWN_FAILURES:
        console.print(f"and {len(reasons) - SHOWN_FAILURES} more; {rest}")


def _part(shard: str | None) -> tuple[Shard, int | None]:
    """Return this process's part, and its number on this machine under torchrun; UsageError for no I/N."""
    if shard is None and "WORLD_SIZE" in os.environ and "RANK" in os.environ:
        local = int(os.environ.get("LOCAL_RANK", os.environ["RANK"]))
        return Shard(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])), local
    if shard is None:
        return predict.WHOLE, None
    index, _, count = shard.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise UsageError(f"--shard: I/N with I from 0 to N - 1 wanted, for example 0/4, got {shard!r}")
    return Shard(int(index), int(count)), None


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
