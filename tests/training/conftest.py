"""A small model, small stores and a manifest of uneven rows: what the tests of training share."""

import numpy as np
import pytest
from answers import put
from askable import row

from photon_data.files import Location
from photon_data.records import store_name
from photon_data.store import write_store
from photon_data.volume import Geometry, Prepared, Volume
from photon_train.tiny import tiny
from photon_train.training.config import TrainConfig

SHAPES = {"stored_shape_zyx": (42, 84, 84), "model_shape_zyx": (28, 56, 56)}  # 8 visual tokens
WIDE = {"stored_shape_zyx": (28, 140, 140), "model_shape_zyx": (28, 140, 140)}  # 10 x 10 patches a slab
QUESTIONS = {"a": 5, "b": 1, "c": 2, "d": 4, "e": 1, "f": 3}  # per volume


def write_volume(out, name, seed, shapes=SHAPES):
    draw = np.random.default_rng(seed)
    grids = [
        Volume(draw.integers(-1000, 1000, shape, dtype=np.int16), Geometry.axis_aligned(shape, (1, 1, 1), (0, 0, 0)))
        for shape in shapes.values()
    ]
    identity = {"id": name, "key": f"key of {name}", "fingerprint": "sha256:0", "recipe": {}, "digest": "d"}
    write_store(Prepared(grids[0], grids[1], {}), Location(str(out)), store_name(name), identity)
    return str(out / store_name(name))


@pytest.fixture(scope="session")
def stores(tmp_path_factory):
    out = tmp_path_factory.mktemp("prepared")
    return {name: write_volume(out, name, seed) for seed, name in enumerate(QUESTIONS)}


@pytest.fixture(scope="session")
def rows(stores):
    """16 rows of one volume, a text-only row, a row with two volumes, a row whose head differs."""
    answers = ("yes", "no", "left lower lobe", "3")
    found = [
        row(f"{name}{i}", f"Question {i} of {name}" + "?" * i, stores[name], answer=answers[i % 4])
        for name, count in QUESTIONS.items()
        for i in range(count)
    ]
    found.append(row("text", "What is a CT?", answer="a scan"))
    found.append(row("pair", "Has it grown?", stores["a"], stores["b"], answer="no"))
    found.append(row("other-head", "Is it well?", stores["a"], answer="yes", system="You are terse."))
    return found


@pytest.fixture(scope="session")
def manifest(rows, tmp_path_factory):
    return put(tmp_path_factory.mktemp("manifests") / "train.jsonl", rows)


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Directories of a stage-1 and a stage-2 model; the threshold of the second is where some tokens are dropped."""
    folder = tmp_path_factory.mktemp("models")
    tiny(folder / "s1", 1, **SHAPES)
    tiny(folder / "s2", 2, initial_threshold=0.45, **SHAPES)
    return folder


@pytest.fixture(scope="session")
def wide(tmp_path_factory):
    """A folder with models of 4 and of 7 layers, and a manifest of volumes whose windows are of three lengths."""
    folder = tmp_path_factory.mktemp("wide")
    for layers in (4, 7):
        tiny(folder / f"{layers}" / "s2", 2, initial_threshold=0.45, num_hidden_layers=layers, **WIDE)
    rows = [
        row(f"{name}{i}", f"Question {i} of {name}" + "?" * i, store, answer=("yes", "left lower lobe")[i % 2])
        for seed, name in enumerate("abcd")
        for store in [write_volume(folder / "prepared", name, seed, WIDE)]
        for i in range(4)
    ]
    return folder, put(folder / "train.jsonl", rows)


@pytest.fixture
def config(models, manifest, tmp_path):
    return TrainConfig(
        stage="s2",
        model=str(models / "s2"),
        data=(str(manifest),),
        output=str(tmp_path / "run"),
        lr_patch_embedding=1e-4,
        lr_vision=1e-3,
        lr_merger=1e-3,
        lr_language_model=1e-3,
        lr_threshold=1e-3,
        groups_per_step=4,
        questions_per_volume=3,
        epochs=3,
        precision="fp32",
        workers=0,
        save_every=2,
        track=(),
        photon={
            "soft_start": 1,
            "hard_start": 2,
            "flip_start": 3,
            "flip_probability": 0.5,
            "robustness_probability": 0.3,
        },
    )
