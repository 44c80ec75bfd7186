"""Objects of a store below a URL: what lies there, ranges of them, and the files of one scan brought to a local disk.

Nothing here quotes an error of a store: it may hold a signed URL.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple

from fsspec import AbstractFileSystem

from photon_data.errors import UsageError
from photon_data.files import MAX_NAME_BYTES, NO_SPACE, Location
from photon_data.scan import Source, change_mark, is_url, names_below

# How often a request is made before it counts as failed, with these pauses between.
PAUSES_S = (0.5, 2.0, 5.0)
LONG_S = 60.0  # a request that fails after this is not made again: the store's library has tried by itself
PIECE_BYTES = 1 << 23  # of an object, in memory at a time
THREADS = 8  # which fetch the files of one scan
BATCH = 64  # ranges of one request to the store's library
SCRATCH = "photon-scan-"
# What tells one version of an object from another: its hash where the store has one, else its time.
VERSIONS = ("ETag", "etag", "LastModified", "last_modified", "updated", "mtime", "created")
AGAIN = "run the same command again"


class Entry(NamedTuple):
    """What a listing says of an object."""

    size: int
    mark: int  # a number that changes with its version


class Listing(NamedTuple):
    """What lies below a URL."""

    url: str  # of the folder: of the one that holds it, where SOURCE is a single object
    entries: dict[str, Entry]  # by name relative to it
    unsafe: int  # objects whose names are no paths ("a//b", "a/../b"): they are left alone


class NotFetched(OSError):
    """The files of a scan are not on the local disk: "fetch", "changed" or "scratch-full", and a sentence."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(errno.EIO, message)
        self.code, self.message = code, message


def checked_url(text: str) -> str:
    """Return a URL without "/" at its end; UsageError for one with a password or a query, which would be recorded."""
    scheme, _, rest = text.partition("://")
    if not re.fullmatch("[A-Za-z0-9]+", scheme) or "@" in rest.partition("/")[0] or "?" in rest or not rest.strip("/"):
        expected = "a URL like s3://bucket/folder, with nothing before its bucket and no query"
        raise UsageError(f"expected {expected}, found another one; give credentials as the store's own tools read them")
    return text.rstrip("/")


