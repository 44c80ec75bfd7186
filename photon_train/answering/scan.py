"""What a person points at (a store, a raw scan) -> what the model reads and where it lies. Nothing is written.

One scan and some questions -> answers, on one encoding.

Masks on disk -> how many of their voxels lie in each token, once for every volume that is asked about.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from photon_data.errors import UsageError
from photon_data.files import Location
from photon_data.prepare_file import Job, opened
from photon_data.prepare_volume import prepare_volume
from photon_data.readers import find_scans, left_alone
from photon_data.recipe import Policy, Recipe
from photon_data.store import ROOT, open_volume, read_metadata
from photon_data.volume import Geometry, Volume
from photon_train.answering.predictor import Asker, Reply, group_rows, with_seconds
from photon_train.kept_tokens import CountedMask, counted_masks, token_cells
from photon_train.rows import TAG


class ScanInput(NamedTuple):
    """One scan, ready to be asked about.

    model    int16 HU on the model grid, in memory: the bytes of a store's "model" array
    volume   int16 HU on the prepared grid; of a store, read lazily
    native   the grid of the raw scan
    seconds  {"read", "prepare"}
    """

    id: str
    model: Volume
    volume: Volume
    native: Geometry
    seconds: dict[str, float]


def open_input(place: str, recipe: Recipe, policy: Policy | None = None) -> ScanInput:
    """Return the scan at `place`: a store (path or URL), a NIfTI, NRRD or MetaImage file, or a folder with one DICOM series.

    A raw scan is prepared in memory by `recipe`, as `photon-data prepare` would; a store is as it was prepared.
    UsageError where there is not one scan; Refused for one that must not become a store, with the words of `prepare`.
    """
    return _from_store(place) if _is_store(place) else _from_raw(Path(place), recipe, policy or Policy())


def prepared_grid(place: str) -> Geometry:
    """Return the prepared grid of the scan at `place`: of a store, without reading a voxel. Raises what open_input does."""
    return open_volume(place).geometry if _is_store(place) else open_input(place, Recipe()).volume.geometry


def _is_store(place: str) -> bool:
    return "://" in place or (Path(place) / ROOT).exists()


def _from_store(place: str) -> ScanInput:
    start = time.perf_counter()
    lazy = open_volume(place, grid="model")
    metadata = read_metadata(Location(place), "")
    assert metadata is not None, "open_volume has read it"
    model = Volume(lazy.numpy(), lazy.geometry)
    seconds = {"read": time.perf_counter() - start, "prepare": 0.0}
    native = Geometry.from_json(metadata["facts"]["geometry"])
    return ScanInput(metadata["id"], model, open_volume(place), native, seconds)


def _from_raw(path: Path, recipe: Recipe, policy: Policy) -> ScanInput:
    start = time.perf_counter()
    sources, ignored = find_scans(path)
    if len(sources) != 1:
        others = f"; files left alone: {left_alone(ignored)}" if ignored else ""
        names = "".join(f"\n  {source.path}" for source in sources[:10])
        raise UsageError(f"one scan wanted, got {len(sources)} in {path}; name one{others}{names}")
    scan = opened(Job(sources[0], out="", recipe=recipe, policy=policy, write=False))
    watch = _Stopwatch(time.perf_counter() - start)
    prepared = prepare_volume(replace(scan, planes=watch.around(scan.planes)), recipe, policy)
    seconds = {"read": watch.seconds, "prepare": time.perf_counter() - start - watch.seconds}
    return ScanInput(sources[0].id, prepared.model, prepared.volume, scan.geometry, seconds)


class _Stopwatch:
    """Adds up the time that a stream of planes takes itself, which is reading, while its reader resamples."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def around(self, planes: Callable[[], Iterator[np.ndarray]]) -> Callable[[], Iterator[np.ndarray]]:
        """Return a `planes` that gives the same, timed."""

        def timed() -> Iterator[np.ndarray]:
            stream, done = planes(), object()
            while True:
                start = time.perf_counter()
                plane = next(stream, done)
                self.seconds += time.perf_counter() - start
                if plane is done:
                    return
                yield plane  # type: ignore[misc]

        return timed


class Asked(NamedTuple):
    """Replies in the order of the questions, and the seconds of all together: read, prepare, encode, answer."""

    replies: list[Reply]
    seconds: dict[str, float]


def ask_scan(asker: Asker, scan: ScanInput, questions: Sequence[str], streamer: Any = None) -> Asked:
    """Return the answers to questions about a scan, which is encoded once; their ids are q1, q2, ...

    With a `streamer` (of transformers) they are answered one by one, and it is given their tokens.
    UsageError for a question that is empty or holds special tokens, and for a scan on another grid than the model reads.
    """
    rows = [
        {
            "id": f"q{number}",
            "volume_id": scan.id,
            "videos": [scan.model],
            "messages": [{"role": "user", "content": TAG + question}],
        }
        for number, question in enumerate(questions, start=1)
    ]
    groups, problems = group_rows(rows, asker.processor)
    if problems:
        raise UsageError(next(iter(problems.values())))
    (group,) = groups
    try:
        encoded = asker.encode(group)
    except ValueError as error:
        raise UsageError(str(error)) from None
    shared = {"read": scan.seconds["read"], "prepare": scan.seconds["prepare"] + encoded.seconds["read"]}
    shared["encode"] = encoded.seconds["encode"]
    most = asker.settings.questions_per_batch if streamer is None else 1
    each = {name: seconds / len(questions) for name, seconds in shared.items()}
    found = [with_seconds(r, each) for batch in group.batches(most) for r in asker.answer(encoded, batch, streamer)]
    by_id = {reply.prediction.id: reply for reply in found}
    replies = [by_id[str(row["id"])] for row in rows]
    total: Counter[str] = Counter()
    for reply in replies:
        total.update(reply.prediction.seconds)
    return Asked(replies, dict(total))


class VolumeMasks(NamedTuple):
    """Masks by volume id, and why those of a volume could not be read."""

    masks: dict[str, list[CountedMask]]
    unread: dict[str, str]


def volumes_with_masks(folder: Path, rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return where each volume is that has a folder of masks, by id; rows of several volumes or none are left out.

    UsageError where there is no such volume.
    """
    places = {row["volume_id"]: str(row["videos"][0]) for row in rows if len(row["videos"]) == 1}
    found = {id: place for id, place in sorted(places.items()) if id and (folder / id).is_dir()}
    if not found:
        raise UsageError(f"--masks: a folder named by volume id for some of {len(places)} volumes wanted, found none in {folder}")
    return found


def counted_by_volume(
    folder: Path,
    places: Mapping[str, str],
    tokens_zyx: tuple[int, int, int],
    each: Callable[[], object] = lambda: None,
    names: Container[str] | None = None,
) -> VolumeMasks:
    """Return the masks of each volume on its tokens (`names`: only those); one that cannot be read costs itself.

    `each` is called after each.
    """
    found = VolumeMasks({}, {})
    for id, place in places.items():
        try:
            cells = token_cells(prepared_grid(place), tokens_zyx)
            found.masks[id] = counted_masks(folder / id, cells, names)
        except (ValueError, OSError) as error:
            found.unread[id] = str(error)
        each()
    return found
