"""Does the answer depend on what was asked about? The same questions on edited volumes, and how many answers move.

    erase=asked     the organs that the row names (`extra.organ_masks`) are replaced by their surroundings
    erase=other     as many voxels of other organs are
    erase=kept      the voxels of the tokens that were kept for this question are blanked
    erase=dropped   those of the other tokens are
    flip=lr         the volume is mirrored. A question that names one side is asked about the other
    blind           the mean of all volumes takes the place of each

Edits are made on the model grid, when a volume is read. Two voxels in a corner keep the range of the volume, which a
model may scale by. An answer has moved if it is read as another one than on the volume itself. Mirrored, it should be
the same with "left" and "right" exchanged: that is what `expected` compares, there and nowhere else.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from photon_data.errors import UsageError
from photon_data.mask_store import open_masks
from photon_data.prepare_masks import nearest, read_mask
from photon_data.readers.find import find_scans
from photon_data.recipe import Policy
from photon_data.resample import model_grid
from photon_data.scan import MaskFile
from photon_data.store import is_store, open_volume
from photon_data.volume import Geometry
from photon_train.evaluation.cases import Case, case_of
from photon_train.evaluation.choice_metrics import what_is_read
from photon_train.evaluation.metric import Estimate, Patients, estimate_of
from photon_train.evaluation.results import BLIND, Counterfactuals, Moved, MovedMore
from photon_train.kept_tokens import MaskFolder, kept_voxels
from photon_train.rows import Prediction, Row, choices_of, organ_masks_of, unpack_mask

ERASED = ("asked", "other", "kept", "dropped")
FLIP = "flip=lr"
EDITS = (*(f"erase={what}" for what in ERASED), FLIP, BLIND)
NEED_MASKS = ("erase=asked", "erase=other")
SHELL = 2  # voxels around what is erased, whose values replace it
SIDES = re.compile(r"\b(left|right)\b", re.IGNORECASE)


def edits_of(words: Sequence[str], has_masks: bool) -> tuple[str, ...]:
    """Return the edits that `erase=asked,kept flip=lr` asks for, and `blind` beside them; none without words.

    UsageError for others, and for those that need masks where there are none.
    """
    asked = []
    for word in (part for text in words for part in text.split()):
        kind, _, values = word.partition("=")
        asked += [f"{kind}={value}" for value in values.split(",")] if values else [kind]
    if unknown := [edit for edit in asked if edit not in EDITS]:
        raise UsageError(f"--counterfactual: expected some of {', '.join(EDITS)}, found {unknown[0]!r}")
    if missing := [edit for edit in asked if edit in NEED_MASKS and not has_masks]:
        raise UsageError(f"--counterfactual {missing[0]}: expected --masks, which say where organs are, found none")
    return tuple(edit for edit in EDITS if edit in asked or (asked and edit == BLIND))


def edited_rows(
    rows: Sequence[Row],
    edit: str,
    answered: Mapping[str, Prediction],
    masks: MaskFolder | None,
    tokens_zyx: tuple[int, int, int],
) -> list[Row]:
    """Return the rows on edited volumes, those that the edit applies to: of one store, with something to erase."""
    of_stores = [row for row in rows if len(row["videos"]) == 1 and is_store(str(row["videos"][0]))]
    mean = MeanVolume(tuple(sorted({(str(row["videos"][0]), str(row["volume_id"])) for row in of_stores})))
    found, flipped = [], dict[str, EditedVolume]()
    for row in of_stores:
        place, id, base = str(row["videos"][0]), str(row["volume_id"]), answered.get(row["id"])
        if edit == BLIND:
            found.append({**row, "videos": [mean]})
        elif edit == FLIP:
            volume = flipped.setdefault(place, EditedVolume(place, id, edit))
            found.append({**_about_the_other_side(row), "videos": [volume]})
        elif edit in NEED_MASKS:
            asked = organ_masks_of(row)
            if masks is not None and asked and masks.has(id):
                found.append({**row, "videos": [EditedVolume(place, id, edit, masks, asked)]})
        elif base is not None and base.kept and 0 < base.kept_tokens < base.visual_tokens == np.prod(tokens_zyx):
            found.append({**row, "videos": [EditedVolume(place, id, edit, kept=base.kept, tokens_zyx=tokens_zyx)]})
    return _sharing(found)


def edited_path(predictions: Path, edit: str) -> Path:
    """Return where the answers on edited volumes are: its.jsonl -> counterfactual/its.erase-kept.jsonl beside it."""
    return predictions.parent / "counterfactual" / f"{predictions.stem}.{edit.replace('=', '-')}.jsonl"


def asked_or_other(regions: Mapping[str, np.ndarray], asked: Sequence[str], edit: str) -> np.ndarray:
    """Return the voxels of the asked organs; or as many of masks that do not touch them, those of a like size first.

    Of another mask the voxels nearest to its middle are taken. There are fewer where the others do not have so many.
    """
    named = [region for name, region in regions.items() if name in asked]
    own = np.any(named, axis=0) if named else np.zeros(next(iter(regions.values())).shape, bool)
    if edit == "erase=asked":
        return np.asarray(own)
    wanted, found = int(own.sum()), np.zeros(own.shape, bool)
    apart = [region for name, region in regions.items() if name not in asked and not (region & own).any()]
    for region in sorted(apart, key=lambda region: abs(int(region.sum()) - wanted)):
        voxels = np.argwhere(region & ~found)
        if not len(voxels):
            continue
        order = np.linalg.norm(voxels - voxels.mean(0), axis=1).argsort(kind="stable")
        found[tuple(voxels[order[: wanted - int(found.sum())]].T)] = True
        if found.sum() == wanted:
            break
    return found


def _about_the_other_side(row: Row) -> Row:
    """Return the row with left and right exchanged in questions that name one of them, and in what answers these."""
    messages = [
        {**one, "content": mirrored(one["content"])} if one["role"] == "user" and names_a_side(one["content"]) else one
        for one in row["messages"]
    ]
    if messages == list(row["messages"]):
        return row
    answers = {"choices": [mirrored(choice) for choice in choices_of(row)], "answer": mirrored(row.get("answer") or "")}
    return {**row, "messages": messages, **answers}


def mirrored(text: str) -> str:
    """Return the text with "left" and "right" exchanged: "Left lung" -> "Right lung"."""

    def other(match: re.Match[str]) -> str:
        word = match.group()
        swapped = "right" if word.lower() == "left" else "left"
        return swapped.upper() if word.isupper() else swapped.capitalize() if word[0].isupper() else swapped

    return SIDES.sub(other, text)


def names_a_side(text: str) -> bool:
    """Return whether one of left and right is named, not both: "Which side, left or right?" is about neither."""
    return len({word.lower() for word in SIDES.findall(text)}) == 1


def _sharing(rows: Sequence[Row]) -> list[Row]:
    """Return the rows with equal edits of a volume as one object: such rows share its encoding."""
    same: dict[Any, Any] = {}
    return [{**row, "videos": [same.setdefault(_key(row["videos"][0]), row["videos"][0])]} for row in rows]


def _key(volume: Any) -> Any:
    if isinstance(volume, MeanVolume):
        return volume.places
    return volume.place, volume.edit, volume.asked, volume.kept


# Edited volumes and rows.


@dataclass(frozen=True)
class EditedVolume:
    """A store with something replaced: read and edited when `array_zyx` is taken, [z, y, x] HU on the model grid."""

    place: str
    volume_id: str
    edit: str
    masks: MaskFolder | None = None
    asked: tuple[str, ...] = ()
    kept: str = ""  # of a Prediction
    tokens_zyx: tuple[int, int, int] = (0, 0, 0)

    @property
    def stores(self) -> tuple[str, ...]:
        """Return what it is made of: an answer is asked again where that is prepared again."""
        return (self.place,)

    @property
    def name(self) -> str:
        """Return what a question about it is known by."""
        where = self.masks.out.url if self.masks else ""
        return " ".join((Path(self.place).name, self.edit, where, *self.asked, self.kept))

    @property
    def array_zyx(self) -> np.ndarray:
        """Return the edited voxels. ValueError where there is nothing to erase."""
        volume = open_volume(self.place, "model", id=self.volume_id)
        hu_zyx = volume.numpy()
        if self.edit == FLIP:
            return np.ascontiguousarray(hu_zyx[..., ::-1])
        if self.edit in NEED_MASKS:
            assert self.masks is not None, "edits_of has looked"
            needed = self.asked if self.edit == "erase=asked" else None
            regions = regions_of(self.masks, self.place, self.volume_id, volume.geometry, needed)
            region_zyx = asked_or_other(regions, self.asked, self.edit)
            fill: Any = surroundings(hu_zyx, region_zyx, seed=zlib.crc32(f"{self.volume_id} {self.asked}".encode()))
        else:
            keep_V = unpack_mask(self.kept, int(np.prod(self.tokens_zyx)))
            region_zyx = kept_voxels(
                keep_V if self.edit == "erase=kept" else ~keep_V,
                volume.geometry,
                model_grid(volume.geometry, self.tokens_zyx),
            )
            fill = np.int16(round(float(hu_zyx.mean())))
        if not region_zyx.any():
            raise ValueError(f"{self.edit}: expected voxels to erase, found none")
        return _in_same_range(np.where(region_zyx, _spread(fill, region_zyx), hu_zyx), hu_zyx)


@dataclass(frozen=True)
class MeanVolume:
    """The mean of the stores of several volumes on the model grid, read once."""

    places: tuple[tuple[str, str], ...]  # of each store, and its id

    @property
    def stores(self) -> tuple[str, ...]:
        """Return what it is the mean of."""
        return tuple(place for place, _ in self.places)

    @property
    def name(self) -> str:
        """Return what a question about it is known by."""
        return " ".join(["mean", *(Path(place).name for place in self.stores)])

    @cached_property
    def array_zyx(self) -> np.ndarray:
        """Return the mean HU [z, y, x], rounded."""
        total: Any = 0.0
        for place, volume_id in self.places:
            total = total + open_volume(place, "model", id=volume_id).numpy().astype(np.float32)
        return np.rint(total / len(self.places)).astype(np.int16)


def _in_same_range(edited_zyx: np.ndarray, hu_zyx: np.ndarray) -> np.ndarray:
    """Return the edited voxels with the least and the largest value of the volume in two voxels of a corner."""
    edited_zyx.flat[:2] = hu_zyx.min(), hu_zyx.max()
    return edited_zyx


def surroundings(hu_zyx: np.ndarray, region_zyx: np.ndarray, seed: int) -> np.ndarray:
    """Return a value for each voxel of the region, drawn from the voxels up to SHELL voxels around it."""
    wide = region_zyx
    for _ in range(SHELL):
        grown = wide.copy()
        for axis in range(3):
            for shift in (1, -1):
                moved = np.roll(wide, shift, axis)
                edge: list[Any] = [slice(None)] * 3
                edge[axis] = 0 if shift == 1 else -1
                moved[tuple(edge)] = False  # what comes round from the other side
                grown |= moved
        wide = grown
    shell = hu_zyx[wide & ~region_zyx]
    shell = shell if len(shell) else np.array([hu_zyx.min()])
    return np.random.default_rng(seed).choice(shell, int(region_zyx.sum()))


def regions_of(
    masks: MaskFolder, place: str, volume_id: str, grid: Geometry, names: Sequence[str] | None = None
) -> dict[str, np.ndarray]:
    """Return {name: bool [z, y, x]} of the masks of a volume on its model grid, all or those of `names`.

    UsageError where there are none.
    """
    if masks.is_prepared:
        stored = open_masks(place, masks.out.at(""), grid="model")
        found = {name: stored.mask(name).numpy() for name in stored.names if names is None or name in names}
    else:
        sources = find_scans(masks.out.path / volume_id, label_maps=True).sources
        files = {one.id: MaskFile(one.id, one.files) for one in sources if names is None or one.id in names}
        found = {name: nearest(read_mask(mask, Policy()), grid) != 0 for name, mask in files.items()}
    if not found:
        wanted = f"masks of {volume_id}" + (f" ({', '.join(names)})" if names else "")
        raise UsageError(f"expected {wanted} in {masks.out.url}, found none; leave its folder out")
    return found


def _spread(fill: Any, region_zyx: np.ndarray) -> np.ndarray:
    """Return an array of the region's shape that holds the values of `fill`, one for each of its voxels."""
    spread = np.zeros(region_zyx.shape, np.int16)
    spread[region_zyx] = fill
    return spread


