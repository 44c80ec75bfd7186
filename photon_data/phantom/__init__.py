"""Synthetic raw CT scans with known answers, for the demo, the tests and the benchmarks.

DIR/scans/<id>.nii[.gz]             the raw scans, and nothing else: point `prepare` here
DIR/masks/<id>/<structure>.nii.gz   uint8 in the scan's own geometry. Organs are 1, the lesions of a finding 1, 2, 3 in
                                    order of size. A lesion also belongs to its organ. Absent findings have no file
DIR/questions.jsonl                 one row per question, see `questions.question_rows`
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from photon_data.export import nifti_header, write_nifti
from photon_data.files import jsonl_bytes, write_whole
from photon_data.phantom.body import Layer, draw_body, draw_lesions
from photon_data.phantom.plan import (
    EASY_FINDINGS,
    FINDINGS,
    SMALL_FINDINGS,
    Slot,
    occurrence_of,
    seeded,
    slot_of,
    with_one_larger,
)
from photon_data.phantom.questions import caption_rows, comparison_rows, question_rows
from photon_data.phantom.scanner import SLAB, SimulatedScan, draw_scan, paint, stored_planes

SIZE = 384  # voxels across a slice


@dataclass(frozen=True)
class Phantom:
    """One synthetic scan, drawn but not yet sampled: its patient, how it is scanned, what is painted, what is asked."""

    slot: Slot
    scan: SimulatedScan
    layers: tuple[Layer, ...]
    questions: list[dict[str, Any]]

    def scan_path(self, directory: Path) -> Path:
        """The path of its scan under the directory of all phantoms."""
        return directory / "scans" / f"{self.slot.volume}{self.scan.suffix}"


# A callback; it gets each phantom that was written.
Progress = Callable[[Phantom], object]


def make_phantoms(
    directory: Path,
    n: int,
    seed: int,
    *,
    size: int = SIZE,
    easy: bool = False,
    small: bool = False,
    progress: Progress | None = None,
) -> list[Phantom]:
    """Write n phantoms and their questions.jsonl. The same seed gives the same bytes, and phantom i whatever n is.

    `size` changes no body, field of view or answer. `easy` phantoms have whole organs affected, and are asked only
    whether they are; those of the training split have captions too. `small` ones have lesions within about one visual
    token of the tiny model, and are also asked which of two is larger. FileExistsError if the directory holds scans of
    another seed or a larger n: `prepare` would take them too, without questions.
    """
    phantoms = [draw_phantom(seed, index, size, easy=easy, small=small) for index in range(n)]
    scans, paths = directory / "scans", {phantom.scan_path(directory) for phantom in phantoms}
    if others := sorted(path.name for path in scans.glob("[!.]*") if path not in paths):
        found = f"{others[0]} in {scans} ({len(others)} such files); choose another directory or remove them"
        raise FileExistsError(f"expected an empty folder, or one made by the same call, found {found}")
    for phantom in phantoms:
        write_phantom(directory, phantom)
        if progress:
            progress(phantom)
    with write_whole(directory / "questions.jsonl") as temporary:
        temporary.write_bytes(jsonl_bytes(row for phantom in phantoms for row in phantom.questions))
    return phantoms


def draw_phantom(seed: int, index: int, size: int = SIZE, *, easy: bool = False, small: bool = False) -> Phantom:
    """Phantom number `index`: the body, the scan's view of it, and lesions in that view. Milliseconds, no files."""
    slot = slot_of(seed, index)
    body = draw_body(seeded(seed, "body", slot.patient_index))
    scan = draw_scan(slot, seeded(seed, "scan", index), body, size)
    findings = EASY_FINDINGS if easy else SMALL_FINDINGS if small else FINDINGS
    occurrences = {finding.name: shown for finding in findings if (shown := occurrence_of(slot, finding))}
    if small:
        occurrences = with_one_larger(slot, occurrences)
    lesions = draw_lesions(seeded(seed, "lesions", index), body, scan.visible, occurrences)
    rows = question_rows(slot, findings, occurrences, lesions)
    if small:
        rows += comparison_rows(slot, findings, lesions)
    if easy and slot.split == "train":
        rows += caption_rows(slot, findings, occurrences)
    table = [body.table] if scan.has_table else []
    return Phantom(slot, scan, (*table, *body.layers, *chain(*lesions.values())), rows)


def write_phantom(directory: Path, phantom: Phantom) -> None:
    """Sample one phantom into its raw scan and its masks."""
    layers, geometry, storage = phantom.layers, phantom.scan.geometry, phantom.scan.storage
    painted = paint(layers, geometry)
    # Of every structure, its mask's value for each value of `painted`.
    mask_values: dict[str, np.ndarray] = {}
    for value, layer in enumerate(layers, start=1):
        for structure, label in ((layer.structure, layer.label), (layer.within, 1)):
            if structure:
                mask_values.setdefault(structure, np.zeros(1 + len(layers), np.uint8))[value] = label
    for structure, values in mask_values.items():
        path = directory / "masks" / phantom.slot.volume / f"{structure}.nii.gz"
        slabs = (values[painted[start : start + SLAB]] for start in range(0, len(painted), SLAB))
        write_nifti(path, nifti_header(geometry, "<u1"), slabs)
    header = nifti_header(geometry, storage.dtype, storage.slope, storage.intercept)
    noise = seeded(phantom.slot.seed, "noise", phantom.slot.index)
    write_nifti(phantom.scan_path(directory), header, stored_planes(phantom.scan, painted, layers, noise))
