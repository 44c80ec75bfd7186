"""Both ends of the isolated process in which scans are read: one job a line on stdin, one record a line on stdout.

A parser that crashes, hangs or takes all memory costs one file: its record says so, and a new child goes on.
"""

from __future__ import annotations

import contextlib
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
from collections.abc import Callable, Iterator
from typing import Any

from photon_data.prepare_file import Job, prepare_file
from photon_data.prepare_masks import MaskJob, prepare_masks
from photon_data.records import FAILED, OUT_FULL, UNABLE, NoSpace, record_of

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
# that is no longer the parent.
FIRST = """
import ctypes, os, signal, sys
parent, address_space_bytes, module = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
if os.getppid() != parent:
    os._exit(1)
try:
    from importlib import import_module
    main = import_module(module).main
except ImportError:
    os._exit(78)
main(address_space_bytes)
"""
NOT_INSTALLED = 78  # as above; EX_CONFIG of sysexits.h


# The parent's end


class ChildError(RuntimeError):
    """The child did not answer. The code says how it ended: "crashed", "killed" or "timeout"."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Child:
    """A process that answers a line of JSON with a line of JSON. It starts at the first job, and after it died."""

    def __init__(self, *command: str) -> None:
        self.command = command
        self.process: subprocess.Popen[bytes] | None = None

    def ask(self, job: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        """Return the child's reply; ChildError when it dies or takes longer than `timeout_s`."""
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
            line = _read_line(process, timeout_s)
        except BrokenPipeError:
            line = b""
        if not line.endswith(b"\n"):
            raise _cause_of_death(process.wait())
        return json.loads(line)

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


_children: dict[tuple[int, int], Child] = {}  # by thread and limit
_ended = threading.Event()


def run_isolated(job: dict[str, Any], timeout_s: float, address_space_bytes: int, holder: str = "") -> dict[str, Any]:
    """Return the record of a job, both as JSON: the job is run in the child process of this thread.

    This is the task that Dask workers run: plain data in, plain data out, {OUT_FULL: ...} or {UNABLE: ...} where there
    is no record. `holder` is the token of the run that holds the output.
    """
    if _ended.is_set():
        return {UNABLE: "the run has ended"}
    child = _children.setdefault((threading.get_ident(), address_space_bytes), child_of(__name__, address_space_bytes))
    try:
        reply = child.ask({**job, "holder": holder}, timeout_s)
    except ChildError as error:
        return record_of(_work_of(job), FAILED, code=error.code, reason=str(error)).to_json()
    except Exception as error:  # no process can be started, say
        return {UNABLE: f"{type(error).__name__}: {error}"}
    return reply


def _work_of(job: dict[str, Any]) -> Job | MaskJob:
    return MaskJob.from_json(job) if "masks" in job else Job.from_json(job)


@contextlib.contextmanager
def children() -> Iterator[None]:
    """Let jobs start children in this process while the block runs. At its end every child is killed at once."""
    _ended.clear()
    try:
        yield
    finally:
        _ended.set()
        while _children:
            _children.popitem()[1].kill()


# The child's end


def prepare_job(job: dict[str, Any]) -> dict[str, Any]:
    """Return the record of a job, both as JSON."""
    work = _work_of(job)
    return (prepare_masks(work) if isinstance(work, MaskJob) else prepare_file(work)).to_json()


def main(address_space_bytes: int, work: Callable[[dict[str, Any]], dict[str, Any]] = prepare_job) -> None:
    """Answer jobs by `work` until stdin ends or the parent is gone; `address_space_bytes` > 0 limits this process."""
    if address_space_bytes > 0 and sys.platform == "linux":  # macOS has the limit, and refuses to set it
        resource.setrlimit(resource.RLIMIT_AS, (address_space_bytes, address_space_bytes))
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a C library prints must not look like a reply
    single_threaded()
    for line in sys.stdin:
        try:
            reply = work(json.loads(line))
        except NoSpace as error:
            reply = {OUT_FULL: [error.errno, error.strerror]}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def _end_with_stdin() -> None:
    """End this process as soon as the other end of its stdin is closed: by a parent that ended, also without Linux."""
    poll = select.poll()
    poll.register(sys.stdin.fileno(), 0)  # nothing but the end
    poll.poll()
    os._exit(1)


def single_threaded() -> None:
    """Use one core per job: parallelism comes from jobs, and bytes must not depend on the number of threads."""
    import numcodecs.blosc
    import zarr

    os.environ["ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"] = "1"  # its import costs 90 MB, and few scans need it
    numcodecs.blosc.set_nthreads(1)
    zarr.config.set({"threading.max_workers": 1, "async.concurrency": 1})
