"""One scan, raw to store: ours and what people write with MONAI, TorchIO and SimpleITK, each in a fresh process.

python benchmarks/prepare_peers.py [--repeats 5] [--oblique]
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from pathlib import Path

from fresh import Case, Run, medians
from scan import test_scan
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
HEADER = ("pipeline", "wall s", "CPU s", "peak MB", "CPU, ours = 1", "import s")
LIBRARIES = ("numpy", "isal", "zarr", "SimpleITK", "torchio", "monai", "torch")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--oblique", action="store_true", help="the scan in an oblique frame")
    options = parser.parse_args()
    scan = str(test_scan(options.oblique))
    with tempfile.TemporaryDirectory() as folder:
        cases = [
            Case(name, function, (scan, str(Path(folder, function.replace(":", "-")))), environment)
            for name, (function, environment) in CASES.items()
        ]
        print_results(medians(cases, options.repeats))


def print_results(results: Mapping[str, Run | str]) -> None:
    """Print the table, what could not be measured, and our share of the floor."""
    runs = {name: run for name in CASES if isinstance(run := results[name], Run)}
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
    print(f"Of our CPU time {runs[FLOOR].cpu_s / ours.cpu_s:.0%} is the floor's.")


if __name__ == "__main__":
    main()
