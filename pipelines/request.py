"""What `photon-data prepare` is requested to do, and what a look at the sources makes of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from photon_data.datasets.base import DataSet
from photon_data.files import Location
from photon_data.prepare_file import Job
from photon_data.questions.manifest import Unmatched
from photon_data.questions.question import Question
from photon_data.questions.rescale_table import HEADER
from photon_data.questions.splits import FRACTIONS
from photon_data.recipe import Policy, Recipe


@dataclass(frozen=True)
class Request:
    """A request about a folder of scans with tables about it, or about the data sets of a data_manifest.yaml.

    Every data set has its own recipe name, policy, questions and splits; the fields from `hu_source` are a folder's.
    """

    source: Path  # a folder of scans, one scan, or the data_manifest.yaml
    out: Location
    recipe: Recipe
    policy: Policy = field(default_factory=Policy)  # for data sets, only its max_voxels counts
    datasets: tuple[DataSet, ...] = ()  # none for a folder of scans
    prompt: str | None = None  # style of the questions; None for the manifest's own, or for questions as they are
    seed: int = 0
    allow_leaks: bool = False
    limit: int | None = None  # only so many scans
    overwrite: bool = False
    retry_failed: bool = False  # read again what was refused, timed out or crashed before
    lock: Mapping[str, Any] | None = None  # a dataset.lock whose bytes are to be made again
    pictures: int = 48  # volumes shown as pictures in the report
    paths: str | None = None  # of stores in manifests, "absolute" or "relative" to OUT; None: as OUT has them

    hu_source: str = HEADER  # "header", "stored", or the path of a table: see `rescaling`
    questions: Path | None = None  # a table of questions; None for one row per volume
    columns: Mapping[str, str] = field(default_factory=dict)  # {our name: name in the tables}
    # Share of each split, where the table of questions has no splits.
    fractions: Mapping[str, float] = field(default_factory=lambda: FRACTIONS)
    # What volume ids are made from: "path", "name", "hash" or "key"; "auto" is "key" for DICOM and "path" for others.
    id_from: str = "auto"
    id_prefix: str = ""  # what the ids of this source and the name of its questions begin with
    include: Sequence[str] = ()  # globs of what is looked at, and of what is not; see `find_scans`
    exclude: Sequence[str] = ()
    follow_links: bool = True

    @property
    def is_partial(self) -> bool:
        """Whether only a part of the source is looked at."""
        return bool(self.limit is not None or self.include or self.exclude or self.datasets)


class Gathered(NamedTuple):
    """What is to be prepared and asked."""

    jobs: list[Job]
    questions: dict[str, list[Question]]  # by data set, with splits; empty for one row per volume
    unmatched: Sequence[Unmatched] = ()  # questions whose volume is known not to exist
    ignored: Mapping[str, int] = {}  # {suffix: number} of files that are no scans
    notes: Sequence[str] = ()  # sentences for the person who reads along
    key: str | None = None  # that ids and patients were made with
