"""What was kept for a question, to look at: a picture, and NIfTI files that lie on the scan as it came."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL.Image import Image

from photon_data.files import write_whole
from photon_data.picture import Window, three_planes
from photon_data.readers.nifti import nifti_header, write_nifti
from photon_data.resample import model_grid
from photon_data.volume import Geometry, Volume
from photon_train.kept_tokens import CountedMask, kept_voxels, token_centres, token_map, token_planes

LONGEST_NAME = 80
PICTURE, KEPT, SALIENCY = "planes.png", "kept.nii.gz", "saliency.nii.gz"


# By what is asked. The first that has a word which a word of the question begins with decides; else "full".
ASKED = "asked"
WORDS_OF_WINDOWS = {
    "lung": "lung pulmon nodul emphysem pneumo consolid atelect bronch pleur effusion opacit fibros airway trache",
    "bone": "bone rib vertebr spin fractur sclerot osteo scoliosis",
    "mediastinum": "heart cardi aort coronar mediast lymph pericard esophag thyroid hiat arter",
    "soft": "liver hepat kidney renal spleen splen pancrea gallbladder colon bowel stomach adrenal bladder prostat "
    "abdom cyst calcif",
}
SIDES = {"left", "right"}
PARTS = {*SIDES, "upper", "lower", "middle", "lobe", "segment", "of", "the"}


class View(NamedTuple):
    """How pictures are made."""

    window_hu: Window | str = ASKED
    at_lps: Sequence[float] | None = None  # a point (mm) of the planes; None: of the most salient kept token


DEFAULT_VIEW = View()


@dataclass(frozen=True)
class Canvas:
    """What overlays are drawn on, for all questions on a scan: which voxel is of which token is computed once."""

    volume: Volume  # prepared
    native: Geometry  # of the raw scan
    tokens_zyx: tuple[int, int, int]  # their numbers
    view: View = DEFAULT_VIEW
    masks: Sequence[CountedMask] = ()  # those that a question names are outlined

    @cached_property
    def cells(self) -> Geometry:
        """The boxes of the tokens."""
        return model_grid(self.volume.geometry, self.tokens_zyx)

    @cached_property
    def tokens(self) -> np.ndarray:
        """int16 [z, y, x]: the token of each voxel of the raw scan."""
        return token_map(self.native, self.cells)


def write_overlay(
    folder: Path,
    canvas: Canvas,
    keep_V: np.ndarray,
    saliency_V: np.ndarray,
    question: str,
    answer: str = "",
) -> None:
    """Write planes.png, kept.nii.gz (uint8) and saliency.nii.gz (float32) into the folder.

    The NIfTI files have the raw scan's own grid, and headers that hold nothing else: viewers lay them over the scan.
    Voxels beyond the prepared grid are 0. UsageError for an invalid window or a point outside of the volume.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with write_whole(folder / PICTURE) as temporary:
        picture(canvas, keep_V, saliency_V, question, answer).save(temporary, "PNG")
    for name, values_V in ((KEPT, keep_V), (SALIENCY, saliency_V)):
        write_values(folder / name, canvas.native, canvas.tokens, values_V)


def write_values(path: Path, native: Geometry, tokens: Iterable[np.ndarray], values_V: np.ndarray) -> None:
    """Write the value of each voxel's token as NIfTI: bools as uint8, others as float32. `tokens` are planes."""
    dtype = "<u1" if values_V.dtype == bool else "<f4"
    by_token = np.append(values_V, [0]).astype(dtype)  # kept_tokens.OUTSIDE is the last of these
    write_nifti(path, nifti_header(native, dtype), (by_token[plane] for plane in tokens))


def write_one(
    path: Path, canvas: Canvas, keep_V: np.ndarray, saliency_V: np.ndarray, question: str, answer: str
) -> None:
    """Write the one of those files that `path` is named like, without the whole map of a large scan in memory."""
    if path.name == PICTURE:
        picture(canvas, keep_V, saliency_V, question, answer).save(path)
    else:
        values_V = keep_V if path.name == KEPT else saliency_V
        write_values(path, canvas.native, token_planes(canvas.native, canvas.cells), values_V)


