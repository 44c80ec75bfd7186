"""Pictures of what was kept for single cases, from the kept tokens that their predictions say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from photon_data.recipe import Recipe
from photon_train.evaluation.baselines import grouped
from photon_train.evaluation.cases import Case
from photon_train.evaluation.evaluate import Answers
from photon_train.evaluation.report_html import shown_cases
from photon_train.overlay import PICTURE, Canvas, folders_of, picture
from photon_train.predictions import unpack_mask
from photon_train.scan_input import open_input


class Overlays(NamedTuple):
    """Pictures by question id, and why a volume has none."""

    pictures: dict[str, Path]
    unshown: dict[str, str]


def pictured(answers: Answers, most: int) -> list[Case]:
    """Return at most `most` of the cases that the page shows, the worst and the best in turn, whose kept tokens are known."""
    worst, best = ([one.case for one in cases if one.case.prediction.kept] for cases in shown_cases(answers.judged))
    half = max(most - most // 2, most - len(best))
    chosen = [*worst[:half], *best]
    return list({case.id: case for case in chosen}.values())[:most]


def write_pictures(cases: Sequence[Case], places: Mapping[str, str], tokens_zyx: tuple[int, int, int], folder: Path) -> Overlays:
    """Write a picture into a folder per case; `places` says where each question's volume is.

    Predictions do not say how salient tokens are: the planes go through the kept token nearest to the middle. Each volume is
    opened once, and one that cannot be shown costs its own pictures.
    """
    fitting = [case for case in cases if case.id in places and case.prediction.visual_tokens == np.prod(tokens_zyx)]
    found = Overlays({}, {})
    for place, group in grouped(fitting, lambda case: places[case.id]).items():
        try:
            scan = open_input(place, Recipe())
            canvas = Canvas(scan.volume, scan.native, tokens_zyx)
            for case in group:
                found.pictures[case.id] = _written(case, canvas, folders_of(folder, case.id, 1)[0])
        except (ValueError, OSError) as error:
            found.unshown[place] = str(error)
    return found


def _written(case: Case, canvas: Canvas, folder: Path) -> Path:
    keep_V = unpack_mask(case.prediction.kept, case.prediction.visual_tokens)
    folder.mkdir(parents=True, exist_ok=True)
    picture(canvas, keep_V, keep_V.astype(np.float32), case.question).save(folder / PICTURE)
    return folder / PICTURE
