"""DICOM files -> series -> stacks of images that form one volume each, from their headers alone.

One series may hold several stacks: images that differ in size or orientation, multi-frame files, passes and phases. It
may lie in several folders. A stack is never cut: where nothing tells volumes apart it stays whole, and opening it says
what is wrong.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from itertools import combinations, pairwise
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from photon_data.readers.dicom_file import SAME_POSITION_MM, SPLIT_TAGS, PlaneHeader, along_normal

# How far a slice may lie from its place on the regular grid, as a part of the slice distance: a tenth.
# Up to a quarter where this is what positions rounded to 0.1 mm make of thin slices.
# A missing slice puts others off by half a distance or more.
OFF_GRID, OFF_GRID_ROUNDED, ROUNDING_MM = 0.1, 0.25, 0.1
# Stacks of one direction within this may be one that its header tears apart; others are views of their own.
NEAR_DIRECTION = 0.1
SAME_SPACING = 1e-3  # largest relative difference of pixel spacings within one stack
TORN_DIRECTION, EXACT_DIRECTION = 0.01, 1e-3
FEW = 4  # slices: fewer are regular by chance
MANY = 30  # parts, more than which are not compared each with each
KEY_DIGITS = 8
NO_UID = hashlib.sha256(b"").hexdigest()[:16]
COPIES, SCOUT = "(copy of a DICOM slice)", "(DICOM scout, no CT volume)"


class Stack(NamedTuple):
    """The images of one volume."""

    key: str  # unique in the folder that holds the files
    files: list[Path]
    patient: str  # its hash, "" where the header has none


class Series(NamedTuple):
    """The images of one SeriesInstanceUID."""

    uid: str  # its hash
    files: list[Path]  # all of them, sorted
    stacks: list[Stack]
    aside: Counter[str]  # files that belong to no stack, by "(kind)"


def common_folder(files: Sequence[Path]) -> Path:
    """Return the folder that holds all files, directly or below it."""
    return Path(os.path.commonpath([file.parent for file in files]))


def series_of(planes: list[PlaneHeader]) -> Series:
    """Return the series that planes (the first of each file, sorted by path) are.

    The key of a stack is the start of a hash of the SeriesInstanceUID. The largest stack of a series in a folder (among
    equals the one with the first file name) has the bare key; the others follow as key-2, key-3, ... Scouts (stacks
    that are LOCALIZER by their ImageType, every image of them) and copies of a slice are left aside.
    """
    uid = planes[0].series
    kept, stacks, aside = _without_copies(planes), [], Counter[str]()
    aside[COPIES] = len(planes) - len(kept)
    volumes = [part for own in _patients(kept) for stack in _stacks(own) for part in _volumes(stack)]
    numbers: Counter[Path] = Counter()
    for stack in sorted(volumes, key=lambda part: -len(part)):
        files, key = [plane.path for plane in stack], uid[:KEY_DIGITS]
        folder = common_folder(files)
        numbers[folder] += 1
        if all(plane.localizer for plane in stack):
            aside[SCOUT] += len(stack)
        else:
            key = key if numbers[folder] == 1 else f"{key}-{numbers[folder]}"
            stacks.append(Stack(key, files, stack[0].patient))
    return Series(uid, [plane.path for plane in planes], stacks, +aside)


def _split(planes: Sequence[PlaneHeader], name_of: Callable[[PlaneHeader], object]) -> list[list[PlaneHeader]]:
    """Return planes with equal names together, in order of the first of each."""
    parts: dict[object, list[PlaneHeader]] = {}
    for plane in planes:
        parts.setdefault(name_of(plane), []).append(plane)
    return list(parts.values())


def _folder(plane: PlaneHeader) -> Path:
    return plane.path.parent


def _patients(planes: Sequence[PlaneHeader]) -> list[list[PlaneHeader]]:
    """Split planes by study and patient where they lie in several folders: some archives give one UID to all."""
    folders = _split(planes, _folder)
    if len(folders) == 1:
        return folders
    studies = {_folder(part[0]): frozenset(plane.study for plane in part) for part in folders}
    return _split(planes, lambda plane: studies[_folder(plane)])


# --- copies


def _without_copies(planes: list[PlaneHeader]) -> list[PlaneHeader]:
    """Return planes without the second one of two that are the same slice, told by place, tags and stored pixels.

    Where folders hold exactly the same slices, each keeps its own: they are two copies of a scan, and both are listed.
    """
    folders: dict[Path, set[object]] = {}
    for plane in planes:
        folders.setdefault(plane.path.parent, set()).add(_identity(plane))
    dropped: set[Path] = set()
    for alike in _split(planes, _identity):
        kept: list[PlaneHeader] = []
        # What is not compressed is kept, of the folder that holds more.
        order = [(p.pixels.are_frames_compressed, -len(folders[p.path.parent]), str(p.path)) for p in alike]
        for _, plane in sorted(zip(order, alike, strict=True), key=lambda pair: pair[0]):
            others = [
                other
                for other in kept
                if other.path.parent == plane.path.parent or folders[other.path.parent] != folders[plane.path.parent]
            ]
            if plane.position_lps is not None and any(_is_copy(plane, other) for other in others):
                dropped.add(plane.path)
            else:
                kept.append(plane)
    return [plane for plane in planes if plane.path not in dropped]


def _identity(plane: PlaneHeader) -> object:
    """Return what copies of a slice share beside their pixels."""
    place = [None if v is None else v.tobytes() for v in (plane.position_lps, plane.orientation, plane.spacing_mm)]
    return (plane.study, plane.frames, plane.rows, plane.columns, *place, plane.slope, plane.intercept, plane.tags)


def _is_copy(plane: PlaneHeader, other: PlaneHeader) -> bool:
    """Tell whether two planes at one place are one image: the same pixels, or its own UID in another compression."""
    if plane.pixels.transfer_syntax != other.pixels.transfer_syntax:
        return plane.instance == other.instance
    return _pixels(plane) == _pixels(other)


def _pixels(plane: PlaneHeader) -> bytes:
    """Return a hash of the stored pixels of a file; of the whole file where they cannot be told from its header."""
    try:
        with plane.path.open("rb") as file:
            file.seek(plane.pixels.at or 0)
            length = min(plane.pixels.length, plane.pixels.present) if plane.pixels.at else -1
            return hashlib.sha256(file.read(length)).digest()
    except OSError:
        return os.urandom(16)  # like no other; opening it says what is wrong


# --- stacks


def _stacks(planes: Sequence[PlaneHeader]) -> list[list[PlaneHeader]]:
    """Split planes by size, orientation and container: [axial axial scout axial] -> [axial axial axial] [scout].

    What lies on one line at one distance is one stack all the same: its images are then refused together, instead of
    becoming two halves of a body.
    """
    stacks = _alike(planes, TORN_DIRECTION)
    halves = [stack for stack in stacks if not stack[0].container and not all(plane.localizer for plane in stack)]
    if len(halves) < 2:
        return stacks
    whole, *others = sorted(halves, key=lambda stack: -len(stack))
    others = [other for other in others if whole[0].is_parallel_to(other[0], NEAR_DIRECTION)]
    joined = [plane for other in others for plane in other]
    if not _is_regular([*whole, *joined]):
        joined = []
        for other in others:
            joined += other if _is_regular([*whole, *joined, *other]) else []
    taken = {plane.path for plane in (*whole, *joined)}
    rest = [stack for stack in stacks if stack[0].path not in taken]
    return [[plane for plane in planes if plane.path in taken], *rest] if joined else stacks


def _alike(planes: Sequence[PlaneHeader], within: float) -> list[list[PlaneHeader]]:
    """Return planes of one size, container and orientation together, in order of the first of each."""
    parts: list[list[PlaneHeader]] = []
    kind = attrgetter("rows", "columns", "container")
    for plane in planes:
        same = (p for p in parts if kind(plane) == kind(p[0]) and plane.is_parallel_to(p[0], within))
        if (part := next(same, None)) is None:
            parts.append(part := [])
        part.append(plane)
    return parts


# --- volumes of one stack


def _volumes(planes: list[PlaneHeader]) -> list[list[PlaneHeader]]:
    """Split a stack that holds several volumes: passes, phases, reconstructions, or folders that are scans each.

    It does where positions are taken twice or lie closer than usual, where regular parts lie among one another, and
    where folders or tilts do not fit on one grid. It is split by the tag, or the two tags, that leave no position twice
    in a part and no two parts that are halves of one, with most parts regular, then with the fewest parts. What lacks a
    slice stays whole.
    """
    folders = _split(planes, _folder)
    if planes[0].container or any(plane.position_lps is None or plane.orientation is None for plane in planes):
        return folders
    if len(planes) < 2 or _is_regular(planes):
        return [planes]
    gaps = np.diff(np.sort(along_normal(planes)))
    twice, close = (gaps < SAME_POSITION_MM).any(), (gaps < (1 - OFF_GRID_ROUNDED) * np.median(gaps)).any()
    tilts = _alike(planes, EXACT_DIRECTION)
    irregular, parts = _told_apart(planes, tilts)
    if twice and not parts and len(folders) > 1 and any(map(_is_regular, folders)) and not _are_halves(folders):
        return [part for folder in folders for part in _volumes(folder)]
    if not parts or not (twice or (irregular == 0 and min(map(len, parts)) >= FEW)):
        return [planes]
    if twice or close or _cover_the_same(parts):
        return parts
    may_be_scans = (len(folders) > 1 or len(tilts) > 1) and _are_apart(parts)
    return parts if may_be_scans and (not _on_one_grid(parts) or _is_twofold(planes, folders)) else [planes]


def _told_apart(planes: list[PlaneHeader], tilts: list[list[PlaneHeader]]) -> tuple[int, list[list[PlaneHeader]]]:
    """Return the parts that tags (or folders, or tilts) tell apart, and how many are irregular; no parts: none do."""
    names: list[Callable[[PlaneHeader], object]] = [partial(_tag, n) for n in range(len(SPLIT_TAGS))]
    tilt_of = {plane.path: number for number, part in enumerate(tilts) for plane in part}
    names += [attrgetter("study"), _folder, lambda plane: tilt_of[plane.path]]
    one, two = (map(partial(partial, _named), combinations(names, count)) for count in (1, 2))
    best: tuple[int, int, list[list[PlaneHeader]]] = (0, 0, [])
    for ways in ((_split(planes, name) for name in one), [_passes(planes)], (_split(planes, name) for name in two)):
        for parts in ways:
            if len(parts) < 2 or min(map(len, parts)) < 2 or any(map(_is_taken_twice, parts)) or _are_halves(parts):
                continue
            found = sum(not _is_regular(part) for part in parts), len(parts), parts
            if found[0] and not _cover_the_same(parts):
                continue
            best = found if not best[2] or found[:2] < best[:2] else best
        if best[2] and best[0] == 0:
            break
    return best[0], best[2]


def _passes(planes: list[PlaneHeader]) -> list[list[PlaneHeader]]:
    """Return planes in order of time, cut where a position comes again or the way turns; none if one is irregular."""
    if any(plane.acquired is None for plane in planes):
        return []
    places = np.rint(along_normal(planes) / ROUNDING_MM).astype(int).tolist()
    in_time = sorted(range(len(planes)), key=lambda number: planes[number].acquired or 0.0)
    parts: list[list[int]] = [[]]
    for number in in_time:
        way = [places[n] for n in (*parts[-1][:2], *parts[-1][-1:], number)]
        turns = len(parts[-1]) > 1 and (way[1] > way[0]) != (way[3] > way[2])
        if turns or places[number] in [places[n] for n in parts[-1]]:
            parts.append([])
        parts[-1].append(number)
    passes = [[planes[number] for number in sorted(part)] for part in parts]
    return passes if all(map(_is_regular, passes)) else []


def _tag(number: int, plane: PlaneHeader) -> str:
    return plane.tags[number]


def _is_twofold(planes: list[PlaneHeader], folders: list[list[PlaneHeader]]) -> bool:
    """Tell whether a tag tells the same parts apart as folders do: acquisitions, not a volume that lacks slices."""
    by_folder = [{plane.path for plane in part} for part in folders]
    by_tag = (_split(planes, partial(_tag, number)) for number in range(len(SPLIT_TAGS)))
    return len(folders) > 1 and any([{plane.path for plane in part} for part in parts] == by_folder for parts in by_tag)


def _named(names: Sequence[Callable[[PlaneHeader], object]], plane: PlaneHeader) -> tuple[object, ...]:
    return tuple(name(plane) for name in names)


def _is_taken_twice(planes: Sequence[PlaneHeader]) -> bool:
    return bool((np.diff(np.sort(along_normal(planes))) < SAME_POSITION_MM).any())


def _are_halves(parts: Sequence[list[PlaneHeader]]) -> bool:
    """Tell whether two of the parts are one regular stack together."""
    in_order = sorted(parts, key=lambda part: along_normal(part).min())
    # Of many, only those that begin one after the other.
    pairs = combinations(in_order, 2) if len(parts) <= MANY else pairwise(in_order)
    return any(_is_regular([*one, *other]) for one, other in pairs)


def _extents(parts: Sequence[list[PlaneHeader]]) -> list[tuple[float, float]]:
    """Return the first and the last position of each part along the normal of the first, sorted."""
    positions = (np.array([plane.position_lps for plane in part]) @ parts[0][0].normal for part in parts)
    return sorted((float(along.min()), float(along.max())) for along in positions)


def _are_apart(parts: Sequence[list[PlaneHeader]]) -> bool:
    """Tell whether each part ends before the next one begins."""
    return all(high < low for (_, high), (low, _) in pairwise(_extents(parts)))


def _cover_the_same(parts: Sequence[list[PlaneHeader]]) -> bool:
    """Tell whether all parts have more than half of the shortest's extent in common: phases, one of them incomplete."""
    extents = _extents(parts)
    common = min(high for _, high in extents) - max(low for low, _ in extents)
    return bool(common > 0.5 * min(high - low for low, high in extents))


