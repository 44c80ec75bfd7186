"""What a person sees while scans are prepared: how far it is, and what did not make it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping

from photon_cli.bar import Bar
from photon_cli.options import console
from photon_data.readers.find import left_alone
from photon_data.records import VolumeRecord
from photon_pipelines.prepare import Plan, Watcher


class Show(Bar):
    """Prints progress of a run, at once every file that did not make it; pass on `watcher`."""

    def __init__(self) -> None:
        super().__init__("looking for scans")
        self.counts: Counter[str] = Counter()
        self.total = self.done_bytes = 0
        self.start = time.monotonic()
        self.watcher = Watcher(self._on_file, self._on_note, self._on_plan, self._on_record, self._on_archive)

    def _on_archive(self, name: str, done: int, total: int) -> None:
        done, total = done // 1_000_000, total // 1_000_000
        self.update(description="unpacking", completed=done, total=total, detail=f"MB, {name}")
        self.line(f"unpacking {name}: {done:,} of {total:,} MB")

    def _on_file(self, count: int) -> None:
        self.update(description="looking for scans", detail=f"{count} files seen")

    def _on_note(self, note: str) -> None:
        console.print(note, soft_wrap=True)

    def _on_plan(self, todo: Plan, ignored: Mapping[str, int]) -> None:
        self.total = len(todo.jobs)
        self.start = time.monotonic()
        self.counts["unchanged"] += len(todo.done)
        console.print(f"{len(todo.jobs) + len(todo.done)} scans found, {len(todo.done)} of them done before")
        if ignored:
            console.print(f"files left alone: {left_alone(ignored)}", soft_wrap=True)
        self.update(description="preparing", total=self.total, completed=0, detail="")

    def _on_record(self, record: VolumeRecord) -> None:
        self.counts[record.state] += 1
        self.done_bytes += record.bytes_in
        if not record.is_there and record.reason:
            console.print(f"{record.state} {record.source}: {record.reason}", soft_wrap=True)
        self.update(advance=1, detail=self._totals())
        self.line(f"{sum(self.counts.values())} done, {self.total} to do in all: {self._totals()}")

    def _totals(self) -> str:
        minutes = (time.monotonic() - self.start) / 60
        states = ", ".join(f"{n} {state}" for state, n in self.counts.items() if n)
        made = sum(self.counts.values()) - self.counts["unchanged"]
        return f"{states}; {self.done_bytes / 1e6:.0f} MB, {made / max(minutes, 1e-9):.0f} volumes/min"
