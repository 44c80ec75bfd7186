"""Runs jobs in a child process per thread, so that a crash, a hang or lack of memory becomes the record of one file.

The process in which scans are really read: one job a line on stdin, one record a line on stdout.

It exists so that a parser that crashes, hangs or eats all memory costs one file. `isolate.py` is its other end.
"""

from __future__ import annotations

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
from typing import Any

from photon_data.prepare_file import Job, NoSpace, prepare_file
from photon_data.records import FAILED

# glibc gives every large buffer back to the kernel and faults it in again, unless told not to: 1.8 s instead of 1.0 s per scan.
ENVIRONMENT = {
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_ARENA_MAX": "2",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}


class ChildError(RuntimeError):
    """The child did not answer; the code says how it ended: "crashed", "killed" or "timeout"."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Child:
    """A process that answers a line of JSON with a line of JSON; started when first asked, and again after it died."""

    def __init__(self, *command: str) -> None:
        self.command = command
        self.process: subprocess.Popen[bytes] | None = None

    def ask(self, job: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        """Return the child's reply; ChildError when it dies or takes longer than `timeout_s`, and the next ask starts anew."""
        process = self._running()
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(job).encode() + b"\n")
            process.stdin.flush()
            line = self._read_line(process, timeout_s)
        except BrokenPipeError:
            line = b""
        if not line.endswith(b"\n"):
            raise self._autopsy(process)
        return json.loads(line)

    def kill(self) -> None:
        """End the child at once; safe at any time, from any thread."""
        if self.process is not None:
            self.process.kill()

    def _running(self) -> subprocess.Popen[bytes]:
        if self.process is None or self.process.poll() is not None:
            self.process = subprocess.Popen(
                [sys.executable, *self.command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, **ENVIRONMENT},
                start_new_session=True,  # Ctrl-C in the terminal is for the parent to handle
            )
        return self.process

    def _read_line(self, process: subprocess.Popen[bytes], timeout_s: float) -> bytes:
        assert process.stdout is not None
        end, line = time.monotonic() + timeout_s, b""
        poll = select.poll()
        poll.register(process.stdout, select.POLLIN)
        while not line.endswith(b"\n"):
            if not poll.poll(max(0, end - time.monotonic()) * 1000):
                process.kill()
                process.wait()
                raise ChildError("timeout", f"not done after {timeout_s:.0f} s, the limit of --timeout")
            piece = os.read(process.stdout.fileno(), 1 << 16)
            if not piece:
                break
            line += piece
        return line

    def _autopsy(self, process: subprocess.Popen[bytes]) -> ChildError:
        code = process.wait()
        if code == -signal.SIGKILL:
            return ChildError(
                "killed", "its process was killed, most likely for lack of memory; fewer --workers leave more for each"
            )
        if code < 0:
            return ChildError("crashed", f"its process crashed with {signal.Signals(-code).name} while reading or resampling it")
        return ChildError("crashed", f"its process ended with exit code {code}")


_children: dict[tuple[int, int], Child] = {}
_ended = threading.Event()


def run_isolated(job: dict[str, Any], timeout_s: float, address_space_bytes: int) -> dict[str, Any]:
    """Return the record of a job, run in this thread's child process, or {NO_SPACE: why} if the output is full; all as JSON.

    This is the task that Dask workers run: plain data in, plain data out.
    """
    if _ended.is_set():
        raise RuntimeError("the run has ended")
    command = ("-P", "-m", "photon_pipelines.child", str(address_space_bytes))  # -P: no imports from the working folder
    child = _children.setdefault((threading.get_ident(), address_space_bytes), Child(*command))
    try:
        return child.ask(job, timeout_s)
    except ChildError as error:
        return Job.from_json(job).record(FAILED, code=error.code, reason=str(error)).to_json()


def allow_children() -> None:
    """Let jobs start children in this process (again)."""
    _ended.clear()


def end_children() -> None:
    """Kill every child of this process at once, and let queued jobs start none."""
    _ended.set()
    while _children:
        _children.popitem()[1].kill()


NO_SPACE = "no space"
# prctl(2): SimpleITK may hold the interpreter for seconds, the kernel does not wait for it.
PR_SET_PDEATHSIG = 1


def main(address_space_bytes: int) -> None:
    """Answer jobs until stdin ends or the parent is gone; `address_space_bytes` > 0 limits this process."""
    if address_space_bytes > 0:
        resource.setrlimit(resource.RLIMIT_AS, (address_space_bytes, address_space_bytes))
    _die_with_parent()
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a C library prints must not look like a reply
    single_threaded()
    for line in sys.stdin:
        replies.write(json.dumps(_answer(line)) + "\n")
        replies.flush()


def _answer(line: str) -> dict[str, Any]:
    try:
        return prepare_file(Job.from_json(json.loads(line))).to_json()
    except NoSpace as error:
        return {NO_SPACE: error.strerror}


def _die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends; without Linux a thread looks every second."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    threading.Thread(target=_watch, args=(os.getppid(),), daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def single_threaded() -> None:
    """One core per job: parallelism comes from jobs, and bytes must not depend on the number of threads."""
    import numcodecs.blosc
    import SimpleITK as sitk
    import zarr

    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    numcodecs.blosc.set_nthreads(1)
    zarr.config.set({"threading.max_workers": 1, "async.concurrency": 1})


if __name__ == "__main__":
    main(int(sys.argv[1]))
