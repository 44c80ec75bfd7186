"""One function in a fresh process: its time, CPU time (all threads) and the peak memory of that process. Linux only.

It runs twice and the second run counts: a worker prepares many scans, and the first pays for pages the kernel has yet
to give.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple


class Run(NamedTuple):
    """What one run took. Importing the module is not part of wall and CPU time; the memory it takes is part of the
    peak.
    """

    import_s: float
    wall_s: float
    cpu_s: float
    peak_mb: float


class Case(NamedTuple):
    """A function to measure, `module:function`, called with strings, the last of which is where it writes.

    `environment` is added to the process's own.
    """

    name: str
    function: str
    arguments: tuple[str, ...]
    environment: Mapping[str, str] = {}


class NotThereError(RuntimeError):
    """A library that a case needs is not installed."""


def medians(cases: Sequence[Case], repeats: int) -> dict[str, Run | str]:
    """Return the median of each case, or a sentence why there is none; cases are interleaved, so that all meet the same
    noise.
    """
    runs: dict[str, list[Run]] = {case.name: [] for case in cases}
    missing: dict[str, Run | str] = {}
    for _ in range(repeats):
        for case in cases:
            if case.name not in missing:
                try:
                    runs[case.name].append(run(case))
                except NotThereError as error:
                    missing[case.name] = str(error)
    return missing | {name: Run(*map(median, zip(*r, strict=True))) for name, r in runs.items() if r}


def run(case: Case) -> Run:
    """Return what one run of a case took; NotThereError where a library is missing."""
    command = [sys.executable, __file__, case.function, *case.arguments]
    done = subprocess.run(command, env={**os.environ, **case.environment}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{case.name} failed:\n{done.stderr}")
    answer = json.loads(done.stdout.splitlines()[-1])
    if isinstance(answer, str):
        raise NotThereError(answer)
    return Run(*answer)


def _measure(function: str, *arguments: str) -> list[Any] | str:
    module, _, name = function.partition(":")
    start = time.perf_counter()
    try:
        work = getattr(importlib.import_module(module), name)
        import_s = time.perf_counter() - start
        work(*arguments[:-1], f"{arguments[-1]}.first")
    except ModuleNotFoundError as error:
        return f"{error.name} is not installed (benchmarks/requirements.txt)"
    start, cpu = time.perf_counter(), _cpu_s()
    work(*arguments)
    return [import_s, time.perf_counter() - start, _cpu_s() - cpu, _peak_mb()]


def _cpu_s() -> float:
    """Return the CPU seconds of this process and of the programs that it ran."""
    return sum(os.times()[:4])


def _peak_mb() -> float:
    """Return the highest resident set of this process since it began (not of its parent, as ru_maxrss may be)."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


if __name__ == "__main__":
    print(json.dumps(_measure(*sys.argv[1:])))
