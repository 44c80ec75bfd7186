"""The volumes that may be asked about: those of a prepared folder, and uploads, which live in a private folder."""

from __future__ import annotations

import contextlib
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from photon_data.errors import Refused, UsageError, refusal
from photon_data.files import Location
from photon_data.lock import exclusive
from photon_data.recipe import Policy, Recipe
from photon_data.records import PREPARED, SUFFIX, records_of, store_name
from photon_data.store import read_metadata, voxels_sha256
from photon_data.volume import Geometry

PREFIX = "vol_"  # of the ids of uploads, which are drawn at random
FOLDER = "photon-serve-"
SETTLED_S = 60  # a new folder is not locked at once
DEATHS = {
    "timeout": "expected a scan that can be prepared in time, found one that takes longer; is it damaged?",
    "killed": "expected a scan that fits into the memory for one, found a larger one (see --memory)",
    "crashed": "expected a scan that can be read, found one that crashes its reader; export it again",
}


class UnknownVolume(LookupError):
    """There is no volume of an id."""


class Stored(NamedTuple):
    """A volume that may be asked about."""

    id: str
    place: str  # of its store; never shown
    content: str  # a digest of its voxels and recipe: equal for the same volume under any name
    facts: dict[str, Any]
    uploaded: bool

    @property
    def native(self) -> Geometry:
        """The grid of the scan as it came."""
        return Geometry.from_json(self.facts["geometry"])


class Limits(NamedTuple):
    """How much an upload may have; what is unpacked from it counts anew."""

    bytes: int
    files: int
    seconds: float


@dataclass(frozen=True)
class Intake:
    """How uploads become volumes. `ask` runs a job in the isolated process (`take_in` of intake.py)."""

    ask: Callable[[dict[str, Any], float], dict[str, Any]]
    recipe: Recipe
    policy: Policy
    limits: Limits


class Volumes:
    """Volumes by id: a path or a URL is never one."""

    def __init__(self, private: Path, intake: Intake, max_volumes: int, prepared: Location | None = None) -> None:
        self.private, self.intake, self.max_volumes = private, intake, max_volumes
        self._lock = threading.Lock()
        kept = sorted((private / "volumes").glob(f"{PREFIX}*{SUFFIX}"))
        self._uploads = {path.name.removesuffix(SUFFIX): str(path) for path in kept}
        self._reserved = 0
        self._prepared: dict[str, str] = {}
        if prepared is not None:
            records = [record for record in records_of(prepared) if record.is_there and record.store]
            self._prepared = {record.id: prepared.at(str(record.store)) for record in records}
        (private / "incoming").mkdir(exist_ok=True)

    def find(self, id: str) -> Stored:
        """Return the volume of an id; UnknownVolume. What is on disk now counts: a store may have been made again."""
        with self._lock:
            place, uploaded = self._uploads.get(id), id in self._uploads
        place = place or self._prepared.get(id)
        metadata = read_metadata(Location(place), "") if place else None
        voxels = metadata and voxels_sha256(metadata, "model")
        if not (place and metadata and voxels):
            raise UnknownVolume("expected the id of a volume that is there, found none; /v1/volumes lists them")
        return Stored(id, place, f"{voxels} {metadata['digest']}", metadata["facts"], uploaded)

    def ids(self) -> list[str]:
        """Return the ids of all volumes, uploads first, newest last among them."""
        with self._lock:
            return [*self._uploads, *self._prepared]

    def __len__(self) -> int:
        return len(self._uploads) + len(self._prepared)

    @contextlib.contextmanager
    def incoming(self) -> Iterator[Path]:
        """Yield a new folder for the files of an upload; it is removed with all that is in it. Refused where full."""
        with self._lock:
            if len(self._uploads) + self._reserved >= self.max_volumes:
                found = f"{self.max_volumes} already"
                raise refusal("full", "", f"at most {self.max_volumes} uploaded volumes", found, "delete one of them")
            self._reserved += 1
        folder = Path(tempfile.mkdtemp(dir=self.private / "incoming"))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            with self._lock:
                self._reserved -= 1

    def take_in(self, folder: Path, series: str = "") -> Stored:
        """Return the volume that the files in the folder are, its store made; Refused, with the words of prepare.

        One at a time: there is one process for them.
        """
        id = f"{PREFIX}{secrets.token_hex(12)}"
        job = {
            "folder": str(folder),
            "out": str(self.private),
            "id": id,
            "series": series,
            "recipe": self.intake.recipe.to_json(),
            "policy": asdict(self.intake.policy),
            "limits": list(self.intake.limits),
        }
        try:
            record = self.intake.ask(job, self.intake.limits.seconds)
        finally:  # what a process that died was writing; a finished store has another name
            for left in (self.private / "volumes").glob(f".{id}*"):
                shutil.rmtree(left, ignore_errors=True)
        if record["state"] != PREPARED:
            code = str(record.get("code"))
            raise Refused(code, DEATHS.get(code) or str(record.get("reason")))
        with self._lock:
            self._uploads[id] = str(self.private / store_name(id))
        return self.find(id)

    def delete(self, id: str) -> Stored:
        """Remove an upload and its store, and return what it was; UnknownVolume. Refused for a prepared one."""
        found = self.find(id)
        if not found.uploaded:
            raise refusal(
                "not-yours", "", "an uploaded volume", "one of a prepared folder", "photon-data prune does it"
            )
        with self._lock:
            self._uploads.pop(id, None)
        shutil.rmtree(found.place, ignore_errors=True)
        return found


@contextlib.contextmanager
def private_folder(keep: Path | None) -> Iterator[Path]:
    """Yield the folder of uploads, readable for its owner only: `keep`, or a temporary one that goes at the end.

    What a killed server left behind is removed. UsageError where another server has the folder.
    """
    if keep is not None:
        keep.mkdir(mode=0o700, parents=True, exist_ok=True)
        with exclusive(Location(str(keep))):
            shutil.rmtree(keep / "incoming", ignore_errors=True)
            yield keep
        return
    for left in Path(tempfile.gettempdir()).glob(f"{FOLDER}*"):
        with contextlib.suppress(OSError, UsageError):
            if left.owner() == Path.home().owner() and time.time() - left.stat().st_mtime > SETTLED_S:
                with exclusive(Location(str(left))):
                    shutil.rmtree(left)
    folder = Path(tempfile.mkdtemp(prefix=FOLDER))  # mode 0700
    try:
        with exclusive(Location(str(folder))):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
