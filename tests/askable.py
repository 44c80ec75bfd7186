"""A small random model that says different things about different volumes, volumes that differ, and rows about them."""

from pathlib import Path
from typing import Any

import numpy as np

from photon_data.files import Location
from photon_data.recipe import Recipe
from photon_data.records import store_name
from photon_data.store import write_store
from photon_data.volume import Geometry, Prepared, Volume
from photon_train.answering.generation import AnswerSettings
from photon_train.answering.loading import load_predictor
from photon_train.answering.predictor import Predictor
from photon_train.tiny import tiny

SHORT = AnswerSettings(max_new_tokens=6)
MODEL_SHAPE = (70, 140, 140)
TOKENS = 125  # five a side
QUESTIONS = ("Is there a nodule?", "Where is it, in which lobe of which lung?", "Size", "Any fluid? Say yes or no.")


def lively_model(directory: Path, **settings: Any) -> Path:
    """Weights large enough for the answers, and a threshold in the middle for the keep sets, to differ."""
    tiny(
        directory, stage=2, initial_threshold=0.45, initializer_range=0.3, **{"model_shape_zyx": MODEL_SHAPE} | settings
    )
    return directory


def predictor(directory: Path, settings: AnswerSettings = SHORT, **photon: Any) -> Predictor:
    return load_predictor(str(directory), settings, device="cpu", **photon)


def blocks(seed: int) -> Volume:
    """int16 HU on the model grid: every token another grey, from -1000 to 1000."""
    grey = np.random.default_rng(seed).uniform(-1000, 1000, (5, 5, 5))
    grey.flat[:2] = -1000, 1000
    array = grey.round().astype(np.int16)
    for axis, n in enumerate(MODEL_SHAPE):
        array = array.repeat(n // 5, axis)
    return Volume(array, Geometry.axis_aligned(MODEL_SHAPE, (5.2, 2.6, 2.6), (0, 0, 0)))


def store(out: Path, name: str, seed: int) -> str:
    """Return the path of a store that holds `blocks` on the model grid."""
    model = blocks(seed)
    small = Volume(model.array_zyx[::5, ::5, ::5], Geometry.axis_aligned((14, 28, 28), (26, 13, 13), (0, 0, 0)))
    facts = {"geometry": small.geometry.to_json(), "grid": small.geometry.to_json()}
    identity = {"id": name, "key": name, "fingerprint": name, "recipe": Recipe().to_json(), "digest": Recipe().digest}
    write_store(Prepared(small, model, facts), Location(str(out)), store_name(name), identity)
    return str(out / store_name(name))


def row(name: str, question: str, *videos: Any, answer: str = "", system: str = "", **more: Any) -> dict[str, Any]:
    """An ms-swift row; the volumes stand before the question."""
    messages = [{"role": "user", "content": "<video>" * len(videos) + question}]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    if answer:
        messages.append({"role": "assistant", "content": answer})
    return {"id": name, "messages": messages, "videos": list(videos), "volume_id": "-".join(map(stem, videos)), **more}


def stem(video: Any) -> str:
    return Path(video).name.partition(".")[0] if isinstance(video, str) else "memory"
