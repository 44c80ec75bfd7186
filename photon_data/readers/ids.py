"""Names for volumes, made from where their files lie: safe in file systems and URLs, one per scan, the same in every run."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from photon_data.errors import UsageError

ID_FROM = ("path", "name", "hash")
MAX_LENGTH = 150
# Digits of the path's hash that tell names apart: none where the name is free, more while two are still the same.
DIGITS = (0, 6, 16, 64)


class Named(NamedTuple):
    """What a scan's id is made from: its path relative to the source, and the words of that path without the scan's suffix."""

    path: str
    words: tuple[str, ...]


def assign_ids(scans: Sequence[Named], id_from: str) -> list[str]:
    """Return an id for each scan, no two alike even where case does not count; UsageError for an unknown `id_from`.

    path: a/b/x.nii.gz -> "a__b__x"      name: -> "x"      hash: -> "v" + 12 digits of the path's sha256, which names nobody

    What is not A-Z a-z 0-9 . _ - becomes "-". Where that changed a name, cut it to 150 characters, or where two scans would
    share it, 6 digits of the hash of its path (with suffix) are appended.
    """
    if id_from not in ID_FROM:
        raise UsageError(f"ids from path, name or hash wanted, got {id_from!r}")
    if id_from == "hash":
        return [f"v{_digest(scan.path)[:12]}" for scan in scans]
    words = [scan.words if id_from == "path" else scan.words[-1:] for scan in scans]
    plain = ["__".join(w) for w in words]
    levels = [0 if name == _safe(name) else 1 for name in plain]
    while True:
        ids = [_name(_safe(name), scan.path, DIGITS[level]) for name, scan, level in zip(plain, scans, levels, strict=True)]
        count = Counter(name.casefold() for name in ids)
        shared = [count[name.casefold()] > 1 for name in ids]
        if not any(shared):
            return ids
        levels = [level + clash for level, clash in zip(levels, shared, strict=True)]


def _safe(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "-", name).lstrip(".-")[: MAX_LENGTH - 1 - DIGITS[1]] or "v"


def _name(safe: str, path: str, digits: int) -> str:
    return f"{safe[: MAX_LENGTH - 1 - digits]}-{_digest(path)[:digits]}" if digits else safe


def _digest(path: str) -> str:
    return hashlib.sha256(path.encode("utf-8", "surrogateescape")).hexdigest()
