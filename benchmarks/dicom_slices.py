"""A DICOM series from its folder to voxels in memory, CPU time per slice: ours, step by step, and GDCM's series reader.

GDCM's reader is SimpleITK's: it sorts the files of the folder, and reads them. Ours is the search, the opening (which
takes the headers that the search kept), the planes, and the hash by which a scan is known again.

python benchmarks/dicom_slices.py [--repeats 5]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import SimpleITK as sitk
from numcodecs import blosc
from scan import test_series
from tables import print_place, print_table

from photon_data.files import fingerprint
from photon_data.readers import open_scan
from photon_data.readers.find import find_scans

# Syntax -> slices: the compressed ones take long to make.
SERIES = {"explicit": 350, "rle": 20, "jpeg-lossless": 20, "jpeg2000": 20}
STEPS = ("search", "search again", "open", "planes", "hash", "GDCM")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    blosc.set_nthreads(1)
    print_place("pydicom", "SimpleITK", "numpy")
    rows = []
    for syntax, slices in SERIES.items():
        folder = test_series(syntax, slices)
        runs = [measured(folder) for _ in range(options.repeats + 1)][1:]
        ms = {step: 1e3 / slices * median(run[step] for run in runs) for step in STEPS}
        ours = ms["search"] + ms["open"] + ms["planes"] + ms["hash"]
        rows.append((syntax, *(f"{ms[step]:.2f}" for step in STEPS), f"{ours / ms['GDCM']:.2f}"))
    print_table(("ms of CPU per slice", *STEPS, "ours / GDCM"), rows)


def measured(folder: Path) -> dict[str, float]:
    """Return the CPU seconds of each step."""
    seconds: dict[str, float] = {}

    def take(step: str, do: Callable[[], Any]) -> Any:
        start = time.process_time()
        result = do()
        seconds[step] = time.process_time() - start
        return result

    with tempfile.TemporaryDirectory() as private:
        kept = str(Path(private, "kept"))
        take("search", lambda: find_scans(folder, headers=kept))
        (source,) = take("search again", lambda: find_scans(folder, headers=kept)).sources
        scan = take("open", lambda: open_scan(source))
        take("planes", lambda: sum(1 for _ in scan.planes()))
        take("hash", lambda: fingerprint(source.files))
    take("GDCM", lambda: by_gdcm(str(folder)))
    return seconds


def by_gdcm(folder: str) -> sitk.Image:
    """Return the series as SimpleITK's users read it."""
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(folder))
    return reader.Execute()


if __name__ == "__main__":
    main()
