"""Answering on a device that is not the CPU: every tensor is where the others are, and the answers are the same."""

from dataclasses import replace

import pytest
import torch
from askable import QUESTIONS, SHORT, asker, row, store
from other_device import device, elsewhere

from photon_train.predict import predict_rows
from photon_train.predictions import read_predictions
from photon_train.scheduling import SCHEDULERS

pytestmark = pytest.mark.slow
SETTINGS = {"drawn": replace(SHORT, sample=True), "likeliest": SHORT, "choices": replace(SHORT, choices=True)}

TRIED = [*((name, "its") for name in SETTINGS), *(("likeliest", scheduler) for scheduler in SCHEDULERS if scheduler != "its")]


@pytest.fixture(scope="module")
def there():
    with elsewhere() as call:
        yield call


def answers(model_dir, rows, folder, place=None):
    """Return {settings, scheduler, id: response, scores of choices, kept tokens} of all rows."""
    found = {}
    for name, scheduler in TRIED:
        asking = asker(model_dir, SETTINGS[name], scheduler=scheduler)
        asking.model.to(place() if place else "cpu")
        path = folder / f"{name}-{scheduler}.jsonl"
        assert predict_rows(asking, rows, path).failed == {}
        found |= {(name, scheduler, p.id): (p.response, p.choice_scores, p.kept) for p in read_predictions(path)}
    return found


def test_answers_on_a_device_are_those_on_the_cpu(there, model_dir, tmp_path):
    stores = [store(tmp_path / "data", f"v{i}", i) for i in range(2)]
    rows = [row(f"{i}-{k}", q, v, choices=["yes", "no"]) for i, v in enumerate(stores) for k, q in enumerate(QUESTIONS[:2])]
    rows += [row("text", "What is a nodule?"), row("both", QUESTIONS[0], *stores)]
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    here = answers(model_dir, rows, tmp_path / "here")
    found = there(answers, model_dir, rows, tmp_path / "there", device)
    assert len(found) == len(here) == 7 * 6
    for key, (response, scores, kept) in here.items():
        assert found[key][0] == response and found[key][2] == kept, key
        assert found[key][1] == pytest.approx(scores, abs=1e-4), key


def refused():
    """Return what of tensors on the CPU and there is refused."""
    here, there = torch.arange(6.0), torch.arange(6.0).to(device())
    order = torch.tensor([1, 0])
    tried = {
        "a sum": lambda: here + there,
        "a scalar of there": lambda: here + there[0],
        "joined": lambda: torch.cat([here, there]),
        "gathered": lambda: there.gather(0, order),
        "indices of there": lambda: here[order.to(device())],
        "values of here": lambda: there.index_put((order.to(device()),), here[:2]),
        "numpy": lambda: there.numpy(),
    }
    allowed = (there + 1.0, there + here[0], there[order], there.cpu() + here, here.copy_(there), there.clone().copy_(here))
    assert [x.device.type for x in allowed] == ["other"] * 3 + ["cpu"] * 2 + ["other"]
    return {name for name, call in tried.items() if _raises(call)} ^ tried.keys()


def _raises(call):
    try:
        call()
    except (RuntimeError, TypeError):
        return True
    return False


def test_what_a_gpu_refuses_is_refused(there):
    assert there(refused) == set()
