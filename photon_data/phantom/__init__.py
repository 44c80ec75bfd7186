"""Synthetic raw CT scans with known answers, for the demo, the tests and the benchmarks.

DIR/scans/<id>.nii[.gz]             the raw scans, and nothing else: point `prepare` here
DIR/masks/<id>/<structure>.nii.gz   uint8 in the scan's own geometry. Organs are 1, the lesions of a finding 1, 2, 3 in
                                    order of size. A lesion also belongs to its organ. Absent findings have no file
DIR/questions.jsonl                 one row per question, see `questions.question_rows`
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from photon_data.files import jsonl_bytes, write_whole
from photon_data.phantom.body import Body, Layer, Shape, block, draw_body, draw_lesions
from photon_data.phantom.plan import (
    EASY_FINDINGS,
    FINDINGS,
    SMALL_FINDINGS,
    Slot,
    deal,
    occurrence_of,
    seeded,
    slot_of,
    with_one_larger,
)
from photon_data.phantom.questions import caption_rows, comparison_rows, question_rows
from photon_data.readers.nifti import nifti_header, write_nifti
from photon_data.volume import Geometry

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
    scan = _draw_scan(slot, seeded(seed, "scan", index), body, size)
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


# --- scans of a body as the world saves them: any axis order, oblique or tilted, anisotropic, in several data types

CROP_MM = 364.0  # side of the cube around the centre of the field of view that the standard recipe keeps
SLAB = 16  # planes sampled at once: bounds the memory, changes no value
HU_RANGE = (-1024, 3071)


class Storage(NamedTuple):
    """How HU are stored: HU = slope * stored + intercept."""

    dtype: str
    slope: float = 1.0
    intercept: float = 0.0


STORAGES = (
    Storage("<i2"),
    Storage("<u2", intercept=-1024),
    Storage("<u1", slope=8, intercept=-1024),
    Storage("<f4"),
    Storage("<i2", intercept=-1024),
    Storage("<i2"),
)
SUFFIXES = (".nii.gz", ".nii", ".nii.gz")
POSES = ("straight", "oblique", "straight", "straight", "oblique", "straight", "oblique", "tilted")
WIDTHS_MM = (320, 345, 370, 400, 440, 480)
LENGTHS_MM = (315, 335, 364, 400, 450)
# Share of `size` in plane, and slice thickness: thin slices come with a coarser matrix, so that no scan grows huge.
SLICES = ((1, 5.0), (1, 4.0), (1, 3.0), (1, 2.5), (2 / 3, 1.5), (2 / 3, 1.0))


@dataclass(frozen=True)
class SimulatedScan:
    """One acquisition."""

    visible: Shape  # what the scan shows and the standard crop of it keeps
    geometry: Geometry
    axes: tuple[int, ...]  # the scanner axes (0 x, 1 y, 2 z) of the array axes, the slowest of the file first
    storage: Storage
    suffix: str
    noise_hu: float
    has_table: bool


def _draw_scan(slot: Slot, rng: np.random.Generator, body: Body, size: int) -> SimulatedScan:
    """A scan of `body`, `size` voxels wide. Field of view and all else but the voxel size do not depend on `size`."""
    width_mm, length_mm = deal(slot, "width", WIDTHS_MM), deal(slot, "length", LENGTHS_MM)
    share, thickness_mm = deal(slot, "slices", SLICES)
    edges = _draw_axes(rng, deal(slot, "pose", POSES)) * [[width_mm], [width_mm], [length_mm]]
    x, y, z = (np.array(body.centre_lps) + rng.uniform((-6, -12, -5), (6, 12, 5))).tolist()
    counts = np.array([round(size * share)] * 2 + [round(length_mm / thickness_mm)])
    axes = rng.permutation(3)
    steps = (edges / counts[:, None])[axes] * rng.choice((-1, 1), 3)[:, None]
    origin = np.array((x, y, z)) - (counts[axes] - 1) / 2 @ steps
    return SimulatedScan(
        visible=block((x, y, z), edges) & block((x, y, z), CROP_MM * np.eye(3)),
        geometry=Geometry.from_arrays(counts[axes], origin, steps),
        axes=tuple(axes.tolist()),
        storage=deal(slot, "storage", STORAGES),
        suffix=deal(slot, "suffix", SUFFIXES),
        noise_hu=float(rng.uniform(8, 22)),
        has_table=bool(rng.random() < 0.7),
    )


def _draw_axes(rng: np.random.Generator, pose: str) -> np.ndarray:
    """Unit vectors (rows, LPS) of the scanner's x, y and z axis; perpendicular unless the gantry is tilted."""
    x, y, z = np.deg2rad(rng.uniform(-9, 9, 3)) * (pose == "oblique")
    cx, sx, cy, sy, cz, sz = np.cos(x), np.sin(x), np.cos(y), np.sin(y), np.cos(z), np.sin(z)
    axes = (
        np.array([[1, 0, 0], [0, cx, sx], [0, -sx, cx]])
        @ np.array([[cy, 0, -sy], [0, 1, 0], [sy, 0, cy]])
        @ np.array([[cz, sz, 0], [-sz, cz, 0], [0, 0, 1]])
    )
    tilt = np.deg2rad(rng.choice((-1, 1)) * rng.uniform(6, 14)) * (pose == "tilted")
    # The tilted gantry turns the slices about x; the table goes on moving along z.
    axes[1] = np.cos(tilt) * axes[1] + np.sin(tilt) * axes[2]
    return axes


