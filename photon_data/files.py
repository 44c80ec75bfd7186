"""Files and folders, local or in an object store: written whole or not at all, held by one run; rows, fingerprints."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import socket
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
from fsspec.utils import get_protocol

from photon_data.errors import UsageError


@dataclass(frozen=True)
class Location:
    """A folder: a local path or an fsspec URL ("s3://bucket/out"). Names below it are relative paths with "/"."""

    url: str

    @property
    def fs(self) -> fsspec.AbstractFileSystem:
        """The file system of this folder; fsspec keeps one per process."""
        try:
            return fsspec.url_to_fs(self.url)[0]
        except (ImportError, ValueError) as error:
            found = f"{self.url} ({error}); s3 and gs need the extra cloud"
            raise UsageError(f"expected a folder or the URL of an object store, found {found}") from None

    @property
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
        return Path(os.path.abspath(self.url.removeprefix("file://")))  # noqa: PTH100 - resolve() would follow links

    def at(self, name: str) -> str:
        """Return the path or URL of `name`, in the form that opens it elsewhere."""
        return str(self.path / name) if self.is_local else f"{self.url.rstrip('/')}/{name}"

    def exists(self, name: str) -> bool:
        """Tell whether there is a file or folder of that name."""
        return (self.path / name).exists() if self.is_local else bool(self.fs.exists(self.at(name)))

    def read(self, name: str) -> bytes | None:
        """Return the content of a file; None if there is no such file."""
        try:
            return (self.path / name).read_bytes() if self.is_local else self.fs.cat_file(self.at(name))
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            return None

    def size(self, name: str) -> int | None:
        """Return the size of a file in bytes; None if there is no such file."""
        try:
            if self.is_local:
                return (self.path / name).stat().st_size if (self.path / name).is_file() else None
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
            found = (self.path / name).stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        return found.st_size, found.st_ino, found.st_mtime_ns

    def write(self, name: str, content: bytes) -> None:
        """Write a whole file. If that fails, the file that was there before stays."""
        if self.is_local:
            with write_whole(self.path / name) as temporary:
                temporary.write_bytes(content)
        else:
            self.fs.pipe_file(self.at(name), content)

    def remove(self, name: str) -> None:
        """Remove a file, or a folder with all that is in it, if there is one."""
        if self.is_local:
            _remove(self.path / name)
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
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def jsonl_bytes(rows: Iterable[dict[str, Any]]) -> bytes:
    """Return rows as JSON lines, keys in their given order. What UTF-8 cannot hold (odd file names) is escaped."""
    encode = json.JSONEncoder(ensure_ascii=False).encode  # json.dumps makes an encoder per row
    buffer = io.BytesIO()  # b"".join would hold all lines twice
    buffer.writelines((encode(row) + "\n").encode("utf-8", "backslashreplace") for row in rows)
    return buffer.getvalue()


def digest_of(content: Mapping[str, Any], without: str) -> str:
    """Return the SHA-256 of a JSON object without one key, as JSON with sorted keys and no spaces."""
    rest = {key: value for key, value in content.items() if key != without}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def from_jsonl(text: str) -> list[dict[str, Any]]:
    """Return the rows of a JSON-lines text; ValueError names the first line that is not JSON."""
    rows = []
    # Not splitlines(): it also splits at U+2028, which JSON strings may hold.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"expected JSON on line {number}, found {line[:80]!r} ({error.msg})") from None
    return rows


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


LOCK = ".lock"
# An object store cannot lock. There the holder refreshes its claim, and a claim that is older than this is void.
STALE_S = 300


@contextlib.contextmanager
def exclusive(out: Location) -> Iterator[None]:
    """Hold `out` while the block runs; UsageError when another run holds it. A hold ends with its process."""
    if not out.is_local:
        if time.time() - _holder(out).get("time", 0) < STALE_S:
            raise _held_by_another(out)
        refresh(out)
        try:
            yield
        finally:
            out.remove(LOCK)
        return
    import fcntl  # late: without Unix, stores can still be read

    try:
        out.path.mkdir(parents=True, exist_ok=True)
        lock = (out.path / LOCK).open("a")
    except OSError as error:
        raise UsageError(f"expected a folder that can be written to, found {out.url}: {error.strerror}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _held_by_another(out) from None
        lock.truncate(0)
        lock.write(json.dumps(_this_process()))
        lock.flush()
        yield


def refresh(out: Location) -> None:
    """Renew the claim of the run that holds `out`. Call it now and then; only an object store needs it."""
    if not out.is_local:
        out.write(LOCK, json.dumps({**_this_process(), "time": time.time()}).encode())


def _this_process() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid()}


def _holder(out: Location) -> dict[str, Any]:
    """Return the holder that a lock names; {} where its text is not whole, as while it is being written."""
    try:
        holder = json.loads(out.read(LOCK) or b"")
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) else {}


def _held_by_another(out: Location) -> UsageError:
    holder = _holder(out)
    run = f"another run (process {holder.get('pid')} on {holder.get('host')})"
    return UsageError(f"expected {out.url} to be free, but {run} is writing there; wait for it or use another folder")
