"""What the tests of predicting share: one model directory, and one model loaded from it."""

from pathlib import Path

import pytest
from askable import lively_model, predictor

from photon_train.answering.predictor import Predictor


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lively_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def model(model_dir: Path) -> Predictor:
    return predictor(model_dir)


@pytest.fixture(scope="session")
def published_shape_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lively_model(tmp_path_factory.mktemp("published"), model_shape_zyx=(140, 280, 280))


@pytest.fixture
def published_shape(published_shape_dir: Path) -> Predictor:
    return predictor(published_shape_dir)