def paint(layers: Sequence[Layer], geometry: Geometry) -> np.ndarray:
    """uint8 [shape of geometry]: 0 for air, n + 1 where layers[n] is the last one that holds the voxel's centre."""
    assert len(layers) < 255
    painted = np.zeros(geometry.shape_zyx, np.uint8)
    boxes = [_index_box(layer.shape, geometry) for layer in layers]
    for start in range(0, len(painted), SLAB):
        for value, (layer, (low, high)) in enumerate(zip(layers, boxes, strict=True), start=1):
            first, last = max(low[0], start), min(high[0], start + SLAB)
            if first < last and (low[1:] < high[1:]).all():
                box = tuple(slice(a, b) for a, b in zip((first, *low[1:]), (last, *high[1:]), strict=True))
                inside = layer.shape.contains(*_coordinates_lps(geometry, box))
                painted[box][np.broadcast_to(inside, painted[box].shape)] = value
    return painted


def _index_box(shape: Shape, geometry: Geometry) -> tuple[np.ndarray, np.ndarray]:
    """First and one past the last index, along every array axis, of the voxels that can lie in the shape."""
    corners = np.stack(np.meshgrid(*shape.bounds_lps.T, indexing="ij"), axis=-1).reshape(8, 3)
    index = geometry.index(corners)
    low, high = np.floor(index.min(axis=0)), np.ceil(index.max(axis=0)) + 1
    return low.clip(0, geometry.shape_zyx).astype(int), high.clip(0, geometry.shape_zyx).astype(int)


def _coordinates_lps(geometry: Geometry, box: tuple[slice, ...]) -> list[np.ndarray]:
    """World x, y and z of the voxels in a box, each as small as its own dependence on the axes allows."""
    coordinates = []
    for origin, steps in zip(geometry.origin_lps, zip(*geometry.steps_lps, strict=True), strict=True):
        offsets = [grid * step for grid, step in zip(np.ogrid[box], steps, strict=True) if step]
        coordinates.append(np.asarray(origin + sum(offsets[1:], offsets[0]), np.float32))
    return coordinates


def stored_planes(
    scan: SimulatedScan, painted: np.ndarray, layers: Sequence[Layer], rng: np.random.Generator
) -> Iterator[np.ndarray]:
    """The stored values, slab by slab: HU of the layers (air -1000) with noise that is correlated within the slice."""
    hu = np.array([-1000, *(layer.hu for layer in layers)], np.float32)
    dtype = np.dtype(scan.storage.dtype)
    for start in range(0, len(painted), SLAB):
        slab = hu[painted[start : start + SLAB]]
        noise = rng.standard_normal(slab.shape, np.float32)
        for axis in (1, 2):
            if scan.axes[axis] != 2:
                noise = (noise + np.roll(noise, 1, axis)) * np.float32(np.sqrt(0.5))
        slab = slab + noise * np.float32(scan.noise_hu)
        stored = (slab.clip(*HU_RANGE) - scan.storage.intercept) / scan.storage.slope
        if dtype.kind != "f":
            stored = np.rint(stored).clip(np.iinfo(dtype).min, np.iinfo(dtype).max)
        yield stored.astype(dtype)