def _on_one_grid(parts: Sequence[list[PlaneHeader]]) -> bool:
    """Tell whether regular parts have one distance and one line: slices between them are missing."""
    lines = []
    for part in parts:
        positions = _sorted_positions(part)
        step = (positions[-1] - positions[0]) / (len(positions) - 1)
        lines.append((positions[0], step))
    (start, step), *others = lines
    for place, other in others:
        length = np.linalg.norm(step)
        aside = np.linalg.norm(np.cross(place - start, step / length))
        if np.linalg.norm(other - step) > OFF_GRID * length or aside > length:
            return False
    return True


def tolerance_mm(usual: float) -> float:
    """Return how far slices may lie from their places on a regular grid, given their usual distance."""
    return max(OFF_GRID * usual, min(ROUNDING_MM, OFF_GRID_ROUNDED * usual))


def _sorted_positions(planes: Sequence[PlaneHeader]) -> np.ndarray:
    positions = np.array([plane.position_lps for plane in planes])
    return positions[np.argsort(along_normal(planes), kind="stable")]


def _is_regular(planes: Sequence[PlaneHeader]) -> bool:
    """Tell whether planes lie on one straight line at one distance, and have one pixel spacing."""
    if len(planes) < 2 or any(p.position_lps is None or p.orientation is None or p.spacing_mm is None for p in planes):
        return False
    positions, spacings = _sorted_positions(planes), np.array([plane.spacing_mm for plane in planes])
    steps = np.linalg.norm(np.diff(positions, axis=0), axis=1)
    places = np.linspace(positions[0], positions[-1], len(positions))
    off = np.linalg.norm(positions - places, axis=1).max()
    is_one_size = np.allclose(spacings, spacings[0], rtol=SAME_SPACING, atol=0)
    return bool(is_one_size and steps.min() >= SAME_POSITION_MM and off <= tolerance_mm(float(np.median(steps))))