def summarise(
    questions: Mapping[str, Row],
    base: Mapping[str, Sequence[Prediction]],
    edited: Mapping[str, Mapping[str, Sequence[Prediction]]],
    patients: Patients,
) -> Counterfactuals:
    """Return what the edits moved, of predictions by name (`base`), and by name and edit (`edited`)."""
    moved, more, responses = list[Moved](), list[MovedMore](), dict[str, dict[str, dict[str, str]]]()
    for name, by_edit in edited.items():
        before = {one.id: one for one in base[name] if one.id in questions and not one.error}
        by_id = responses.setdefault(name, {})
        pairs: dict[str, dict[str, tuple[Case, Case]]] = {}
        for edit, predictions in by_edit.items():
            after = {one.id: one for one in predictions if one.id in before and not one.error}
            pairs[edit] = {id: _pair(questions[id], before[id], after[id], edit) for id in sorted(after)}
            for id, one in after.items():
                by_id.setdefault(id, {})[edit] = one.response
            moved += _moved(name, edit, [*pairs[edit].values()], patients)
        for first, second in (("erase=asked", "erase=other"), ("erase=kept", "erase=dropped")):
            if both := [id for id in pairs.get(first, {}) if id in pairs.get(second, {})]:
                changes = [
                    float(says(pairs[first][id][0]) != says(pairs[first][id][1]))
                    - float(says(pairs[second][id][0]) != says(pairs[second][id][1]))
                    for id in both
                ]
                cases = [pairs[first][id][0] for id in both]
                more.append(MovedMore(name, first, second, len(both), _mean(changes, cases, patients)))
    return Counterfactuals(tuple(moved), tuple(more), responses)


