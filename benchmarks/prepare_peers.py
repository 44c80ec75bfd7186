"""One scan, raw to store: ours and what people write with MONAI, TorchIO and SimpleITK, each in a fresh process.

python benchmarks/prepare_peers.py [--repeats 5] [--oblique | --dicom]
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from fresh import Case, Run, medians
from scan import test_scan, test_series
from tables import print_place, print_table

from photon_pipelines.child import ENVIRONMENT

FLOOR, OURS = "floor: decompress, one output pass, write 40 MB", "photon-data"
CASES = {
    FLOOR: ("floor:prepare", {}),
    OURS: ("with_photon:prepare", ENVIRONMENT),
    "SimpleITK, three passes": ("with_simpleitk:prepare", {}),
    "TorchIO": ("with_torchio:prepare", {}),
    "MONAI, lazy": ("with_monai:prepare_lazily", {}),
    "MONAI": ("with_monai:prepare", {}),
}
# Of the scan as a DICOM series.
DICOM_CASES = {
    OURS: ("with_photon:prepare_folder", ENVIRONMENT),
    "SimpleITK's series reader, three passes": ("with_simpleitk:prepare_series", {}),
    "dcm2niix -z y, then photon-data": ("with_photon:prepare_converted", ENVIRONMENT),
}
HEADER = ("pipeline", "wall s", "CPU s", "peak MB", "CPU, ours = 1", "import s")
LIBRARIES = ("numpy", "isal", "zarr", "SimpleITK", "torchio", "monai", "torch")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--oblique", action="store_true", help="the scan in an oblique frame")
    parser.add_argument("--dicom", action="store_true", help="the scan as a DICOM series of 350 slices")
    options = parser.parse_args()
    scan = str(test_series() if options.dicom else test_scan(options.oblique))
    chosen = DICOM_CASES if options.dicom else CASES
    with tempfile.TemporaryDirectory() as folder:
        cases = [
            Case(name, function, (scan, str(Path(folder, function.replace(":", "-")))), environment)
            for name, (function, environment) in chosen.items()
        ]
        print_results(medians(cases, options.repeats), chosen)


def print_results(results: Mapping[str, Run | str], cases: Iterable[str]) -> None:
    """Print the table, what could not be measured, and our share of the floor."""
    runs = {name: run for name in cases if isinstance(run := results[name], Run)}
    ours = runs[OURS]
    print_place(*LIBRARIES)
    print_table(
        HEADER,
        [
            (
                name,
                f"{r.wall_s:.2f}",
                f"{r.cpu_s:.2f}",
                f"{r.peak_mb:.0f}",
                f"{r.cpu_s / ours.cpu_s:.1f}",
                f"{r.import_s:.1f}",
            )
            for name, r in runs.items()
        ],
    )
    for name, reason in results.items():
        if isinstance(reason, str):
            print(f"{name}: {reason}")
    if FLOOR in runs:
        print(f"Of our CPU time {runs[FLOOR].cpu_s / ours.cpu_s:.0%} is the floor's.")


if __name__ == "__main__":
    main()
