"""Files and folders, local or in an object store: written whole or not at all; rows, fingerprints."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import re
import shutil
import stat
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
from fsspec.utils import get_protocol

from photon_data.errors import UsageError
from photon_data.json_text import from_json

# Not in part of a name: control characters, a backslash, a drive ("C:") first, a space or dot last (Windows drops it).
UNSAFE = re.compile(r"[\x00-\x1f\x7f-\x9f\\]|^.:|[ .]$")
PLAIN = re.compile(r"[\w-]+([./][\w-]+)*", re.ASCII)  # nearly all names, and none that is unsafe but by its length
MAX_NAME_BYTES = 255
# Names that Windows keeps for devices, with any suffix: we make none.
RESERVED = re.compile(r"(con|prn|aux|nul|com[1-9]|lpt[1-9])(\..*)?", re.IGNORECASE)


def is_safe(name: str) -> bool:
    """Tell whether a relative path stays below its folder and is a name on every system.

    "volumes/a.ome.zarr" is one. "../a", "/a", "a//b", "C:a", "a.", "", a backslash and a part of 256 bytes are not.
    """
    if len(name) <= MAX_NAME_BYTES and PLAIN.fullmatch(name):
        return True
    # A byte of a file name that is no UTF-8 counts as one.
    parts = [(part, len(part.encode("utf-8", "replace"))) for part in name.split("/")]
    return all(part and not UNSAFE.search(part) and length <= MAX_NAME_BYTES for part, length in parts)


def refuse_unsafe(name: str, what: str) -> str:
    """Return `what` is to name one file or folder, if it `is_safe`; UsageError where it is not, or is a longer path."""
    if "/" in name or not is_safe(name):
        expected = f"{what} without '/', '\\', control characters and a dot or space at its end"
        raise UsageError(f"expected {expected}, of at most {MAX_NAME_BYTES} bytes, found {name[:300]!r}; rename it")
    return name


# A longer line is no row of ours: nobody should read it to find that out.
MAX_ROW_BYTES = 1 << 26
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class Location:
    """A folder: a local path or an fsspec URL ("s3://bucket/out"). Names below it are relative paths with "/".

    What is not `is_safe` is no name: there is no such file, and to write or remove one is a UsageError. So is to write
    behind a link that leads out of the folder.
    """

    url: str

    @property
    def fs(self) -> fsspec.AbstractFileSystem:
        """The file system of this folder; fsspec keeps one per process."""
        try:
            return fsspec.url_to_fs(self.url)[0]
        except (ImportError, ValueError) as error:
            found = f"{self.url} ({error}); s3 and gs need the extra cloud"
            raise UsageError(f"expected a folder or the URL of an object store, found {found}") from None

    @cached_property
    def is_local(self) -> bool:
        """Whether files here can be renamed, synced and locked."""
        return get_protocol(self.url) in ("file", "local")

    @property
    def is_shared(self) -> bool:
        """Whether other processes find here what this one wrote: fsspec's memory belongs to one process."""
        return get_protocol(self.url) != "memory"

    @property
    def path(self) -> Path:
        """The absolute local folder; ValueError for a remote one."""
        if not self.is_local:
            raise ValueError(f"expected a local folder, found {self.url}")
        return Path(self._below(""))

    def _below(self, name: str) -> str:  # a text: it is made for every file of every store
        root = os.path.abspath(self.url.removeprefix("file://"))  # noqa: PTH100 - resolve() follows links
        return os.path.join(root, name) if name else root  # noqa: PTH118

    def at(self, name: str) -> str:
        """Return the path or URL of `name`, in the form that opens it elsewhere; of the folder itself for ""."""
        if name:
            self._refuse_unsafe(name)
        return self._below(name) if self.is_local else f"{self.url.rstrip('/')}/{name}"

    def place(self, name: str) -> Path:
        """Return the local path to write `name` to; UsageError where a link on the way leads out of the folder."""
        self._refuse_unsafe(name)
        path = self.path / name
        root, parent = os.path.realpath(self.path), os.path.realpath(path.parent)
        if not Path(parent).is_relative_to(root):
            raise UsageError(
                f"expected that {path} lies in {root}, found a link that leads to {parent}; remove the link"
            )
        return path

    def _refuse_unsafe(self, name: str) -> None:
        if not is_safe(name):
            raise UsageError(f"expected a name below {self.url}, found {name[:300]!r}, which could lead out of it")

    def exists(self, name: str) -> bool:
        """Tell whether there is a file or folder of that name."""
        if self.is_local:
            return is_safe(name) and Path(self._below(name)).exists()
        return is_safe(name) and bool(self.fs.exists(self.at(name)))

    def read(self, name: str, most: int | None = None) -> bytes | None:
        """Return the content of a file, or its first bytes; None if there is no such file."""
        if not is_safe(name):
            return None
        try:
            if not self.is_local:
                return self.fs.cat_file(self.at(name), end=most)
            with open(self._below(name), "rb") as file:  # noqa: PTH123 - a Path takes as long as the file
                return file.read(-1 if most is None else min(most, os.fstat(file.fileno()).st_size))
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            return None

    def rows(self, name: str, *, may_be_cut: bool = False) -> Iterator[dict[str, Any]]:
        """Yield the rows of a file of JSON lines as `jsonl_rows` does; none if there is no such file."""
        if not is_safe(name):
            return
        try:
            file = (self.path / name).open("rb") if self.is_local else self.fs.open(self.at(name), "rb")
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            return
        with file:
            yield from jsonl_rows(_lines(file) if self.is_local else file, may_be_cut=may_be_cut)

    def size(self, name: str) -> int | None:
        """Return the size of a file in bytes; None if there is no such file."""
        if not is_safe(name):
            return None
        try:
            if self.is_local:
                facts = os.stat(self._below(name))  # noqa: PTH116
                return facts.st_size if stat.S_ISREG(facts.st_mode) else None
            self.fs.invalidate_cache(self.at(name))  # another process may have changed what a listing said
            found = self.fs.info(self.at(name))
            if found["type"] != "file":
                return None
            # A web server need not tell sizes.
            return len(self.fs.cat_file(self.at(name))) if found["size"] is None else int(found["size"])
        except (FileNotFoundError, NotADirectoryError):
            return None

    def state(self, name: str) -> object:
        """Return what changes when a file is lost or replaced (remotely, its size); None where there is none."""
        if not self.is_local:
            return self.size(name)
        try:
            found = Path(self._below(name)).stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        return found.st_size, found.st_ino, found.st_mtime_ns

    def sha256(self, name: str) -> str | None:
        """Return the SHA-256 of a file, of a local one without holding it in memory; None if there is no such file."""
        if not self.is_local:
            content = self.read(name)
            return None if content is None else hashlib.sha256(content).hexdigest()
        if not is_safe(name):
            return None
        try:
            with Path(self._below(name)).open("rb", buffering=0) as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            return None

    def write(self, name: str, content: bytes | Iterable[bytes]) -> None:
        """Write a whole file; of parts, a local one takes no memory. If that fails, the file that was there stays."""
        parts = [content] if isinstance(content, bytes) else content
        if self.is_local:
            with write_whole(self.place(name)) as temporary, temporary.open("wb") as file:
                file.writelines(parts)
        else:
            self.fs.pipe_file(self.at(name), _joined(parts))

    def write_rows(self, name: str, rows: Iterable[dict[str, Any]]) -> None:
        """Write a whole file of JSON lines, as `write` does."""
        self.write(name, map(_jsonl_line, rows))

    def create(self, name: str, content: bytes) -> bool:
        """Write a file that must not be there yet; return whether it was not. Stores that cannot refuse replace it."""
        try:
            self.fs.pipe_file(self.at(name), content, mode="create")
        except (TypeError, ValueError, NotImplementedError):  # this store does not know the mode
            self.write(name, content)
        except OSError:
            if not self.exists(name):
                raise
            return False
        return True

    def remove(self, name: str) -> None:
        """Remove a file, or a folder with all that is in it, if there is one."""
        if self.is_local:
            _remove(self.place(name))
        elif self.fs.exists(self.at(name)):
            self.fs.rm(self.at(name), recursive=True)

    def names(self, folder: str) -> list[str]:
        """Return the sorted names of what lies directly in `folder`; none if there is no such folder."""
        try:
            if self.is_local:
                return sorted(entry.name for entry in (self.path / folder).iterdir())
            return sorted(Path(entry).name for entry in self.fs.ls(self.at(folder), detail=False))
        except (FileNotFoundError, NotADirectoryError):
            return []