class Bucket:
    """The objects below a URL; UsageError, when they are first asked for, where its library is not installed.

    Where the work does not go on, what fails is not asked for again, and `fetch` ends early.
    """

    def __init__(self, url: str, goes_on: Callable[[], bool] = lambda: True) -> None:
        self.url, self.goes_on = url, goes_on

    @cached_property
    def fs(self) -> AbstractFileSystem:
        """The file system of the URL."""
        return Location(self.url).fs

    def at(self, name: str) -> str:
        """Return the URL of an object; of the folder itself for ""."""
        return f"{self.url}/{name}" if name else self.url

    def listing(self) -> Listing:
        """Return what lies below the URL, asked anew; UsageError where the store does not tell, or has nothing."""
        fs, url = self.fs, self.url
        top = str(fs._strip_protocol(url)).strip("/")  # what is found has keys of this form
        try:
            fs.invalidate_cache()
            found = _again(lambda: fs.find(self.url, detail=True), self.goes_on)
            if [key.strip("/") for key in found] == [top]:  # the URL is one object: its data file lies beside it
                url, top = url.rpartition("/")[0], top.rpartition("/")[0]
                found = {one["name"]: one for one in _again(lambda: fs.ls(url, detail=True), self.goes_on)}
            fs.invalidate_cache()  # it takes memory
        except Exception as error:
            remedy = "check the URL, and the credentials that the store's own tools read"
            raise UsageError(f"expected a store that lists {url}, found {_name_of(error)}; {remedy}") from None
        names = {key.lstrip("/")[len(top) + 1 :]: info for key, info in found.items() if info["type"] == "file"}
        named = {name: info for name, info in names.items() if name and not name.endswith("/")}  # "a/" is a folder
        if not named:
            raise UsageError(f"expected objects below {self.url}, found none; check the URL")
        safe = {name: _entry(info) for name, info in named.items() if _is_path(name)}
        return Listing(url, safe, len(named) - len(safe))

    def entry(self, name: str) -> Entry:
        """Return what the store says of an object now; OSError as `read`, FileNotFoundError where there is none."""

        def ask() -> Entry:
            self.fs.invalidate_cache(self.at(name))
            return _entry(self.fs.info(self.at(name)))

        return _told(ask, self.goes_on)

    def exists(self, name: str) -> bool:
        """Tell whether there is an object of that name now, or a folder with some; OSError as `read`."""

        def ask() -> bool:
            self.fs.invalidate_cache(self.at(name))
            return bool(self.fs.exists(self.at(name)))

        return bool(_told(ask, self.goes_on))

    def read(self, name: str, start: int, stop: int) -> bytes:
        """Return a range of an object; OSError in our words where the store does not give it."""

        def ask() -> bytes:
            if len(data := self.fs.cat_file(self.at(name), start=start, end=stop)) != stop - start:
                raise OSError(errno.EIO, "another length than the store said")
            return data

        return _told(ask, self.goes_on)

    def heads(self, names: Sequence[str], stops: Sequence[int]) -> dict[str, bytes]:
        """Return the first bytes of objects, many at a time; those that cannot be had now are not in it."""
        found: dict[str, bytes] = {}
        with suppress(Exception):  # what is missing is asked for by itself, and then tells why
            places = [self.at(name) for name in names]
            heads = self.fs.cat_ranges(places, [0] * len(places), [*stops], on_error="return", batch_size=BATCH)
            pairs = zip(names, heads, stops, strict=True)
            found = {name: head for name, head, stop in pairs if isinstance(head, bytes) and len(head) == stop}
        return found

    def fetch(self, name: str, entry: Entry, path: Path) -> None:
        """Write an object to a new local file, a piece in memory at a time; NotFetched, OSError.

        It ends early, with a file that is too short, where the work does not go on.
        """
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with path.open("xb") as file:  # buffered: a raw write of a piece may end early, without an error
            for start in range(0, entry.size, PIECE_BYTES):
                if not self.goes_on():
                    return
                file.write(self.read(name, start, min(start + PIECE_BYTES, entry.size)))
        if entry.size > PIECE_BYTES and self.entry(name) != entry:  # its pieces may be of two versions
            raise _changed()


def _entry(info: Mapping[str, Any]) -> Entry:
    version = next((info[key] for key in VERSIONS if info.get(key)), "")
    if info["size"] is None:
        raise UsageError("expected a store that tells the sizes of its objects, found one that does not; copy them")
    digest = hashlib.sha256(str(version).strip('"').encode()).digest()
    return Entry(int(info["size"]), int.from_bytes(digest[:7], "big"))


def _is_path(name: str) -> bool:
    """Tell whether the name of an object can be a path on a disk that stays where it belongs."""
    parts = [(part, len(part.encode("utf-8", "replace"))) for part in name.split("/")]
    return "\0" not in name and all(part not in ("", ".", "..") and size <= MAX_NAME_BYTES for part, size in parts)


def _told(ask: Callable[[], Any], goes_on: Callable[[], bool]) -> Any:
    """Return what a request gives; OSError with an errno and our words, whatever the store's library raises."""
    try:
        return _again(ask, goes_on)
    except UsageError:
        raise
    except FileNotFoundError:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)) from None
    except PermissionError:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES)) from None
    except Exception as error:
        raise OSError(errno.EIO, f"the store did not give it ({_name_of(error)})") from None


def _again(ask: Callable[[], Any], goes_on: Callable[[], bool]) -> Any:
    """Return what a request gives, made again after a pause where it fails for a reason that may pass."""
    for pause_s in PAUSES_S:
        start_s = time.monotonic()
        try:
            return ask()
        except (FileNotFoundError, PermissionError, UsageError):
            raise
        except Exception:
            if time.monotonic() - start_s > LONG_S or not goes_on():
                raise
            time.sleep(pause_s)
    return ask()


def _name_of(error: Exception) -> str:
    return type(error).__name__


# --- the files of one scan


