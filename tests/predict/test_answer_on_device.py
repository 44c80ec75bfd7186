"""Answering on a device that is not the CPU: every tensor is where the others are, and the answers are the same."""

from dataclasses import replace

import pytest
from askable import QUESTIONS, SHORT, predictor, row, store
from other_device import device

from photon_train.answering.manifest import predict_rows
from photon_train.pruners import SCHEDULERS
from photon_train.rows import read_predictions

pytestmark = pytest.mark.slow
SETTINGS = {"drawn": replace(SHORT, sample=True), "likeliest": SHORT, "choices": replace(SHORT, choices=True)}

TRIED = [
    *((name, "its") for name in SETTINGS),
    *(("likeliest", scheduler) for scheduler in SCHEDULERS if scheduler != "its"),
]


def answers(model_dir, rows, folder, place=None):
    """Return {settings, scheduler, id: response, scores of choices, kept tokens} of all rows."""
    found = {}
    for name, scheduler in TRIED:
        asking = predictor(model_dir, SETTINGS[name], scheduler=scheduler)
        asking.model.to(place() if place else "cpu")
        path = folder / f"{name}-{scheduler}.jsonl"
        assert predict_rows(asking, rows, path).failed == {}
        found |= {(name, scheduler, p.id): (p.response, p.choice_scores, p.kept) for p in read_predictions(path)}
    return found


def test_answers_on_a_device_are_those_on_the_cpu(there, model_dir, tmp_path):
    stores = [store(tmp_path / "data", f"v{i}", i) for i in range(2)]
    rows = [
        row(f"{i}-{k}", q, v, choices=["yes", "no"]) for i, v in enumerate(stores) for k, q in enumerate(QUESTIONS[:2])
    ]
    rows += [row("text", "What is a nodule?"), row("both", QUESTIONS[0], *stores)]
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    here = answers(model_dir, rows, tmp_path / "here")
    found = there(answers, model_dir, rows, tmp_path / "there", device)
    assert len(found) == len(here) == 11 * 6
    for key, (response, scores, kept) in here.items():
        assert found[key][0] == response and found[key][2] == kept, key
        assert found[key][1] == pytest.approx(scores, abs=1e-4), key