@contextlib.contextmanager
def write_whole(path: Path, temporary: Path | None = None) -> Iterator[Path]:
    """Yield a temporary path to write a file or a folder to. At the end it is synced to disk and renamed to `path`.

        with write_whole(folder / "rows.jsonl") as temporary:
            temporary.write_bytes(jsonl_bytes(rows))

    So `path` is complete wherever it exists: what was there before stays if the block raises or the disk is full. The
    temporary path is `.NAME.xxxxxxxx.partial` beside `path`, or `temporary` on the same disk: what a killed run left is
    removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary or _new_name(path)
    _remove(temporary)
    try:
        yield temporary
        if temporary.is_dir():
            sync_tree(temporary)
            replace_folder(temporary, path)
        else:
            sync(temporary)
            temporary.replace(path)
            sync(path.parent)
    finally:
        _remove(temporary)


def replace_folder(new: Path, target: Path) -> None:
    """Rename the finished folder `new` to `target`. A folder that was there is moved aside before and removed after."""
    aside = _new_name(target)
    with contextlib.suppress(FileNotFoundError):
        target.rename(aside)
    new.rename(target)
    sync(target.parent)
    shutil.rmtree(aside, ignore_errors=True)


def sync(path: Path) -> None:
    """Force a file's content, or a folder's entries, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Force every file and folder below `folder` to disk."""
    for parent, _, names in os.walk(folder):
        for name in (*names, ""):
            sync(Path(parent, name))


def _new_name(path: Path) -> Path:
    name = path.name
    while len(name.encode("utf-8", "replace")) > MAX_NAME_BYTES - 20:
        name = name[:-1]
    return path.with_name(f".{name}.{uuid.uuid4().hex[:8]}.partial")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


class LazyRows(Sequence[dict[str, Any]]):
    """Rows that are made anew whenever they are looked at: those of a million scans would take two gigabytes."""

    def __init__(self, items: Sequence[Any], make: Callable[[Any], dict[str, Any]]) -> None:
        self._items, self._make = items, make

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return map(self._make, self._items)

    def __getitem__(self, index: Any) -> Any:
        found = self._items[index]
        return LazyRows(found, self._make) if isinstance(index, slice) else self._make(found)


def jsonl_bytes(rows: Iterable[dict[str, Any]]) -> bytes:
    """Return rows as JSON lines, keys in their given order. What UTF-8 cannot hold (odd file names) is escaped."""
    return _joined(map(_jsonl_line, rows))


def _joined(parts: Iterable[bytes]) -> bytes:
    buffer = io.BytesIO()  # b"".join would hold all parts twice
    buffer.writelines(parts)
    return buffer.getvalue()


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """Yield the lines of a file; ValueError for one that is longer than any row."""
    for number, line in enumerate(iter(lambda: file.readline(MAX_ROW_BYTES + 1), b""), 1):
        if len(line) > MAX_ROW_BYTES:
            raise ValueError(f"expected at most {MAX_ROW_BYTES:,} bytes on line {number}, found more")
        yield line


_encode = json.JSONEncoder(ensure_ascii=False, check_circular=False).encode  # json.dumps makes an encoder per row
_canonical = json.JSONEncoder(sort_keys=True, separators=(",", ":"), check_circular=False).encode


def _jsonl_line(row: dict[str, Any]) -> bytes:
    return (_encode(row) + "\n").encode("utf-8", "backslashreplace")


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Add a row to the end of a file of JSON lines, there or not. Half a row that a killed run left goes before."""
    with path.open("a+b") as file:
        if (end := file.seek(0, os.SEEK_END)) and (file.seek(end - 1), file.read())[1] != b"\n":
            begin = file.seek(max(0, end - MAX_ROW_BYTES))
            content = file.read()
            start = content.rfind(b"\n") + 1
            try:
                from_json(content[start:])
                file.write(b"\n")
            except ValueError:
                file.truncate(begin + start)
        file.write(_jsonl_line(row))


