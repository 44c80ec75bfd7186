"""A folder of uploaded files -> the one scan in it, whose store is made; what the process of the uploads does.

All that reads a stranger's bytes is here, limited in memory and time (see child.py): archives unpacked, one scan found,
its store made.
"""

from __future__ import annotations

import stat
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from photon_data.errors import Refused, UsageError, first_few, refusal
from photon_data.files import NO_SPACE
from photon_data.prepare_file import Job, prepare_file
from photon_data.readers.find import find_scans, left_alone
from photon_data.recipe import Policy, Recipe
from photon_data.records import REFUSED, NoSpace
from photon_data.scan import SUFFIXES, Source
from photon_pipelines import child
from photon_pipelines.serving.upload import place_for, too_large, too_many
from photon_pipelines.serving.volumes import Limits

ZIP = b"PK\x03\x04"
CHUNK = 1 << 20


def take_in(job: dict[str, Any]) -> dict[str, Any]:
    """Return the record of the scan in a folder of uploaded files: {"state", "code", "reason", "store", ...}.

    `job` has folder, out, id, series ("" for the only one), recipe, policy and limits, as JSON. The folder is a
    stranger's: no name in it may turn up in the record.
    """
    folder, limits = Path(job["folder"]), Limits(*job["limits"])
    try:
        unpack_all(folder, limits)
        source = _one_scan(folder, job["series"])
    except (Refused, UsageError) as error:
        return {"state": REFUSED, "code": getattr(error, "code", "unreadable"), "reason": str(error)}
    source = replace(source, id=job["id"], patient="", hidden=True)
    recipe, policy = Recipe.from_json(job["recipe"]), Policy(**job["policy"])
    return prepare_file(Job(source, job["out"], recipe, policy)).to_json()


def unpack_all(folder: Path, limits: Limits) -> None:
    """Put the files of the zip archives among the uploaded files in their place; Refused, NoSpace.

    The limits are for all archives together. An archive in an archive is left as it is.
    """
    archives = [path for path in sorted(folder.rglob("*")) if path.is_file() and _is_zip(path)]
    for number, path in enumerate(archives, start=1):
        target = folder / f"-zip-{number}"  # no uploaded file can have such a name
        target.mkdir()
        try:
            limits = _unpack(path, target, limits)
        except OSError as error:
            if error.errno in NO_SPACE:
                raise NoSpace(error.errno, "no space left to unpack an upload") from None
            raise _damaged() from None  # what bzip2 says of damage
        except Refused:
            raise
        except Exception:  # the edge of a work item: whatever a stranger's archive does to its parser
            raise _damaged() from None
        path.unlink()


def _damaged() -> Refused:
    return refusal("damaged-zip", "", "a whole zip archive", "a damaged one", "pack it again")


def _is_zip(path: Path) -> bool:
    if path.name.lower().endswith(tuple(SUFFIXES)):  # its reader says what is wrong with it
        return False
    with path.open("rb") as file:
        return file.read(len(ZIP)) == ZIP


def _unpack(archive: Path, folder: Path, limits: Limits) -> Limits:
    """Write the regular files of a zip archive into `folder`, by the last parts of their names; return what is left.

    Bytes are counted as they are written: what the archive says of its sizes does not count. Links are left aside.
    Refused for too many; what zipfile raises for damage.
    """
    left = limits.bytes
    with zipfile.ZipFile(archive) as members:
        infos = [one for one in members.infolist() if not one.is_dir() and not stat.S_ISLNK(one.external_attr >> 16)]
        if len(infos) > limits.files:
            raise too_many(limits)
        for number, info in enumerate(infos, start=1):
            if info.flag_bits & 1:
                raise refusal("encrypted", "", "an archive without a password", "one with", "pack it again without")
            with members.open(info) as packed, place_for(folder, info.filename, number).open("xb") as file:
                while data := packed.read(CHUNK):
                    left -= len(data)
                    if left < 0:
                        raise too_large(limits)
                    file.write(data)
    return limits._replace(bytes=left, files=limits.files - len(infos))


def _one_scan(folder: Path, series: str) -> Source:
    """Return the only scan in the folder, or the DICOM series of that key; Refused."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    found = find_scans(files[0] if len(files) == 1 else folder)
    sources = [source for source in found.sources if series in ("", _key(source))]
    if len(sources) == 1:
        return sources[0]
    if not found.sources:
        others = left_alone(found.ignored)
        raise refusal("no-scan", "", "a scan (NIfTI, NRRD, MetaImage or DICOM)", f"none among {others}", "send one")
    keys = [f"{_key(source)} ({len(source.names)} files)" for source in found.sources if source.format == "dicom"]
    names = f": {first_few(keys, 20)}" if len(keys) == len(found.sources) else ""
    remedy = "say which: the field series with one of these" if names else "send one at a time"
    raise refusal("several-scans", "", "one scan", f"{len(sources)} of {len(found.sources)}{names}", remedy)


def _key(source: Source) -> str:
    return source.path.rpartition("#")[2] if source.format == "dicom" else ""


def main(address_space_bytes: int) -> None:
    """Answer the server until it ends."""
    child.main(address_space_bytes, take_in)
