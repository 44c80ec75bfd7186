"""Volumes per minute of the whole `photon-data prepare` with 1 and 2 workers, against the bare function in one process.

Every way is run on few and on many scans: the difference is what a volume costs, what is left is start-up (and, for the
command, finding files, manifests and the report).

python benchmarks/prepare_scaling.py [--repeats 2] [--few 3] [--many 11]
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median

from fresh import Case, run
from scan import test_scans
from tables import print_place, print_table

from photon_pipelines.isolate import ENVIRONMENT

BARE, ONE, TWO = "bare function, one process", "photon-data prepare --workers 1", "photon-data prepare --workers 2"
HEADER = ("how", "start-up s", "s per volume", "volumes per minute", "per volume, bare = 1")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--few", type=int, default=3)
    parser.add_argument("--many", type=int, default=11)
    options = parser.parse_args()
    ways: dict[str, Callable[[Path, Path], float]] = {BARE: bare, ONE: command(1), TWO: command(2)}
    counts = (options.few, options.many)
    folders = {count: test_scans(count) for count in counts}
    seconds: dict[tuple[str, int], list[float]] = {(way, count): [] for way in ways for count in counts}
    for _ in range(options.repeats):
        for (way, count), measured in seconds.items():
            measured.append(_timed(ways[way], folders[count]))
    print_results({key: median(measured) for key, measured in seconds.items()}, *counts)


def bare(scans: Path, out: Path) -> float:
    """Return the seconds that the function needs for all scans in one process, imports left out."""
    return run(Case(BARE, "with_photon:prepare_folder", (str(scans), str(out)), ENVIRONMENT)).wall_s


def command(workers: int) -> Callable[[Path, Path], float]:
    """Return a function that returns the seconds of the whole command, from start to exit."""

    def measure(scans: Path, out: Path) -> float:
        start = time.perf_counter()
        call = [sys.executable, "-m", "photon_cli.data", "prepare", str(scans), str(out), "--workers", str(workers)]
        subprocess.run(call, check=True, capture_output=True)
        return time.perf_counter() - start

    return measure


def print_results(seconds: Mapping[tuple[str, int], float], few: int, many: int) -> None:
    """Print the table of start-up and of cost per volume."""
    per_volume = {way: (seconds[way, many] - seconds[way, few]) / (many - few) for way in (BARE, ONE, TWO)}
    print_place("zarr", "isal", "dask")
    print_table(
        HEADER,
        [
            (way, f"{seconds[way, few] - few * each:.1f}", f"{each:.2f}", f"{60 / each:.0f}", f"{each / per_volume[BARE]:.2f}")
            for way, each in per_volume.items()
        ],
    )
    print(f"Overhead of the pipeline per volume: {per_volume[ONE] / per_volume[BARE] - 1:.0%} (1 worker).")
    print(f"Two workers are {per_volume[ONE] / per_volume[TWO]:.2f} times as fast as one.")


def _timed(way: Callable[[Path, Path], float], scans: Path) -> float:
    out = Path(tempfile.mkdtemp())
    try:
        return way(scans, out)
    finally:
        shutil.rmtree(out)


if __name__ == "__main__":
    main()
