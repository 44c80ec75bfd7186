"""Volumes per minute of the whole `photon-data prepare` with 1 and 2 workers, against the bare function in one process.

Every way is run on few and on many scans: the difference is what a volume costs, what is left is start-up (and, for the
command, finding files, manifests and the report). On a machine that others use too, the seconds of different runs
differ more than the pipeline costs; so its overhead is taken within one run: seconds per volume against those that
volumes.jsonl records for the function itself. The report has no pictures: it draws 48 volumes at most, whose 30 to 40
ms each would count as the cost of every volume.

python benchmarks/prepare_scaling.py [--repeats 2] [--few 3] [--many 11]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import NamedTuple

from fresh import Case, run
from scan import test_scans
from tables import print_place, print_table

from photon_pipelines.child import ENVIRONMENT

BARE, ONE, TWO = "bare function, one process", "photon-data prepare --workers 1", "photon-data prepare --workers 2"
WORKERS = {BARE: 1, ONE: 1, TWO: 2}
HEADER = ("how", "start-up s", "s per volume", "volumes per minute", "s in the function", "overhead per volume")


class Took(NamedTuple):
    """Seconds of a run, and of them those spent in the function, summed over the volumes (and so over the workers)."""

    wall_s: float
    inside_s: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--few", type=int, default=3)
    parser.add_argument("--many", type=int, default=11)
    options = parser.parse_args()
    ways: dict[str, Callable[[Path, Path], Took]] = {BARE: bare, ONE: command(1), TWO: command(2)}
    counts = (options.few, options.many)
    folders = {count: test_scans(count) for count in counts}
    took: dict[tuple[str, int], list[Took]] = {(way, count): [] for way in ways for count in counts}
    for _ in range(options.repeats):
        for (way, count), measured in took.items():
            measured.append(_timed(ways[way], folders[count]))
    print_results({key: Took(*map(median, zip(*runs, strict=True))) for key, runs in took.items()}, *counts)


def bare(scans: Path, out: Path) -> Took:
    """Return what the function takes for all scans in one process, imports left out."""
    wall_s = run(Case(BARE, "with_photon:prepare_folder", (str(scans), str(out)), ENVIRONMENT)).wall_s
    return Took(wall_s, wall_s)


def command(workers: int) -> Callable[[Path, Path], Took]:
    """Return a function that returns what the whole command takes, from start to exit."""

    def measure(scans: Path, out: Path) -> Took:
        start = time.perf_counter()
        call = [sys.executable, "-m", "photon_cli.data", "prepare", str(scans), str(out), "--workers", str(workers)]
        subprocess.run([*call, "--pictures", "0"], check=True, capture_output=True)
        wall_s = time.perf_counter() - start
        rows = [json.loads(line) for line in (out / "volumes.jsonl").read_text().splitlines()]
        return Took(wall_s, sum(row["seconds"] for row in rows))

    return measure


def print_results(took: Mapping[tuple[str, int], Took], few: int, many: int) -> None:
    """Print the table of start-up and of cost per volume."""
    print_place("zarr", "isal", "dask")
    print_table(
        HEADER, [_row(way, workers, took[way, few], took[way, many], few, many) for way, workers in WORKERS.items()]
    )


def _row(way: str, workers: int, less: Took, more: Took, few: int, many: int) -> tuple[str, ...]:
    each_s, inside_s = ((b - a) / (many - few) for a, b in zip(less, more, strict=True))
    start_s, overhead = less.wall_s - few * each_s, each_s * workers / inside_s - 1
    return way, f"{start_s:.1f}", f"{each_s:.2f}", f"{60 / each_s:.0f}", f"{inside_s:.2f}", f"{overhead:.0%}"


def _timed(way: Callable[[Path, Path], Took], scans: Path) -> Took:
    with tempfile.TemporaryDirectory() as folder:
        return way(scans, Path(folder, "out"))


if __name__ == "__main__":
    main()
