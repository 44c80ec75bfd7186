"""What `photon predict` shows of the tokens that were kept: overlays in a folder, and the recall of masks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from photon_cli.options import numbers, numbers_or_name
from photon_data.picture import AUTO, resolve_window
from photon_data.recipe import Recipe
from photon_train.answering.predictor import Reply, RequestGroup
from photon_train.answering.scan import ScanInput, open_input
from photon_train.kept_tokens import CountedMask, counted_masks
from photon_train.overlay import Canvas, View, folders_of, write_overlay
from photon_train.rows import TAG, Row

RECALL = "recall.json"


def view_of(window: str, at: str | None) -> View:
    """Return how pictures are taken; UsageError now, not when everything is answered."""
    window_hu = numbers_or_name(window, "--window")
    if window_hu != AUTO:
        resolve_window(window_hu, [])
    return View(window_hu, numbers(at, 3, "--at") if at else None)


class KeptOrder(NamedTuple):
    """What is asked for: a folder for overlays, how pictures are taken, a folder of masks."""

    overlay: Path | None
    view: View
    masks: Path | None


@dataclass(frozen=True)
class Shown:
    """A scan that questions were asked about, ready to show what was kept of it."""

    order: KeptOrder
    canvas: Canvas
    masks: list[CountedMask]

    @classmethod
    def of(cls, order: KeptOrder, scan: ScanInput, tokens_zyx: tuple[int, int, int], masks: Path | None) -> Shown:
        """Return a scan with the masks of a folder, if any."""
        canvas = Canvas(scan.volume, scan.native, tokens_zyx)
        return cls(order, canvas, counted_masks(masks, canvas.cells) if masks else [])

    def show(self, folder: Path | None, title: str, keep_V: np.ndarray, saliency_V: np.ndarray) -> dict[str, Any]:
        """Write the overlay of one question into its folder (if given), and return the recalls of the masks by name."""
        recalls = {mask.name: mask.recall(keep_V)._asdict() for mask in self.masks}
        if folder:
            write_overlay(folder, self.canvas, keep_V, saliency_V, title, self.order.view)
            if recalls:
                (folder / RECALL).write_text(json.dumps(recalls, indent=1) + "\n")
        return recalls


def show_rows(order: KeptOrder, group: RequestGroup, replies: Sequence[Reply], tokens_zyx: tuple[int, int, int]) -> None:
    """Write what was kept of the volumes of a manifest's rows; with masks in a folder per volume id, their recall beside it."""
    assert order.overlay is not None, "what a manifest keeps is shown in a folder"
    titles = {prompt.id: _question(prompt.row) for prompt in group.requests}
    count = len(group.videos)
    for number, video in enumerate(group.videos):
        scan = open_input(str(video), Recipe())
        own = order.masks / scan.id if order.masks else None
        shown = Shown.of(order, scan, tokens_zyx, own if own and own.exists() else None)
        for name, keep_V, saliency_V in ((r.prediction.id, r.keep_V, r.saliency_V) for r in replies if not r.prediction.error):
            folder = folders_of(order.overlay, name, count)[number]
            shown.show(folder, titles[name], np.split(keep_V, count)[number], np.split(saliency_V, count)[number])


def _question(row: Row) -> str:
    """Return the text of the last user turn."""
    said: str = next(message["content"] for message in reversed(row["messages"]) if message["role"] == "user")
    return said.replace(TAG, "").strip()