def digest_of(content: Mapping[str, Any], without: str) -> str:
    """Return the SHA-256 of a JSON object without one key, as JSON with sorted keys and no spaces."""
    return hashlib.sha256(_canonical({k: v for k, v in content.items() if k != without}).encode()).hexdigest()


def from_jsonl(text: str) -> list[dict[str, Any]]:
    """Return the rows of a JSON-lines text; ValueError names the first line that is not JSON."""
    # Not splitlines(): it also splits at U+2028, which JSON strings may hold.
    return list(jsonl_rows(text.split("\n")))


def jsonl_rows(lines: Iterable[str | bytes], *, may_be_cut: bool = False) -> Iterator[dict[str, Any]]:
    """Yield the row of each line; ValueError names the first line that is not JSON.

    `may_be_cut`: a last line without its end is no row. A run was killed while it appended that.
    """
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                row = from_json(line)
            except ValueError as error:
                if may_be_cut and line[-1:] not in ("\n", b"\n"):
                    return
                shown = line[:80] if isinstance(line, str) else line[:80].decode(errors="backslashreplace")
                raise ValueError(f"expected JSON on line {number}, found {shown!r} ({error})") from None
            yield row


def fingerprint(files: Sequence[Path]) -> str:
    """Return "sha256:<64 hex>" of the content of the files, in their order; names and dates do not count.

    One file gives the hash that `sha256sum` prints. Several give the hash of their (size, sha256) pairs, so that bytes
    moved from the end of one file to the start of the next show. OSError for a file that cannot be read.
    """
    digests = []
    for path in files:
        with path.open("rb", buffering=0) as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            digests.append((file.tell(), digest))
    if len(digests) == 1:
        return f"sha256:{digests[0][1]}"
    listing = "".join(f"{size} {digest}\n" for size, digest in digests)
    return f"sha256:{hashlib.sha256(listing.encode()).hexdigest()}"
