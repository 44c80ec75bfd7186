"""What the tests of serving share: one lively model directory, and stores of volumes that differ."""

from pathlib import Path

import pytest
from askable import lively_model, store


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lively_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def places(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    out = tmp_path_factory.mktemp("out")
    return [store(out, f"v{seed}", seed) for seed in range(4)]
