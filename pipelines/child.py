"""Both ends of the isolated process in which files are read: one job a line on stdin, one reply a line on stdout.

A parser that crashes, hangs or takes all memory costs one file: the reply says so, and a new child goes on.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from photon_data.bucket import NotFetched, files_at_hand
from photon_data.records import DIED, OUT_FULL, UNABLE, NoSpace
from photon_data.scan import is_url

# Without these, glibc returns every large buffer to the kernel and faults it in again: 1.8 s instead of 1.0 s per scan.
ENVIRONMENT = {
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_ARENA_MAX": "2",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
# What a child runs first: 0.5 s of imports come after it has tied its life to its parent's. PR_SET_PDEATHSIG (1) of
# prctl(2) has the kernel kill it, even while SimpleITK holds the interpreter for seconds. A parent that died before
# that is no longer the parent. Signals that SLURM sends to all processes of a step are for the parent: a child that
# they ended would count as a scan that crashes its reader.
FIRST = """
import ctypes, os, signal, sys
parent, address_space_bytes, module = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
if os.getppid() != parent:
    os._exit(1)
for ending in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(ending, signal.SIG_IGN)
try:
    from importlib import import_module
    main = import_module(module).main
except ImportError:
    os._exit(78)
main(address_space_bytes)
"""
NOT_INSTALLED = 78  # as above; EX_CONFIG of sysexits.h
# A child without work for so long ends: the run that it worked for is gone, if not this process.
IDLE_S, IDLE = 600.0, 79


# The parent's end


class ChildError(RuntimeError):
    """The child did not answer. The code says how it ended: "crashed", "killed" or "timeout"."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code, self.message = code, message


class Child:
    """A process that answers a line of JSON with a line of JSON. It starts at the first job, and after it died."""

    def __init__(self, *command: str) -> None:
        self.command = command
        self.process: subprocess.Popen[bytes] | None = None

    def ask(self, job: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        """Return the child's reply; ChildError when it dies or takes longer than `timeout_s`."""
        line = self._answer(job, timeout_s)
        if not line and self.process is not None and self.process.wait() == IDLE:  # it left before it saw the job
            line = self._answer(job, timeout_s)
        if not line.endswith(b"\n"):
            assert self.process is not None
            raise _cause_of_death(self.process.wait())
        return json.loads(line)

    def _answer(self, job: dict[str, Any], timeout_s: float) -> bytes:
        """Return the line that the child writes about a job, or a part of it where the child ended."""
        if self.process is None or self.process.poll() is not None:
            self.process = subprocess.Popen(
                [sys.executable, *self.command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, **ENVIRONMENT},
                start_new_session=True,  # Ctrl-C in the terminal is for the parent to handle
            )
        process = self.process
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(job).encode() + b"\n")
            process.stdin.flush()
            return _read_line(process, timeout_s)
        except BrokenPipeError:
            return b""

    def kill(self) -> None:
        """End the child at once; safe at any time, from any thread."""
        if self.process is not None:
            self.process.kill()


def child_of(module: str, address_space_bytes: int) -> Child:
    """Return a child that answers by the `main` of a module, and ends with this process whatever happens."""
    return Child(
        "-P", "-c", FIRST, str(os.getpid()), str(address_space_bytes), module
    )  # -P: not from the working folder


def _read_line(process: subprocess.Popen[bytes], timeout_s: float) -> bytes:
    """Return the next line of stdout, or a part of it where the process ended."""
    assert process.stdout is not None
    end_s, line = time.monotonic() + timeout_s, b""
    poll = select.poll()
    poll.register(process.stdout, select.POLLIN)
    while not line.endswith(b"\n"):
        if not poll.poll(max(0, end_s - time.monotonic()) * 1000):
            process.kill()
            process.wait()
            raise ChildError("timeout", f"not done after {timeout_s:.0f} s, the limit of --timeout")
        piece = os.read(process.stdout.fileno(), 1 << 16)
        if not piece:
            break
        line += piece
    return line


