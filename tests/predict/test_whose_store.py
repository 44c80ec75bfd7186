"""A row gets the volume that it names, or an error by name."""

import pytest
from askable import blocks, predictor, row, store

from photon_data.errors import UsageError
from photon_data.files import Location
from photon_data.recipe import Recipe
from photon_data.records import store_name
from photon_data.store import write_store
from photon_data.volume import Prepared
from photon_train.answering.manifest import predict_rows
from photon_train.answering.scan import open_input
from photon_train.kept_tokens import MaskFolder, counted_by_volume
from photon_train.rows import TrainRow, prefix_of, read_predictions
from photon_train.training.batches import volume_id_of
from photon_train.training.plan import rows_with_stores


@pytest.fixture
def swapped(tmp_path):
    """Two stores, each under the name of the other."""
    paths = [store(tmp_path, name, seed) for seed, name in enumerate(("v0", "v1"))]
    a, b, beside = (tmp_path / "volumes" / name for name in ("v0.ome.zarr", "v1.ome.zarr", "beside"))
    for one, other in ((a, beside), (b, a), (beside, b)):
        one.rename(other)
    return paths


def test_predictions_are_not_written_for_another_volume(model_dir, tmp_path, swapped):
    good = store(tmp_path, "v2", 2)
    rows = [row("a", "Where?", swapped[0]), row("b", "Where?", swapped[1]), row("c", "Where?", good)]
    rows.append({**row("d", "Really?", good), "volume_id": "v0"})  # the store of others, in a row of its own
    outcome = predict_rows(predictor(model_dir), rows, tmp_path / "p.jsonl")
    assert (outcome.answered, sorted(outcome.failed)) == (1, ["a", "b", "d"])
    errors = {p.id: p.error for p in read_predictions(tmp_path / "p.jsonl")}
    assert "expected the store of v0, found that of v1" in errors["a"]
    assert "expected the store of v0, found that of v2" in errors["d"]
    assert not errors["c"]


def train_row(name, *videos, **more):
    one = row(name, "Where?", *videos, answer="Here.", **more)
    return TrainRow(name, videos, one["messages"], prefix_of(one), one["volume_id"])


def test_training_names_the_store_of_another_volume_or_leaves_its_rows_out(tmp_path, swapped):
    good = store(tmp_path, "v2", 2)
    rows = [train_row("a", swapped[0]), train_row("b", good), train_row("c", good, volume_id="v9")]
    rows.append(train_row("d", good, swapped[0]))  # of two volumes: no id says whose they are
    with pytest.raises(UsageError, match=r"2 missing, .* of row a, is the store of v1, not of v0"):
        rows_with_stores(rows, "stop")
    assert [one.id for one in rows_with_stores(rows, "skip")] == ["b", "d"]
    assert [volume_id_of(one._asdict()) for one in rows] == ["v0", "v2", "v9", None]


def test_a_store_of_the_model_grid_alone_is_asked_about_and_shown_on_it(model_dir, tmp_path):
    model = blocks(3)
    facts = {"geometry": model.geometry.to_json(), "grid": model.geometry.to_json()}
    identity = {"id": "v0", "key": "k", "fingerprint": "f", "recipe": Recipe().to_json(), "digest": Recipe().digest}
    write_store(Prepared(model, model, facts), Location(str(tmp_path)), store_name("v0"), identity, "model")
    path = str(tmp_path / store_name("v0"))
    assert predict_rows(predictor(model_dir), [row("a", "Where?", path)], tmp_path / "p.jsonl").answered == 1
    scan = open_input(path, Recipe(), id="v0")
    assert scan.volume.geometry == scan.model.geometry
    assert (scan.volume.numpy() == model.array_zyx).all()


def test_what_is_shown_and_counted_is_of_the_volume_that_is_named(tmp_path, swapped):
    with pytest.raises(UsageError, match="expected the store of v0, found that of v1"):
        open_input(swapped[0], Recipe(), id="v0")
    assert open_input(swapped[0], Recipe()).id == "v1"
    (tmp_path / "masks" / "v0").mkdir(parents=True)
    found = counted_by_volume(MaskFolder(tmp_path / "masks"), {"v0": swapped[0]}, (5, 5, 5))
    assert "expected the store of v0, found that of v1" in found.unread["v0"]
