"""Seconds and memory from 3D-RAD's number of questions to ms-swift manifests: 170,105 questions on 16,222 volumes, made
here.

    python benchmarks/questions_to_manifests.py [--folder FOLDER]

Scans are placeholders (nothing is prepared); tables have the size, columns and spread of the published ones, CT-RATE's
metadata of all 50,188 volumes among them. What is timed: finding the volumes, reading metadata and questions, joining
them, the leak check, building the rows, checking and writing them, counting.
"""

from __future__ import annotations

import argparse
import csv
import resource
import tempfile
import time
from pathlib import Path

from photon_data.datasets.ct_rate import COLUMNS
from photon_data.datasets.declare import read_data_manifest
from photon_data.datasets.rad3d import COLUMNS as QUESTION_COLUMNS
from photon_data.files import Location
from photon_data.questions.manifest import build, write
from photon_data.questions.splits import count, leaks, refuse_leaks
from photon_data.records import PREPARED, VolumeRecord, store_name
from photon_pipelines.plan import gather
from photon_pipelines.request import Request, one_recipe

# split -> (prefix in CT-RATE, volumes, questions)
SIZES = {"train": ("train", 13_526, 136_195), "test": ("valid", 2_696, 33_910)}
ALL_VOLUMES = {"train": 47_149, "test": 3_039}
CHOICES = [
    "Refractory Lesion (Persistent or recurrent, now present)",
    "Resolved Lesion",
    "New Lesion",
    "No Abnormality",
]


def make(folder: Path) -> Path:
    """Write placeholder scans, metadata and 92 csv files; return the data_manifest.yaml that declares them."""
    for split, (prefix, volumes, questions) in SIZES.items():
        with (folder / f"{prefix}_metadata.csv").open("w", newline="") as file:
            csv.writer(file).writerow([*COLUMNS, *(f"Other{i}" for i in range(32))])
            for i in range(ALL_VOLUMES[split]):
                csv.writer(file).writerow([f"{_name(prefix, i)}.nii.gz", *_METADATA, *["something"] * 32])
        for i in range(volumes):
            name = _name(prefix, i)
            patient, scan = name.rsplit("_", 2)[0], name.rsplit("_", 1)[0]
            path = folder / "dataset" / f"{prefix}_fixed" / patient / scan / f"{name}.nii.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"placeholder")
        _write_questions(folder, split, volumes, questions)
    path = folder / "data_manifest.yaml"
    path.write_text(
        "out: out\ndatasets:\n  3d-rad:\n    adapter: 3d-rad\n    root: dataset\n    annotations:\n"
        "      questions: 3DRAD\n"
        "      metadata: [train_metadata.csv, valid_metadata.csv]\n"
    )
    return path


_METADATA = [
    "B",
    "HFS",
    "[-166, 9, 56.3]",
    "[1, 0, 0, 0, 1, 0]",
    512,
    512,
    "[0.68359375, 0.68359375]",
    1.5,
    251,
    1,
    -1024,
]


def _name(prefix: str, i: int) -> str:
    return f"{prefix}_{i // 2 + 1}_a_{i % 2 + 1}"


def _write_questions(folder: Path, split: str, volumes: int, questions: int) -> None:
    per_file = questions // 46 + 1
    for number in range(46):
        path = folder / "3DRAD" / split / "Task5_Static_Temporal_Diagnosis" / f"finding {number}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(QUESTION_COLUMNS)
            for i in range(number * per_file, min((number + 1) * per_file, questions)):
                name = f"{_name(split, i % volumes)}.nii.gz"
                text = f"How would you classify finding {number} observed in the current CT scan ({i % 7})?"
                writer.writerow([5, number, name, text, CHOICES[i % 4], "Close", "ABCD"[i % 4], *CHOICES])


def measure(path: Path) -> str:
    """Return how long it took from the declared tables to manifests on disk."""
    start, cpu = time.perf_counter(), time.process_time()
    manifest = read_data_manifest(path)
    out = Location(str(path.parent / "out"))
    data = gather(Request(path, out, one_recipe(manifest.datasets), datasets=manifest.datasets))
    gathered = time.perf_counter() - start
    records = [
        VolumeRecord(job.source.id, job.source.path, PREPARED, 1, 1, store=store_name(job.source.id))
        for job in data.jobs
    ]
    asked = [question for own in data.questions.values() for question in own]
    manifests = build(asked, records, out=out.at(""), instruction="")
    refuse_leaks(leaks(row for rows in manifests.rows.values() for row in rows))
    write(manifests, out.at(""))
    counts = count(row for rows in manifests.rows.values() for row in rows)
    rows, volumes = sum(c.questions for c in counts), len(records)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    gigabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    took = f"{seconds:.1f} s ({gathered:.1f} s of it to gather; {cpu:.1f} s of CPU)"
    return f"{rows:,} rows on {volumes:,} volumes: {took}, peak {gigabytes:.2f} GB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path)
    folder = parser.parse_args().folder
    with tempfile.TemporaryDirectory() as temporary:
        where = folder or Path(temporary)
        path = where / "data_manifest.yaml"
        print(measure(path if path.exists() else make(where)))


if __name__ == "__main__":
    main()
