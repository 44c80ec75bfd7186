"""What 3D-RAD's csv files give to someone who never sees a scan: every task's score of the best constant and of text
rules.

python benchmarks/blind_3d_rad.py 3DRAD [--split test] [--train]

With --train constants are chosen on the training files, else on the very files they are scored on.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from photon_cli.eval import print_evaluation
from photon_data.datasets.rad3d import read_subtask
from photon_data.questions.manifest import build
from photon_data.questions.question import with_made_ids
from photon_data.records import PREPARED, VolumeRecord
from photon_train.evaluation.evaluate import evaluate


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """Return the manifest's rows of all csv files of one split, volumes or not."""
    questions = with_made_ids(
        [question for file in sorted(folder.glob("Task*/*.csv")) for question in read_subtask(file)]
    )
    names = sorted({question.volume for question in questions})
    records = [VolumeRecord(name, name, PREPARED, 0, 0, store=name) for name in names]
    built = build(questions, records, out="/", instruction=".", dataset="3d-rad")
    return [row for rows in built.rows.values() for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the folder with train/ and test/")
    parser.add_argument("--split", default="test")
    parser.add_argument("--train", action="store_true")
    args = parser.parse_args()
    learning = rows_of(args.folder / "train") if args.train else []
    print_evaluation(evaluate("3d-rad", rows_of(args.folder / args.split), {}, train=learning), verbose=True)


if __name__ == "__main__":
    main()
