"""Folders that may be local paths or object-store URLs, with writes that are whole or absent."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path

import fsspec
from fsspec.utils import get_protocol

from photon_data.errors import UsageError


@dataclass(frozen=True)
class Location:
    """A folder: a local path ("/data/out") or an fsspec URL ("s3://bucket/out"). Names below it are posix relative paths."""

    url: str

    @property
    def fs(self) -> fsspec.AbstractFileSystem:
        """The file system that serves this folder (fsspec keeps one instance per process)."""
        try:
            return fsspec.url_to_fs(self.url)[0]
        except (ImportError, ValueError) as error:
            raise UsageError(
                f"a folder or the URL of an object store wanted, got {self.url}: {error}; s3 and gs want the extra cloud"
            ) from None

    @property
    def is_local(self) -> bool:
        """Whether files here can be renamed, synced and locked."""
        return get_protocol(self.url) in ("file", "local")

    @property
    def is_shared(self) -> bool:
        """Whether other processes find here what this one wrote: fsspec's memory is each process's own."""
        return get_protocol(self.url) != "memory"

    @property
    def path(self) -> Path:
        """The absolute local folder; ValueError for a remote one."""
        if not self.is_local:
            raise ValueError(f"a local folder wanted, got {self.url}")
        return Path(os.path.abspath(self.url.removeprefix("file://")))  # noqa: PTH100 - resolve() would follow links

    def at(self, name: str) -> str:
        """Return the path or URL of `name`, in the form that opens it elsewhere."""
        return str(self.path / name) if self.is_local else f"{self.url.rstrip('/')}/{name}"

    def exists(self, name: str) -> bool:
        """Tell whether a file or folder of that name is there."""
        return (self.path / name).exists() if self.is_local else bool(self.fs.exists(self.at(name)))

    def read(self, name: str) -> bytes | None:
        """Return the content of a file, None if it is not there."""
        try:
            return (self.path / name).read_bytes() if self.is_local else self.fs.cat_file(self.at(name))
        except FileNotFoundError:
            return None

    def write(self, name: str, content: bytes) -> None:
        """Put a whole file in place, or leave what was there."""
        if not self.is_local:
            self.fs.pipe_file(self.at(name), content)
            return
        target = self.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.partial")
        try:
            temporary.write_bytes(content)
            sync(temporary)
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
        sync(target.parent)

    def remove(self, name: str) -> None:
        """Remove a file or a folder with all in it, if it is there."""
        if self.is_local:
            target = self.path / name
            shutil.rmtree(target) if target.is_dir() else target.unlink(missing_ok=True)
        elif self.fs.exists(self.at(name)):
            self.fs.rm(self.at(name), recursive=True)

    def names(self, folder: str) -> list[str]:
        """Return the sorted names of what lies directly in `folder`; empty if there is no such folder."""
        try:
            if self.is_local:
                return sorted(entry.name for entry in (self.path / folder).iterdir())
            return sorted(Path(entry).name for entry in self.fs.ls(self.at(folder), detail=False))
        except FileNotFoundError:
            return []


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
        for name in names:
            sync(Path(parent, name))
        sync(Path(parent))


def replace_folder(new: Path, target: Path) -> None:
    """Rename the finished folder `new` to `target`; what stood there is moved aside first and then removed."""
    aside = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.partial")
    with contextlib.suppress(FileNotFoundError):
        target.rename(aside)
    new.rename(target)
    sync(target.parent)
    shutil.rmtree(aside, ignore_errors=True)