@contextmanager
def files_at_hand(job: dict[str, Any], goes_on: Callable[[], bool] = lambda: True) -> Iterator[dict[str, Any]]:
    """Yield a job, as JSON, with local files in place of the objects of its source; NotFetched.

    They lie in a folder of TMPDIR that its owner alone can enter, by the names that they have below SOURCE. It is gone
    after the block. A job of a scan that is not read is yielded as it is.
    """
    source = job["source"]
    if source.get("problem"):
        yield job
        return
    listed = source["bytes"], source["mtime_ns"]
    with fetched(source["root"], source["files"], listed, goes_on) as files:
        yield {**job, "source": {**source, "files": [str(file) for file in files], "headers": ""}}


@contextmanager
def source_at_hand(source: Source) -> Iterator[Source]:
    """Yield a source with local files in place of its objects, as `files_at_hand` does."""
    if not is_url(source.root) or source.problem:
        yield source
        return
    with fetched(source.root, source.names, (source.bytes, source.mtime_ns)) as files:
        yield replace(source, names=names_below(source.root, files), headers="")


@contextmanager
def fetched(
    root: str, names: Sequence[str], listed: tuple[int, int], goes_on: Callable[[], bool] = lambda: True
) -> Iterator[list[Path]]:
    """Yield the local files of objects below a URL, which go after the block; NotFetched.

    `listed` are the bytes of all of them, and their `change_mark`, when they were listed.
    """
    with scratch_folder() as folder:
        yield _fetch_all(root, names, listed, folder, goes_on)


def _fetch_all(
    root: str, names: Sequence[str], listed: tuple[int, int], folder: Path, goes_on: Callable[[], bool]
) -> list[Path]:
    files = [folder / name for name in names]
    try:
        bucket = Bucket(root, goes_on)
        _ = bucket.fs  # made here: connections of a thread that ends would not be used again
        with ThreadPoolExecutor(THREADS, "fetch") as threads:
            entries = list(threads.map(bucket.entry, names))
            facts = [(name, entry.size, entry.mark) for name, entry in zip(names, entries, strict=True)]
            if (sum(size for _, size, _ in facts), change_mark(facts)) != listed:
                raise _changed()
            if listed[0] > (free := shutil.disk_usage(folder).free):
                raise _no_space(folder, f"{free:,} bytes free for {listed[0]:,} of this scan")
            list(threads.map(bucket.fetch, names, entries, files))
    except (NotFetched, UsageError):
        raise
    except FileNotFoundError:
        raise _changed() from None
    except Exception as error:
        if isinstance(error, OSError) and error.errno in NO_SPACE:
            raise _no_space(folder, "none left") from None
        raise _not_read(error) from None
    return files


def _not_read(error: Exception) -> NotFetched:
    found = (isinstance(error, OSError) and error.strerror) or _name_of(error)
    return NotFetched("fetch", f"expected that the worker can read it from SOURCE, found: {found}; {AGAIN}")


def _changed() -> NotFetched:
    found = "another version of one, or none: it was written or removed since"
    return NotFetched("changed", f"expected the objects of the scan as they were listed, found {found}; {AGAIN}")


def _no_space(folder: Path, found: str) -> NotFetched:
    remedy = f"free some, set TMPDIR to a larger disk, or take fewer --workers, and {AGAIN}"
    expected = f"expected space for a copy of the scan in {folder.parent}"
    return NotFetched("scratch-full", f"{expected}, found {found}; {remedy}")


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Yield a new folder in TMPDIR for its owner alone; it is removed after the block.

    It is locked while it is in use: what a process that was killed left behind goes when the next one begins.
    """
    _remove_abandoned()
    folder, handle = _new_folder()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


def _new_folder() -> tuple[Path, int]:
    while True:
        folder = Path(tempfile.mkdtemp(prefix=SCRATCH))
        with suppress(FileNotFoundError):  # it was taken for an abandoned one before it was locked
            handle = os.open(folder, os.O_RDONLY)
            with suppress(OSError):  # a disk that cannot lock
                fcntl.flock(handle, fcntl.LOCK_EX)
            if folder.exists():
                return folder, handle
            os.close(handle)


@cache
def _remove_abandoned() -> None:
    for folder in Path(tempfile.gettempdir()).glob(f"{SCRATCH}*"):
        with suppress(OSError):  # of another user, or gone
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
            finally:
                os.close(handle)
