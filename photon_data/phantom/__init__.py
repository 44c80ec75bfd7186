"""Synthetic raw CT scans with known answers, for the demo, the tests and the benchmarks.

DIR/scans/<id>.nii[.gz]                  the raw scans, and nothing else: point `prepare` here
DIR/masks/<id>/<structure>.nii.gz        uint8 in the scan's own geometry; organs are 1, the lesions of a finding 1, 2, 3
                                         (1 is the largest); a lesion also belongs to its organ; absent findings have no file
DIR/questions.jsonl                      one row per question, see `questions.question_rows`
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from photon_data.export import nifti_header, write_nifti
from photon_data.files import to_jsonl
from photon_data.phantom.anatomy import Layer, draw_body
from photon_data.phantom.lesions import Lesion, draw_lesions, lesion_layers
from photon_data.phantom.plan import EASY_FINDINGS, FINDINGS, Slot, occurrence, seeded, slot
from photon_data.phantom.questions import caption_rows, question_rows
from photon_data.phantom.scanner import SLAB, Scan, draw_scan, paint, stored_planes

__all__ = ["Phantom", "draw_phantom", "make_phantoms", "write_phantom"]

DEFAULT_SIZE = 384


@dataclass(frozen=True)
class Phantom:
    """One synthetic scan, drawn but not yet sampled: who, how it is scanned, what is painted and what is asked."""

    slot: Slot
    scan: Scan
    layers: tuple[Layer, ...]
    lesions: dict[str, tuple[Lesion, ...]]
    questions: list[dict[str, Any]]

    @property
    def volume(self) -> str:
        """Id of the scan."""
        return self.slot.volume

    def scan_path(self, directory: Path) -> Path:
        """Where its scan lies under the directory of all phantoms."""
        return directory / "scans" / f"{self.volume}{self.scan.suffix}"

    def mask_path(self, directory: Path, structure: str) -> Path:
        """Where the mask of one of its structures lies."""
        return directory / "masks" / self.volume / f"{structure}.nii.gz"


def make_phantoms(
    directory: Path,
    n: int,
    seed: int,
    *,
    size: int = DEFAULT_SIZE,
    easy: bool = False,
    progress: Callable[[Phantom], object] | None = None,
) -> list[Phantom]:
    """Write n phantoms and their questions.jsonl; `progress` is called after each. The same seed gives the same bytes.

    Phantom i is the same whatever n is. `size` is the number of voxels across a slice: smaller is faster and coarser, with the
    same bodies, fields of view and answers. `easy` phantoms have whole organs affected, and are asked only whether they are;
    those of the training split have captions too.
    FileExistsError if the directory holds scans that this call would not write, and which its questions would not cover.
    """
    phantoms = [draw_phantom(seed, index, size, easy=easy) for index in range(n)]
    _refuse_strangers(directory, phantoms)
    directory.mkdir(parents=True, exist_ok=True)
    for phantom in phantoms:
        write_phantom(directory, phantom)
        if progress:
            progress(phantom)
    rows = to_jsonl(row for phantom in phantoms for row in phantom.questions)
    partial = directory / ".questions.jsonl.partial"
    partial.write_text(rows, encoding="utf-8")
    partial.replace(directory / "questions.jsonl")
    return phantoms


def draw_phantom(seed: int, index: int, size: int = DEFAULT_SIZE, *, easy: bool = False) -> Phantom:
    """Phantom number `index`: the patient's body, the scan's view of it, and lesions within that view. Milliseconds, no files."""
    at = slot(seed, index)
    body = draw_body(seeded(seed, "body", at.patient_index))
    scan = draw_scan(at, seeded(seed, "scan", index), body, size)
    findings = EASY_FINDINGS if easy else FINDINGS
    drawn = {finding.name: occurrence(at, finding) for finding in findings}
    occurrences = {name: found for name, found in drawn.items() if found}
    lesions = draw_lesions(seeded(seed, "lesions", index), body, scan.visible, occurrences)
    table = (body.table,) if scan.has_table else ()
    layers = (*table, *body.layers, *lesion_layers(lesions))
    rows = question_rows(at, findings, occurrences, lesions)
    if easy:
        rows += caption_rows(at, findings, occurrences)
    return Phantom(at, scan, layers, lesions, rows)


def write_phantom(directory: Path, phantom: Phantom) -> None:
    """Sample one phantom into its raw scan and its masks."""
    painted = paint(phantom.layers, phantom.scan.geometry)
    mask_header = nifti_header(phantom.scan.geometry, "<u1")
    for structure, values in _mask_values(phantom.layers).items():
        path = phantom.mask_path(directory, structure)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_nifti(path, mask_header, (values[painted[at : at + SLAB]] for at in range(0, len(painted), SLAB)))
    path = phantom.scan_path(directory)
    path.parent.mkdir(parents=True, exist_ok=True)
    storage = phantom.scan.storage
    header = nifti_header(phantom.scan.geometry, storage.dtype, storage.slope, storage.intercept)
    noise = seeded(phantom.slot.seed, "noise", phantom.slot.index)
    write_nifti(path, header, stored_planes(phantom.scan, painted, phantom.layers, noise))


def _mask_values(layers: tuple[Layer, ...]) -> dict[str, np.ndarray]:
    """For every structure the mask value of each painted value: uint8 [1 + number of layers]."""
    values: dict[str, np.ndarray] = {}
    for painted, layer in enumerate(layers, start=1):
        for structure, label in ((layer.structure, layer.label), (layer.within, 1)):
            if structure:
                values.setdefault(structure, np.zeros(1 + len(layers), np.uint8))[painted] = label
    return values


def _refuse_strangers(directory: Path, phantoms: list[Phantom]) -> None:
    """A scan left by another seed or a larger n would be prepared too, without questions."""
    ours = {phantom.scan_path(directory) for phantom in phantoms}
    strangers = sorted(path.name for path in (directory / "scans").glob("[!.]*") if path not in ours)
    if strangers:
        raise FileExistsError(
            f"an empty folder, or one made by the same call, wanted; {directory / 'scans'} also holds {strangers[0]}"
            f" ({len(strangers)} such files): choose another directory or remove them"
        )
