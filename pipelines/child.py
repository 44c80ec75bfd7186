"""The process in which scans are really read: one job a line on stdin, one record a line on stdout.

It exists so that a parser that crashes, hangs or eats all memory costs one file. `isolate.py` is its other end.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
import threading
import time
from typing import Any

from photon_data.job import Job, NoSpace, run

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
        return run(Job.from_json(json.loads(line))).to_json()
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
