"""A folder has one writer: a lock of the system on a disk, a claim that is renewed where nothing can be locked."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

from photon_data.errors import UsageError
from photon_data.files import NO_SPACE, Location
from photon_data.json_text import from_json

log = logging.getLogger(__name__)

LOCK = ".lock"
# Where nothing can be locked (object stores, some cluster disks), the holder writes its claim anew all the time, and a
# claim that stayed the same for VOID_S is void. Only the waiting run's own clock counts: hosts disagree about the time.
REFRESH_S, VOID_S, SETTLE_S = 10.0, 45.0, 2.0
UNLOCKABLE = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class Hold:
    """A run's hold of a folder. Its token is in the folder's lock for as long as nobody else took over."""

    def __init__(self, out: Location) -> None:
        self.out, self.token = out, uuid.uuid4().hex
        self.is_lost = False

    def text(self, count: int = 0) -> bytes:
        """Return what the lock says; `count` makes every claim another one."""
        holder = {"host": socket.gethostname(), "pid": os.getpid(), "token": self.token, "count": count}
        return json.dumps(holder).encode()

    def check(self) -> None:
        """OSError if another run took over, which happens to a run that was silent for long."""
        if self.is_lost:
            found = "another run took over, since this one was silent for too long; run it again when that one ends"
            raise OSError(errno.ENOLCK, found, self.out.url)


@contextlib.contextmanager
def exclusive(out: Location) -> Iterator[Hold]:
    """Hold `out` while the block runs; UsageError when another run holds it. A hold ends with its process."""
    hold = Hold(out)
    if not out.is_local:
        with _claimed(hold):
            yield hold
        return
    import fcntl  # late: without Unix, stores can still be read

    try:
        out.path.mkdir(parents=True, exist_ok=True)
        # Not through a link: what it leads to would be emptied.
        lock = os.fdopen(os.open(out.path / LOCK, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o666), "ab")
    except OSError as error:
        if error.errno in NO_SPACE:
            raise
        raise UsageError(f"expected a folder that can be written to, found {out.url}: {error.strerror}") from None
    with lock, contextlib.ExitStack() as stack:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            lock.truncate(0)
            lock.write(hold.text())
            lock.flush()
        except BlockingIOError:
            raise _held_by_another(out) from None
        except OSError as error:
            if error.errno not in UNLOCKABLE:
                raise
            stack.enter_context(_claimed(hold))
        yield hold


def is_held_by(out: Location, token: str, *, strictly: bool = False) -> bool:
    """Tell whether nobody took `out` since the run with this token did. Asked by what may outlive its run.

    `strictly`: its lock has the token. A lock that is not whole, or gone, says nothing otherwise.
    """
    return bool(_holder(out).get("token", None if strictly else token) == token)


def refuse_taken(out: Location, holder: str) -> None:
    """Raise OSError where another run took `out`: a worker of another host may outlive its run."""
    if holder and not is_held_by(out, holder):
        raise OSError(errno.ENOLCK, "another run took over the output folder")


@contextlib.contextmanager
def _claimed(hold: Hold) -> Iterator[None]:
    """Hold a folder by a claim, which a thread writes anew while the block runs; UsageError if another one lives."""
    out, ended = hold.out, threading.Event()
    if seen := out.read(LOCK):
        log.warning("%s is claimed: waiting up to %.0f s to see whether that run still lives", out.url, VOID_S)
        end_s = time.monotonic() + VOID_S
        while time.monotonic() < end_s:
            time.sleep(REFRESH_S / 4)
            if (now := out.read(LOCK)) is None:
                break
            if now != seen:
                raise _held_by_another(out)
    out.remove(LOCK)
    # Not every store refuses to replace a file: of two runs that write at once, the last one's text stays.
    is_new = out.create(LOCK, hold.text())
    time.sleep(SETTLE_S)
    if not (is_new and is_held_by(out, hold.token)):
        raise _held_by_another(out)

    def refresh() -> None:
        count = 0
        while not (ended.wait(REFRESH_S) or hold.is_lost):
            try:
                if is_held_by(out, hold.token):
                    out.write(LOCK, hold.text(count := count + 1))
                else:
                    hold.is_lost = True
            except Exception as error:  # each store has its own errors of a lost connection, which may come back
                log.warning("the claim of %s could not be renewed: %s", out.url, error)

    thread = threading.Thread(target=refresh, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        with contextlib.suppress(OSError):  # a claim that cannot be taken back is void soon
            if is_held_by(out, hold.token):
                out.remove(LOCK)


def _holder(out: Location) -> dict[str, Any]:
    """Return the holder that a lock names; {} where its text is not whole, as while it is being written."""
    try:
        holder = from_json(out.read(LOCK) or b"")
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) else {}


def _held_by_another(out: Location) -> UsageError:
    holder = _holder(out)
    run = f"another run (process {holder.get('pid')} on {holder.get('host')})" if holder else "another run"
    return UsageError(f"expected {out.url} to be free, but {run} is writing there; wait for it or use another folder")
