"""One JSON list of objects, read piece by piece: CT-RATE's questions are one list of 1.2 GB."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from photon_data.errors import UsageError

PIECE = 1 << 20
_BETWEEN = re.compile(r"[\s,]*")


def stream_json_list(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a file that is one JSON list; UsageError for another content, or a file that ends early."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            yield from _objects(file, path)
    except OSError as error:
        raise UsageError(f"{path}: a readable file wanted, got: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path}: UTF-8 wanted; download the file again") from None


def _objects(file: TextIO, path: Path) -> Iterator[dict[str, Any]]:
    decode = json.JSONDecoder().raw_decode
    text = file.read(PIECE).lstrip()
    if not text.startswith("["):
        raise UsageError(f"{path}: one JSON list wanted, got {text[:40]!r}")
    at, count = 1, 1
    while True:
        at = _skip(text, at)
        if text.startswith("]", at):
            return
        try:
            item, at = decode(text, at)
        except json.JSONDecodeError as error:
            more = file.read(max(PIECE, len(text) - at))
            if not more:
                raise UsageError(
                    f"{path}, item {count}: JSON wanted, got: {error.msg}; the file is cut off or damaged, download it again"
                ) from None
            text, at = text[at:] + more, 0
            continue
        if not isinstance(item, dict):
            raise UsageError(f"{path}, item {count}: one JSON object wanted, got {str(item)[:60]!r}")
        yield item
        count += 1


def _skip(text: str, at: int) -> int:
    match = _BETWEEN.match(text, at)
    assert match
    return match.end()