def _cause_of_death(code: int) -> ChildError:
    if code == NOT_INSTALLED:
        raise RuntimeError(f"{sys.executable} of {socket.gethostname()} cannot import photon_pipelines")
    if code == -signal.SIGKILL:
        reason = "was killed, most likely for lack of memory; fewer --workers leave more for each"
    elif code < 0:
        reason = f"crashed with {signal.Signals(-code).name} while reading or resampling it"
    else:
        reason = f"ended with exit code {code}"
    return ChildError("killed" if code == -signal.SIGKILL else "crashed", f"its process {reason}")


_children: dict[tuple[str, int], Child] = {}  # by run and thread
_ended: set[str] = set()  # runs


def run_isolated(
    job: dict[str, Any],
    timeout_s: float,
    address_space_bytes: int,
    run: str = "",
    *,
    module: str,
    holder: str = "",
) -> dict[str, Any]:
    """Return the reply to a job, both as JSON: the `main` of a module makes it, in the child process of this thread.

    This is what Dask workers run: plain data in, plain data out, {OUT_FULL: ...}, {DIED: ...} or {UNABLE: ...} where
    there is no reply. `holder` is the token of the run that holds the output. The children of a run end with it: see
    `end_children`. The objects of a URL are fetched here, and are gone afterwards: the child reads local files.
    """
    if run in _ended:
        return {UNABLE: "the run has ended"}
    start_s = time.perf_counter()
    child = _children.setdefault((run, threading.get_ident()), child_of(module, address_space_bytes))
    try:
        of_url = is_url((job.get("source") or {}).get("root") or "")
        with files_at_hand(job, lambda: run not in _ended) if of_url else nullcontext(job) as job:
            if run in _ended:  # while they were fetched
                return {UNABLE: "the run has ended"}
            return child.ask({**job, "holder": holder} if holder else job, timeout_s)
    except (ChildError, NotFetched) as error:
        return {DIED: [error.code, error.message, round(time.perf_counter() - start_s, 3)]}
    except Exception as error:  # no process can be started, say
        return {UNABLE: f"{type(error).__name__}: {error}"}


def end_children(run: str) -> None:
    """Kill the children that work for a run in this process, and let it start no others."""
    _ended.add(run)
    for key in [key for key in list(_children) if key[0] == run]:  # other threads add theirs
        _children.pop(key).kill()


# The child's end


def main(address_space_bytes: int, work: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Answer jobs by `work` until stdin ends or the parent is gone; `address_space_bytes` > 0 limits this process."""
    if address_space_bytes > 0 and sys.platform == "linux":  # macOS has the limit, and refuses to set it
        _, most = resource.getrlimit(resource.RLIMIT_AS)  # of the shell or the batch system; nobody may raise it
        limit = address_space_bytes if most == resource.RLIM_INFINITY else min(address_space_bytes, most)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a C library prints must not look like a reply
    single_threaded()
    poll = select.poll()
    poll.register(sys.stdin.fileno(), select.POLLIN)
    # The other end writes one line at a time: none waits in a buffer here.
    while poll.poll(IDLE_S * 1000):
        if not (line := sys.stdin.readline()):
            return
        try:
            reply = work(json.loads(line))
        except NoSpace as error:
            reply = {OUT_FULL: [error.errno, error.strerror]}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()
    os._exit(IDLE)


def _end_with_stdin() -> None:
    """End this process as soon as the other end of its stdin is closed: by a parent that ended, also without Linux."""
    poll = select.poll()
    poll.register(sys.stdin.fileno(), 0)  # nothing but the end
    poll.poll()
    os._exit(1)


def single_threaded() -> None:
    """Use one core per job: parallelism comes from jobs, and bytes must not depend on the number of threads."""
    import numcodecs.blosc
    import numpy.ma  # noqa: F401  (else at the first percentile, amid buffers, where it splits free memory: 25 MB)
    import zarr

    os.environ["ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"] = "1"  # its import costs 90 MB, and few scans need it
    numcodecs.blosc.set_nthreads(1)
    zarr.config.set({"threading.max_workers": 1, "async.concurrency": 1})
