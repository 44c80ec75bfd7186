"""What the tests of serving share: a lively model, stores of volumes that differ, and a server with small limits."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from askable import lively_model, store
from live import live

from photon_data.files import Location
from photon_data.records import PREPARED, VolumeRecord, write_records


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lively_model(tmp_path_factory.mktemp("served-model", numbered=False))


@pytest.fixture(scope="session")
def places(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    out = tmp_path_factory.mktemp("out")
    return [store(out, f"v{seed}", seed) for seed in range(4)]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A prepared folder of four volumes that differ: v0 ... v3."""
    out = tmp_path_factory.mktemp("prepared")
    places = [store(out, f"v{seed}", seed) for seed in range(4)]
    names = [Path(place).name.partition(".")[0] for place in places]
    write_records(
        Location(str(out)), [VolumeRecord(n, n, PREPARED, 0, 0, store=f"volumes/{n}.ome.zarr") for n in names]
    )
    return SimpleNamespace(out=out, places=places)


@pytest.fixture(scope="module")
def served(model_dir, prepared):
    with live(model_dir, data=str(prepared.out), max_volumes=2, max_upload_gb=0.002, upload_timeout_s=20) as server:
        yield server