def says(case: Case) -> str:
    """Return what an answer is compared by: what is read from the response, else its text, case left out."""
    return " ".join((what_is_read(case) or case.response).casefold().split())


def _pair(row: Row, before: Prediction, after: Prediction, edit: str) -> tuple[Case, Case]:
    asked = _about_the_other_side(row) if edit == FLIP else row
    return case_of(row, before), case_of(asked, after)


def _moved(name: str, edit: str, pairs: Sequence[tuple[Case, Case]], patients: Patients) -> Iterator[Moved]:
    groups = {"all": pairs}
    if edit == FLIP:
        with_side = [pair for pair in pairs if SIDES.search(pair[0].answer)]
        groups = {"a side": with_side, "no side": [pair for pair in pairs if not SIDES.search(pair[0].answer)]}
    for group, found in groups.items():
        if not found:
            continue
        cases, is_mirrored = [before for before, _ in found], edit == FLIP

        def share(values: Iterator[bool], cases: Sequence[Case] = cases) -> Estimate:
            return _mean([float(value) for value in values], cases, patients)

        def answer_of(case: Case, is_mirrored: bool = is_mirrored) -> str:
            answer = says(replace(case, response=case.answer))
            return mirrored(answer) if is_mirrored else answer

        yield Moved(
            predictions=name,
            edit=edit,
            questions_of=group,
            questions=len(found),
            patients=len({case.patient for case in cases}),
            moved=share(says(before) != says(after) for before, after in found),
            expected=share(mirrored(says(before)) == says(after) for before, after in found) if is_mirrored else None,
            right_before=share(says(before) == answer_of(before, False) for before, _ in found),
            right_after=share(says(after) == answer_of(before) for before, after in found),
        )


def _mean(values: Sequence[float], cases: Sequence[Case], patients: Patients) -> Estimate:
    (mean_W,) = patients.means([(value,) for value in values], [case.patient for case in cases])
    return estimate_of(mean_W)
