"""Rows of manifests and predictions of them, made in a line."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from photon_data.datasets.rad3d import read_subtask
from photon_data.files import jsonl_bytes
from photon_data.questions import question as prompts
from photon_data.questions.manifest import build
from photon_data.questions.question import Question, with_made_ids
from photon_data.records import PREPARED, VolumeRecord
from photon_train.evaluation.cases import Case, case_of
from photon_train.rows import Prediction

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


def rad3d_questions(split: str) -> list[Question]:
    """The questions of 3D-RAD's csv files."""
    return with_made_ids([q for file in sorted((RAD3D / split).glob("Task*/*.csv")) for q in read_subtask(file)])


def put_rows(questions: list[Question], style: str = "plain", choices: str = "hidden") -> list[dict[str, Any]]:
    """The rows of questions in a style of prompt, whether there are volumes or not."""
    names = sorted({question.volume for question in questions})
    records = [VolumeRecord(name, name, PREPARED, 0, 0, store=name) for name in names]
    splits = [replace(question, split="test") for question in prompts.with_prompt_style(questions, style, choices)]
    built = build(splits, records, out="/", instruction=".", dataset="set")
    return [row for rows in built.rows.values() for row in rows]


def rad3d_rows(split: str) -> list[dict[str, Any]]:
    """The rows of those questions."""
    return put_rows(rad3d_questions(split))


def put(path: Path, rows: Any) -> Path:
    """Write rows or predictions as JSON lines."""
    path.write_text(
        "".join(one.to_json() if isinstance(one, Prediction) else jsonl_bytes([one]).decode() for one in rows),
        encoding="utf-8",
    )
    return path
