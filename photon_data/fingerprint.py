"""The content of a scan's files as one short text: same bytes, same fingerprint, wherever they lie."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path


def fingerprint(files: Sequence[Path]) -> str:
    """Return "sha256:<64 hex>" of the content of the files, in their order; names and dates do not count.

    One file gives the hash that `sha256sum` prints. Several give the hash of their (size, sha256) pairs, so that bytes moved
    from the end of one file to the start of the next show. OSError for a file that cannot be read.
    """
    digests = [_digest(file) for file in files]
    if len(digests) == 1:
        return f"sha256:{digests[0][1]}"
    listing = "".join(f"{size} {digest}\n" for size, digest in digests)
    return f"sha256:{hashlib.sha256(listing.encode()).hexdigest()}"


def _digest(path: Path) -> tuple[int, str]:
    with path.open("rb", buffering=0) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return file.tell(), digest
