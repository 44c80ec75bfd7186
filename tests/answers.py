"""Rows of manifests and predictions of them, made in a line."""

from pathlib import Path
from typing import Any

from photon_data import manifest
from photon_data.questions import with_made_ids
from photon_data.records import PREPARED, VolumeRecord, to_jsonl
from photon_data.sources.rad3d import read_subtask
from photon_train.evaluation.cases import Case, case_of
from photon_train.predictions import Prediction

RAD3D = Path(__file__).parent / "data" / "3d-rad" / "3DRAD"


def row(id: str, answer: str, choices: tuple[str, ...] = (), *, question: str = "What?", **more: Any) -> dict[str, Any]:
    """A row as `photon_data.manifest` writes it; `more` are other columns, `extra` among them."""
    volume = more.get("volume_id", f"v-{id}")
    made = {
        "id": id,
        "messages": [{"role": "user", "content": f"<video>{question}"}, {"role": "assistant", "content": answer}],
        "videos": [f"/{volume}.ome.zarr"],
        "channel": f"set/{more.get('task', 'task')}",
        "volume_id": volume,
        "patient": f"p-{id}",
        "split": "test",
        "task": "task",
        "kind": "",
        "organ": "",
        "choices": list(choices),
        "answer": answer,
    }
    return made | more


def case(answer: str, response: str, choices: tuple[str, ...] = (), id: str = "q", **more: Any) -> Case:
    """A case with a response; `scores` are those of the choices."""
    scores = more.pop("scores", {})
    return case_of(row(id, answer, choices, **more), Prediction(id, response, choice_scores=scores))


def rad3d_rows(split: str, folder: Path = RAD3D) -> list[dict[str, Any]]:
    """The rows of 3D-RAD's csv files, whether there are volumes or not."""
    questions = with_made_ids([q for file in sorted((folder / split).glob("Task*/*.csv")) for q in read_subtask(file)])
    names = sorted({question.volume for question in questions})
    records = [VolumeRecord(name, name, PREPARED, 0, 0, store=name) for name in names]
    built = manifest.build(questions, records, out="/", instruction=".", dataset="3d-rad")
    return [row for rows in built.rows.values() for row in rows]


def put(path: Path, rows: Any) -> Path:
    """Write rows or predictions as JSON lines."""
    path.write_text("".join(one.to_json() if isinstance(one, Prediction) else to_jsonl([one]) for one in rows), encoding="utf-8")
    return path
