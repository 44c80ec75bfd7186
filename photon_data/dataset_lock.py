"""dataset.lock: the proof that two prepared folders are the same, without a name or a voxel."""

from __future__ import annotations

import hmac
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from photon_data.errors import UsageError
from photon_data.files import LazyRows, Location
from photon_data.json_text import from_json
from photon_data.recipe import ALGORITHM, Recipe
from photon_data.records import LOCK, VolumeRecord


def lock_of(
    records: Iterable[VolumeRecord],
    questions: Mapping[str, str],
    recipe: Recipe,
    grids: str,
    versions: Mapping[str, str],
    salt: str,
) -> dict[str, Any]:
    """Return what dataset.lock holds: all that tells whether another folder has the same bytes, without a name.

    Ids, contents, settings and data sets are hashed with the salt. `questions` are {name: SHA-256 of its questions}.
    """

    def volume(record: VolumeRecord) -> dict[str, Any]:
        return {
            "id": _keyed(salt, record.id),
            "content": _keyed(salt, str(record.fingerprint)),
            "settings": _keyed(salt, str(record.key)),
            "arrays": record.arrays_sha256 or record.store_sha256,
        }

    there = sorted((record for record in records if record.is_there), key=lambda record: _keyed(salt, record.id))
    return {
        "format": 1,
        "salt": salt,
        "algorithm": ALGORITHM,
        "recipe": recipe.to_json(),
        "grids": grids,
        "versions": dict(versions),
        "questions": {_keyed(salt, name): _keyed(salt, digest) for name, digest in sorted(questions.items())},
        "volumes": LazyRows(there, volume),
    }


def lock_lines(lock: Mapping[str, Any]) -> Iterator[bytes]:
    """Yield the JSON of a lock, a volume a line."""
    head = json.dumps({**lock, "volumes": []}, indent=1)
    yield head.removesuffix("]\n}").encode()
    for number, volume in enumerate(lock["volumes"]):
        yield f"{',' if number else ''}\n  {json.dumps(volume)}".encode()
    yield b"\n ]\n}\n"


def salt_of(out: Location) -> str | None:
    """Return the salt of the lock of a folder, None where there is none: of many volumes the file is long."""
    found = re.search(rb'^ "salt": "([0-9a-f]{32})",$', out.read(LOCK, 1000) or b"", re.MULTILINE)
    return None if found is None else found[1].decode()


def _keyed(salt: str, text: str) -> str:
    return hmac.digest(salt.encode(), text.encode(), "sha256").hex()[:32]


def read_lock(path: Path) -> dict[str, Any]:
    """Return a dataset.lock that this version can follow; UsageError for another file or another algorithm."""
    expected = UsageError(f"--lock: expected a dataset.lock, found something else in {path}")
    try:
        lock = from_json(path.read_bytes())
        algorithm, versions = lock["algorithm"], dict(lock["versions"])
    except OSError as error:
        raise UsageError(f"--lock: expected a readable file, found {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise expected from None
    if algorithm != ALGORITHM:
        remedy = f"install photon-ct {versions.get('photon-ct')}"
        raise UsageError(f"--lock: expected algorithm {ALGORITHM}, found {algorithm} in {path}; {remedy}")
    try:
        Recipe.from_json(lock["recipe"])
        texts = [lock["salt"], lock.get("grids", ""), *dict(lock["questions"]).values(), *versions.values()]
        texts += [volume[name] for volume in lock["volumes"] for name in ("id", "content", "settings", "arrays")]
        if not all(isinstance(text, str) for text in texts):
            raise expected
    except (KeyError, TypeError, ValueError, AttributeError):
        raise expected from None
    return lock


def differences(lock: Mapping[str, Any], own: Mapping[str, Any], records: Iterable[VolumeRecord]) -> Iterator[str]:
    """Yield how a folder differs from a lock, a sentence each. `own` is the folder's lock with the same salt.

    A volume is known by its id, or else by its content: ids of DICOM depend on a key of their folder.
    """
    left = {volume["id"]: volume for volume in lock["volumes"]}
    names = {_keyed(own["salt"], record.id): record.id for record in records}
    strangers = []
    for volume in sorted(own["volumes"], key=lambda volume: names[volume["id"]]):
        if other := left.pop(volume["id"], None):
            yield from _difference(names[volume["id"]], volume, other, lock, own)
        else:
            strangers.append(volume)
    by_content = {volume["content"]: volume["id"] for volume in left.values()}
    for volume in strangers:
        if other := left.pop(by_content.get(volume["content"], ""), None):
            yield from _difference(names[volume["id"]], volume, other, lock, own)
        else:
            yield f"{names[volume['id']]}: not in the lock"
    if left:
        yield f"{len(left)} volumes of the lock are not here: their scans are missing or refused"
    if lock["questions"] != own["questions"]:
        yield "the questions are not those of the lock"


def _difference(
    name: str, volume: Mapping[str, str], other: Mapping[str, str], lock: Mapping[str, Any], own: Mapping[str, Any]
) -> Iterator[str]:
    if other["content"] != volume["content"]:
        yield f"{name}: its source has another content than the lock's"
    elif other["settings"] != volume["settings"]:
        yield f"{name}: made with other settings (recipe, rescaling, policy, overrides, grids) from the same content"
    elif other["arrays"] != volume["arrays"]:
        versions = {key: (lock["versions"].get(key), value) for key, value in own["versions"].items()}
        changed = ", ".join(f"{key} {a} there, {b} here" for key, (a, b) in versions.items() if a != b)
        yield f"{name}: other bytes from the same content and settings ({changed or 'the same versions'})"
