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

from photon_data.export import nifti_header, write_nifti
from photon_data.files import write_whole
from photon_data.picture import Window, three_planes
from photon_data.resample import model_grid
from photon_data.volume import Geometry, Volume
from photon_train.kept_tokens import kept_voxels, token_centres, token_map, token_planes

LONGEST_NAME = 80
PICTURE, KEPT, SALIENCY = "planes.png", "kept.nii.gz", "saliency.nii.gz"


class View(NamedTuple):
    """How pictures are made."""

    window_hu: Window | str = "full"
    at_lps: Sequence[float] | None = None  # a point (mm) of the planes; None: of the most salient kept token


DEFAULT_VIEW = View()


@dataclass(frozen=True)
class Canvas:
    """What overlays are drawn on, for all questions on a scan: which voxel is of which token is computed once."""

    volume: Volume  # prepared
    native: Geometry  # of the raw scan
    tokens_zyx: tuple[int, int, int]  # their numbers

    @cached_property
    def cells(self) -> Geometry:
        """The boxes of the tokens."""
        return model_grid(self.volume.geometry, self.tokens_zyx)

    @cached_property
    def tokens(self) -> np.ndarray:
        """int16 [z, y, x]: the token of each voxel of the raw scan."""
        return token_map(self.native, self.cells)


def write_overlay(
    folder: Path, canvas: Canvas, keep_V: np.ndarray, saliency_V: np.ndarray, title: str, view: View = DEFAULT_VIEW
) -> None:
    """Write planes.png, kept.nii.gz (uint8) and saliency.nii.gz (float32) into the folder.

    The NIfTI files have the raw scan's own grid, and headers that hold nothing else: viewers lay them over the scan.
    Voxels beyond the prepared grid are 0. UsageError for an invalid window or a point outside of the volume.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with write_whole(folder / PICTURE) as temporary:
        picture(canvas, keep_V, saliency_V, title, view).save(temporary, "PNG")
    for name, values_V in ((KEPT, keep_V), (SALIENCY, saliency_V)):
        write_values(folder / name, canvas.native, canvas.tokens, values_V)


def write_values(path: Path, native: Geometry, tokens: Iterable[np.ndarray], values_V: np.ndarray) -> None:
    """Write the value of each voxel's token as NIfTI: bools as uint8, others as float32. `tokens` are planes."""
    dtype = "<u1" if values_V.dtype == bool else "<f4"
    by_token = np.append(values_V, [0]).astype(dtype)  # kept_tokens.OUTSIDE is the last of these
    write_nifti(path, nifti_header(native, dtype), (by_token[plane] for plane in tokens))


def write_one(path: Path, canvas: Canvas, keep_V: np.ndarray, saliency_V: np.ndarray, title: str) -> None:
    """Write the one of those files that `path` is named like, without the whole map of a large scan in memory."""
    if path.name == PICTURE:
        picture(canvas, keep_V, saliency_V, title).save(path)
    else:
        values_V = keep_V if path.name == KEPT else saliency_V
        write_values(path, canvas.native, token_planes(canvas.native, canvas.cells), values_V)


def picture(canvas: Canvas, keep_V: np.ndarray, saliency_V: np.ndarray, title: str, view: View = DEFAULT_VIEW) -> Image:
    """Return three planes of the prepared volume with the kept tokens outlined, and the question as title."""
    at = salient_point(canvas.cells, keep_V, saliency_V) if view.at_lps is None else view.at_lps
    kept = kept_voxels(keep_V, canvas.volume.geometry, canvas.cells)
    return three_planes(canvas.volume, window_hu=view.window_hu, size_px=480, at_lps=at, title=title, outlined_zyx=kept)


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
