"""Names that stay at home: the key that makes ids of them, and the file that says which scan has which id.

They lie in a folder beside OUT, never in it, with the headers of DICOM files (readers/dicom_cache.py) and what was read
of objects (readers/object_path.py): /data/prepared has /data/prepared.private. For an object store the folder is in the
working directory.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from sys import intern

from photon_data.errors import Refused, UsageError
from photon_data.files import Location, append_row, jsonl_bytes, jsonl_rows, write_whole
from photon_data.scan import Source

KEY, NAMES, HEADERS = "key", "names.jsonl", "dicom-headers"
DIGITS = 16
WORD = re.compile(r"[^\W\d_]{3,}")
KEYED = re.compile(rf"v[0-9a-f]{{{DIGITS}}}\Z")  # the end of an id that was made with a key


def private_folder(out: Location) -> Path:
    """Return the folder of the key and of the names that belong to a prepared folder."""
    if out.is_local:
        return out.path.with_name(f"{out.path.name}.private")
    url = out.url.rstrip("/")
    digest = hashlib.sha256(url.encode()).hexdigest()[:8]  # buckets have folders of the same name
    return Path.cwd() / f"{url.rpartition('/')[2]}-{digest}.private"


def read_key(out: Location) -> str | None:
    """Return the key of a prepared folder, None where it has none; UsageError for a file that is no key."""
    path = private_folder(out) / KEY
    try:
        key = path.read_text(encoding="ascii").strip()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"expected a key that can be read, found {path}: {error}") from None
    if path.stat().st_mode & 0o077:
        path.chmod(0o600)
    if not re.fullmatch(r"[0-9a-f]{32,}", key):
        raise UsageError(f"expected a key (32 hex digits or more), found something else in {path}; bring the key back")
    return key


def keyed(key: str, text: str) -> str:
    """Return a hash of a name, the same for the same key only."""
    return hmac.new(key.encode(), text.encode("utf-8", "surrogateescape"), "sha256").hexdigest()[:DIGITS]


def keep_key(out: Location, key: str) -> str:
    """Write the key that ids were made with, for its owner only; return a sentence for them, "" if it was there.

    UsageError where another run has made one meanwhile.
    """
    if (there := read_key(out)) is None:
        path = private_folder(out) / KEY
        _write(path, f"{key}\n".encode())
        return f"a key was made, from which ids and patients are: {path}. Keep it, and keep it to yourself"
    if there != key:
        raise UsageError(f"expected the key that this run began with, found another one of {out.url}; run it again")
    return ""


def read_names(out: Location) -> dict[str, tuple[str, str]]:
    """Return {id: (root, path)} of scans whose names are hidden; UsageError for a damaged file."""
    path = private_folder(out) / NAMES
    try:
        with path.open("rb") as file:
            rows = jsonl_rows(file, may_be_cut=True)
            return {row["id"]: (intern(row["root"]), row["source"]) for row in rows}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"expected rows of id, root and source, found {path} damaged ({error}); bring it back"
        ) from None


def save_names(out: Location, names: Iterable[tuple[str, str, str]]) -> None:
    """Write the rows (id, root, path), whole, readable for their owner only."""
    rows = [dict(zip(("id", "root", "source"), row, strict=True)) for row in sorted(names)]
    _write(private_folder(out) / NAMES, jsonl_bytes(rows))


def append_name(out: Location, id: str, root: str, path: str) -> None:
    """Add a row, in the place of an earlier one of its id."""
    names = private_folder(out) / NAMES
    if not names.exists():
        save_names(out, ())
    append_row(names, {"id": id, "root": root, "source": path})


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.parent.chmod(0o700)
    with write_whole(path) as temporary:
        temporary.touch(mode=0o600)
        temporary.write_bytes(content)


def hide_names(
    sources: Sequence[Source],
    formats: Collection[str],
    out: Location,
    id_prefix: str,
    known_ids: Mapping[str, str],
    key: str | None = None,
) -> tuple[list[Source], str]:
    """Return the sources and a key; those of `formats` have ids and patients made with it.

    `known_ids` are those that scans have in OUT already, by their paths. The key is `key`, else OUT's, or a new one.
    """
    key, made = key or read_key(out) or secrets.token_hex(32), []
    for source in sources:
        if source.format in formats:
            id = known_ids.get(source.path, f"{id_prefix}v{keyed(key, source.path)}")
            patient = source.patient and f"p{keyed(key, source.patient)}"
            source = replace(source, id=id, patient=patient, hidden=True)
        made.append(source)
    return made, key


@contextmanager
def names_left_out(source: Source) -> Iterator[None]:
    """Take the names of files and folders out of what is refused in the block, if those of the source are hidden."""
    try:
        yield
    except Refused as refused:
        message = without_names(refused.message, source.files) if source.hidden else refused.message
        raise Refused(refused.code, message) from None


def words_of(text: str) -> set[str]:
    """Return the words of a path or a sentence that may be a name: of three letters or more, without their case."""
    return {word.casefold() for word in WORD.findall(text)}


def without_words(text: str, path: str) -> str:
    """Return what a person wrote with "(name)" in place of words that a hidden path has too."""
    hidden = words_of(path)
    return WORD.sub(lambda word: "(name)" if word[0].casefold() in hidden else word[0], text)


def without_names(text: str, files: Iterable[Path]) -> str:
    """Return a sentence with "(name)" in place of the names of files and of folders in paths.

    "expected a slope in every slice, found none in in/Doe.dcm" -> "... in every slice, found none in (name)/(name)"
    """
    files = list(files)  # of 10,000 slices few are named; a number is nobody's name
    names = {file.name for file in files if file.name in text and re.search("[^\\W\\d_]", file.name)}
    parents = {file.parent for file in files}
    folders = {part for folder in parents for part in folder.parts[len(folder.anchor) :] if part in text}
    for name in sorted(folders | names, key=len, reverse=True):
        word = rf"(?<![\w.]){re.escape(name)}(?!\w)"
        text = re.sub(word if name in names else rf"{word}(?=/)", "(name)", text)
    return text
