"""Both ends of the isolated process in which scans are read: one job a line on stdin, one record a line on stdout.

A parser that crashes, hangs or takes all memory costs one file: its record says so, and a new child goes on.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from photon_data.prepare_file import Job, NoSpace, prepare_file
from photon_data.records import FAILED

# Without these, glibc returns every large buffer to the kernel and faults it in again: 1.8 s instead of 1.0 s per scan.
ENVIRONMENT = {
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_ARENA_MAX": "2",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
NO_SPACE = "no space"  # key of the reply of a child that found the output full
PR_SET_PDEATHSIG = 1  # prctl(2): the kernel signals the child even while SimpleITK holds the interpreter for seconds


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
    if code == -signal.SIGKILL:
        reason = "was killed, most likely for lack of memory; fewer --workers leave more for each"
    elif code < 0:
        reason = f"crashed with {signal.Signals(-code).name} while reading or resampling it"
    else:
        reason = f"ended with exit code {code}"
    return ChildError("killed" if code == -signal.SIGKILL else "crashed", f"its process {reason}")


_children: dict[tuple[int, int], Child] = {}  # by thread and limit
_ended = threading.Event()


def run_isolated(job: dict[str, Any], timeout_s: float, address_space_bytes: int) -> dict[str, Any]:
    """Return the record of a job, both as JSON: the job is run in the child process of this thread.

    This is the task that Dask workers run: plain data in, plain data out. Raises NoSpace when the output is full.
    """
    if _ended.is_set():
        raise RuntimeError("the run has ended")
    command = ("-P", "-m", "photon_pipelines.child", str(address_space_bytes))  # -P: no imports from the working folder
    child = _children.setdefault((threading.get_ident(), address_space_bytes), Child(*command))
    try:
        reply = child.ask(job, timeout_s)
    except ChildError as error:
        return vars(Job.from_json(job).record(FAILED, code=error.code, reason=str(error)))
    if NO_SPACE in reply:
        raise NoSpace(*reply[NO_SPACE])
    return reply


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
    return vars(prepare_file(Job.from_json(job)))


def main(address_space_bytes: int, work: Callable[[dict[str, Any]], dict[str, Any]] = prepare_job) -> None:
    """Answer jobs by `work` until stdin ends or the parent is gone; `address_space_bytes` > 0 limits this process."""
    if address_space_bytes > 0 and sys.platform == "linux":  # macOS has the limit, and refuses to set it
        resource.setrlimit(resource.RLIMIT_AS, (address_space_bytes, address_space_bytes))
    _die_with_parent()
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a C library prints must not look like a reply
    single_threaded()
    for line in sys.stdin:
        try:
            reply = work(json.loads(line))
        except NoSpace as error:
            reply = {NO_SPACE: [error.errno, error.strerror]}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def _die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends. Without Linux, a thread looks every second."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

    def poll_parent(parent: int) -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=poll_parent, args=(os.getppid(),), daemon=True).start()


def single_threaded() -> None:
    """Use one core per job: parallelism comes from jobs, and bytes must not depend on the number of threads."""
    import numcodecs.blosc
    import SimpleITK as sitk
    import zarr

    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    numcodecs.blosc.set_nthreads(1)
    zarr.config.set({"threading.max_workers": 1, "async.concurrency": 1})


if __name__ == "__main__":
    main(int(sys.argv[1]))
