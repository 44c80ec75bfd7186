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
# An object store cannot lock. There the holder refreshes its claim, and a claim that is older than this is void.
STALE_S = 300


@contextlib.contextmanager
def exclusive(out: Location) -> Iterator[None]:
    """Hold `out` while the block runs; UsageError when another run holds it. A hold ends with its process."""
    if out.is_local:
        with _locked_file(out):
            yield
        return
    holder = _parse((out.read(NAME) or b"").decode())
    if time.time() - holder.get("time", 0) < STALE_S:
        raise _taken(out, holder)
    refresh(out)
    try:
        yield
    finally:
        out.remove(NAME)


def refresh(out: Location) -> None:
    """Renew the claim of the run that holds `out`. Call it now and then; only an object store needs it."""
    if not out.is_local:
        out.write(NAME, json.dumps({**_this_process(), "time": time.time()}).encode())


@contextlib.contextmanager
def _locked_file(out: Location) -> Iterator[None]:
    try:
        out.path.mkdir(parents=True, exist_ok=True)
        lock = (out.path / NAME).open("a+")
    except OSError as error:
        raise UsageError(f"expected a folder that can be written to, found {out.url}: {error.strerror}") from None
    with lock as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise _taken(out, _parse(file.read())) from None
        file.truncate(0)
        file.write(json.dumps(_this_process()))
        file.flush()
        yield


def _this_process() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid()}


def _parse(text: str) -> dict[str, Any]:
    """Return the holder that a lock names; {} where its text is not whole, as while it is being written."""
    try:
        holder = json.loads(text)
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) else {}


def _taken(out: Location, holder: dict[str, Any]) -> UsageError:
    other = f"process {holder.get('pid')} on {holder.get('host')}"
    return UsageError(
        f"expected {out.url} to be free, but another run ({other}) is writing there; wait for it or use another folder"
    )
