"""One run at a time per output folder."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from typing import Any

from photon_data.errors import UsageError
from photon_data.files import Location

NAME = ".lock"
# An object store cannot lock. There the holder refreshes its claim, and one that was not for this long is dead.
STALE_S = 300


def refresh(out: Location) -> None:
    """Say that the run that holds `out` is alive; call it now and then (of use on object stores only)."""
    if not out.is_local:
        out.write(NAME, json.dumps({**_ourselves(), "time": time.time()}).encode())


def _ourselves() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid()}


@contextlib.contextmanager
def exclusive(out: Location) -> Iterator[None]:
    """Hold `out` while the block runs; UsageError when another run holds it. However a process ends, its hold ends too."""
    if out.is_local:
        with _locked_file(out):
            yield
        return
    said = _read_holder((out.read(NAME) or b"").decode())
    if time.time() - said.get("time", 0) < STALE_S:
        raise _taken(out, said)
    refresh(out)
    try:
        yield
    finally:
        out.remove(NAME)


@contextlib.contextmanager
def _locked_file(out: Location) -> Iterator[None]:
    try:
        out.path.mkdir(parents=True, exist_ok=True)
        held = (out.path / NAME).open("a+")
    except OSError as error:
        raise UsageError(f"a folder to write into wanted, got {out.url}: {error.strerror}") from None
    with held as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise _taken(out, _read_holder(file.read())) from None
        file.truncate(0)
        file.write(json.dumps(_ourselves()))
        file.flush()
        yield


def _read_holder(text: str) -> dict[str, Any]:
    """Return who a lock says holds it; {} where it says nothing whole, as while it is being written."""
    try:
        said = json.loads(text)
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}


def _taken(out: Location, holder: dict[str, object]) -> UsageError:
    who = f"process {holder.get('pid')} on {holder.get('host')}"
    return UsageError(
        f"{out.url} to ourselves wanted, but another run ({who}) is writing there; wait for it or use another folder"
    )