def picture(
    canvas: Canvas,
    keep_V: np.ndarray,
    saliency_V: np.ndarray,
    question: str,
    answer: str = "",
) -> Image:
    """Return three planes of the prepared volume with the kept tokens outlined, question and answer below them.

    Of the canvas's masks, those that the question names are outlined too, in another colour.
    """
    view, asked = canvas.view, asked_masks(question, canvas.masks)
    at = salient_point(canvas.cells, keep_V, saliency_V) if view.at_lps is None else view.at_lps
    note = f"{'outlined in pink: ' if keep_V.any() else ''}{keep_V.sum()} of {keep_V.size} tokens kept"
    note += f" ({keep_V.mean():.0%})" + (f"; in green: {', '.join(mask.name for mask in asked)}" if asked else "")
    return three_planes(
        canvas.volume,
        window_hu=window_of(question) if view.window_hu == ASKED else view.window_hu,
        size_px=480,
        at_lps=at,
        title=f"{question}  {answer}".strip(),
        outlined_zyx=kept_voxels(keep_V, canvas.volume.geometry, canvas.cells),
        contour_zyx=_OnGrid([mask.voxels_of() for mask in asked], canvas.volume.geometry) if asked else None,
        note=note,
    )


def window_of(question: str) -> str:
    """Return the window in which what is asked is seen best: a name of WINDOWS."""
    words = re.findall(r"[a-z]+", question.lower())
    for window, starts in WORDS_OF_WINDOWS.items():
        if any(word.startswith(start) for word in words for start in starts.split()):
            return window
    return "full"


def asked_masks(question: str, masks: Iterable[CountedMask]) -> list[CountedMask]:
    """Return those that the question names: lung_left for "the lungs" and "the left lung", not for "the right lung"."""
    asked = set(re.findall(r"[a-z]+", question.lower()))
    asked |= {word.removesuffix("s") for word in asked}

    def is_asked(mask: CountedMask) -> bool:
        words = set(re.findall(r"[a-z]+", mask.name.lower()))
        names, sides = {word.removesuffix("s") for word in words - PARTS}, words & SIDES
        return bool(names) and names <= asked and (not sides or not asked & SIDES or bool(sides & asked))

    return [mask for mask in masks if is_asked(mask)]


class _OnGrid:
    """Masks as one array of bools on another grid, of which only the slices that are asked for are looked up."""

    def __init__(self, masks: Sequence[Volume], grid: Geometry) -> None:
        self.masks, self.grid, self.shape = masks, grid, grid.shape_zyx

    def __getitem__(self, index: tuple[int | slice, ...]) -> np.ndarray:
        axes = [np.atleast_1d(np.arange(n)[one]) for n, one in zip(self.shape, index, strict=True)]
        world = self.grid.world(np.stack(np.meshgrid(*axes, indexing="ij"), -1))
        found = np.zeros(world.shape[:-1], bool)
        for mask in self.masks:
            voxel = np.floor(mask.geometry.index(world) + 0.5).astype(int)
            inside = ((voxel >= 0) & (voxel < mask.geometry.shape_zyx)).all(-1)
            found[inside] |= np.asarray(mask.array_zyx, bool)[tuple(voxel[inside].T)]
        return found.reshape([len(axis) for axis, one in zip(axes, index, strict=True) if isinstance(one, slice)])


def salient_point(cells: Geometry, keep_V: np.ndarray, saliency_V: np.ndarray) -> list[float] | None:
    """Return the LPS centre of the most salient kept token, of equals the one nearest to the middle; None for none."""
    if not keep_V.any():
        return None
    best = token_centres(cells)[keep_V & (saliency_V == saliency_V[keep_V].max())]
    from_middle = np.linalg.norm(best - np.asarray(cells.centre_lps), axis=1).round(6)
    return [float(mm) for mm in best[from_middle.argmin()]]


def folders_of(directory: Path, name: str, volumes: int) -> list[Path]:
    """Return a folder for each volume of the row `name`; an id that is no folder name is changed into one."""
    plain = re.sub(r"[^\w.=-]+", "_", name).lstrip(".")
    if plain != name or len(name.encode("utf-8", "replace")) > LONGEST_NAME:
        start = plain.encode("utf-8", "replace")[:LONGEST_NAME].decode("utf-8", "ignore")
        plain = f"{start}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    folder = directory / plain
    return [folder] if volumes == 1 else [folder / f"volume-{number}" for number in range(1, volumes + 1)]
