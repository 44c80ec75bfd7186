import hashlib
import json
import multiprocessing
import shutil
from pathlib import Path

import numpy as np
import pytest
import zarr
from raw import write_scan
from scans import as_scan, ct_like, frame, rotated

from photon_data import open_volume
from photon_data.errors import UsageError
from photon_data.files import Location
from photon_data.prepare_file import Job, prepare_file, prepare_volume
from photon_data.readers.find import find_scans
from photon_data.recipe import Recipe
from photon_data.store import (
    CHECKSUMS,
    OWN_DIGEST,
    _size_and_hash,
    _write_array,
    file_names,
    is_whole,
    own_digest,
    read_metadata,
    verify_store,
    voxels_sha256,
    write_store,
)
from photon_data.stored_array import open_array

RECIPE = Recipe(shape_zyx=(40, 37, 52), model_shape_zyx=(20, 30, 30), spacing_mm=(1.5, 1.0, 0.8))
IDENTITY = {"id": "case-7", "key": "k", "fingerprint": "sha256:0", "recipe": RECIPE.to_json(), "digest": "d"}
NAME = "volumes/case-7.ome.zarr"


@pytest.fixture(scope="module")
def prepared():
    return prepare_volume(as_scan(ct_like((20, 40, 50)), rotated(frame((20, 40, 50)), (5, 0, 10))), RECIPE)


@pytest.fixture
def out(tmp_path, prepared):
    write_store(prepared, Location(str(tmp_path)), NAME, IDENTITY)
    return Location(str(tmp_path))


def rewritten(store: Path, change=lambda ours: None, *, earlier=False):
    """Write the root metadata again, sound after the change; `earlier`: as by a version without the own digest."""
    root = store / "zarr.json"
    content = json.loads(root.read_text())
    attributes = content["attributes"]
    del attributes["photon"][OWN_DIGEST]
    change(attributes["photon"])
    if earlier:
        del attributes["photon"][CHECKSUMS]
    else:
        attributes["photon"][OWN_DIGEST] = own_digest(attributes)
    root.write_text(json.dumps(content))


def recorded(store: Path, file: str):
    """Return a change that makes the store's record say what a file of it is now."""
    content = (store / file).read_bytes()
    facts = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    return lambda ours: ours["files"].update({file: facts})


def files(folder: Path):
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("grid", ["volume", "model"])
def test_what_was_written_is_read_back_to_the_voxel_and_the_millimetre(out, prepared, grid):
    expected = getattr(prepared, grid)
    found = open_volume(out.path / NAME, grid)
    assert np.array_equal(found.numpy(), expected.array_zyx)
    assert np.array_equal(found.array_zyx[7, 3:9], expected.array_zyx[7, 3:9])
    assert np.allclose(found.geometry.corners_lps(), expected.geometry.corners_lps(), atol=1e-9)


def test_a_volume_is_two_files_of_data_and_four_of_metadata_in_ten_inodes(out):
    names = [path.relative_to(out.path / NAME).as_posix() for path in files(out.path / NAME)]
    shards = ["0/c.0.0.0", "0/zarr.json", "model/0/c.0.0.0", "model/0/zarr.json"]
    assert names == sorted([*shards, "model/zarr.json", "zarr.json"])
    assert 1 + len(list((out.path / NAME).rglob("*"))) == 10


def in_nested_folders(store: Path):
    """Lay a store out as earlier versions did: a folder for each part of the name of its shard, as zarr does itself."""

    def changed(ours):
        for array in (store / "0", store / "model/0"):
            name, before = array.relative_to(store).as_posix(), array / "c.0.0.0"
            (array / "c/0/0").mkdir(parents=True)
            before.rename(array / "c/0/0/0")
            described = json.loads((array / "zarr.json").read_text())
            described["chunk_key_encoding"]["configuration"]["separator"] = "/"
            (array / "zarr.json").write_text(json.dumps(described))
            recorded(store, f"{name}/zarr.json")(ours)
            for part in ("files", CHECKSUMS):
                ours[part][f"{name}/c/0/0/0"] = ours[part].pop(f"{name}/c.0.0.0")

    rewritten(store, changed)


def test_a_store_that_an_earlier_version_laid_out_in_nested_folders_is_read_verified_and_named_alike(out, prepared):
    now = read_metadata(out, NAME)
    in_nested_folders(out.path / NAME)
    metadata = read_metadata(out, NAME)
    assert 1 + len(list((out.path / NAME).rglob("*"))) == 16
    assert list(verify_store(out, NAME, metadata["sha256"])) == [] and is_whole(out, NAME, metadata)
    for grid in ("volume", "model"):
        expected = getattr(prepared, grid).array_zyx
        assert voxels_sha256(metadata, grid) == voxels_sha256(now, grid)
        for verify in ("quick", "full"):
            found = open_volume(out.path / NAME, grid, verify=verify)
            assert np.array_equal(found.numpy(), expected) and np.array_equal(found.array_zyx[5], expected[5])
    (out.path / NAME / "model/0/c/0/0/0").write_bytes(b"")
    assert not is_whole(out, NAME, metadata)
    with pytest.raises(UsageError, match=r"whole store, found .*model/0/c/0/0/0 of 0 bytes"):
        open_volume(out.path / NAME, "model")


def test_a_store_in_nested_folders_is_not_made_again(tmp_path):
    job = Job(find_scans(write_scan(tmp_path / "a.nii.gz")).sources[0], str(tmp_path), RECIPE)
    assert prepare_file(job).state == "prepared"
    in_nested_folders(tmp_path / job.place)
    assert prepare_file(job).state == "unchanged"
    assert (tmp_path / job.place / "0/c/0/0/0").exists()


@pytest.mark.parametrize("encoding", [{"name": "v2"}, {"name": "default", "configuration": {"separator": "-"}}, None])
def test_an_array_whose_shard_is_named_in_another_way_is_none_of_ours(out, encoding):
    path = out.path / NAME / "0/zarr.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chunk_key_encoding": encoding}))
    rewritten(out.path / NAME, recorded(out.path / NAME, "0/zarr.json"))
    with pytest.raises(UsageError, match="describes no array of ours"):
        open_volume(out.path / NAME)


def test_ome_zarr_models_accepts_both_image_groups(out):
    ome = pytest.importorskip("ome_zarr_models.v05")
    for folder in ("", "/model"):
        image = ome.Image.from_zarr(zarr.open_group(f"{out.path / NAME}{folder}", mode="r"))
        axes = image.attributes.ome.multiscales[0].axes
        assert [(axis.name, axis.unit) for axis in axes] == [
            ("z", "millimeter"),
            ("y", "millimeter"),
            ("x", "millimeter"),
        ]


def test_the_array_is_sharded_checksummed_and_names_its_axes(out):
    metadata = json.loads((out.path / NAME / "0" / "zarr.json").read_text())
    inner = metadata["codecs"][0]["configuration"]["codecs"]
    assert metadata["codecs"][0]["name"] == "sharding_indexed"
    assert [codec["name"] for codec in inner][-2:] == ["blosc", "crc32c"]
    assert metadata["dimension_names"] == ["z", "y", "x"]


@pytest.mark.parametrize("shape", [(5, 7, 9), (28, 182, 182), (30, 200, 185), (56, 10, 365), (3, 30, 9, 185)])
def test_a_shard_of_ours_is_read_by_zarr_and_its_facts_are_of_its_bytes(tmp_path, shape):
    dtype = np.int16 if len(shape) == 3 else np.uint8
    voxels = np.random.default_rng(3).integers(-1000, 1000, shape).astype(dtype)
    name, facts, _ = _write_array(voxels, tmp_path, "0", 0)
    stored = zarr.open_array(tmp_path / "0", mode="r")
    assert np.array_equal(stored[...], voxels)
    assert np.array_equal(stored[2:4, 3:, ::2], voxels[2:4, 3:, ::2])
    shard = (tmp_path / name).read_bytes()
    assert facts == {"bytes": len(shard), "sha256": hashlib.sha256(shard).hexdigest()}


def test_ome_metadata_place_voxel_centres_in_lps_millimetres(out, prepared):
    ome = json.loads((out.path / NAME / "zarr.json").read_text())["attributes"]["ome"]
    (image,) = ome["multiscales"]
    scale, translation = image["datasets"][0]["coordinateTransformations"]
    assert ome["version"] == "0.5"
    assert scale == {"type": "scale", "scale": [1.5, 1.0, 0.8]}
    assert translation["translation"] == pytest.approx(prepared.volume.geometry.world((0, 0, 0))[::-1])
    assert image["axes"][0]["orientation"]["value"] == "inferior-to-superior"


def test_the_same_volume_gives_the_same_bytes(out, prepared, tmp_path):
    write_store(prepared, Location(str(tmp_path)), "again/other.ome.zarr", IDENTITY)
    first, second = out.path / NAME, tmp_path / "again/other.ome.zarr"
    assert [path.read_bytes() for path in files(first)] == [path.read_bytes() for path in files(second)]


def test_an_untouched_store_verifies(out):
    root = hashlib.sha256((out.path / NAME / "zarr.json").read_bytes()).hexdigest()
    assert list(verify_store(out, NAME, root)) == []


@pytest.mark.parametrize("position", [0.0, 0.31, 0.77, 1.0])
def test_a_flipped_bit_is_found_in_every_file_wherever_it_is(out, position):
    root = hashlib.sha256((out.path / NAME / "zarr.json").read_bytes()).hexdigest()
    for path in files(out.path / NAME):
        content = bytearray(path.read_bytes())
        at = int(position * (len(content) - 1))
        content[at] ^= 4
        path.write_bytes(content)
        problems = list(verify_store(out, NAME, root))
        assert len(problems) == 1, path
        content[at] ^= 4
        path.write_bytes(content)
    assert list(verify_store(out, NAME, root)) == []


def test_a_flipped_bit_in_a_shard_is_an_error_when_read_not_another_voxel(out):
    shard = out.path / NAME / "0/c.0.0.0"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(Exception, match=r"(?i)checksum|crc"):
        open_volume(out.path / NAME).numpy()


def test_missing_and_surplus_files_are_found(out):
    (out.path / NAME / "0/c.0.0.0").unlink()
    (out.path / NAME / "notes.txt").write_text("x")
    problems = list(verify_store(out, NAME))
    assert [problem.split(": ")[1].split(" where")[0] for problem in problems] == ["missing", "not part of the store"]
    metadata = read_metadata(out, NAME)
    assert metadata is not None
    assert not is_whole(out, NAME, metadata)


def test_a_store_that_lists_files_outside_of_itself_is_found_out(out):
    rewritten(out.path / NAME, lambda ours: ours["files"].update({"../../secret": {"bytes": 1, "sha256": ""}}))
    assert any("outside of the store" in problem for problem in verify_store(out, NAME))


@pytest.mark.parametrize("broken", ['"bytes"', '"sha256"', '"files"', '"key"', '"facts"', '"photon"', '"format"'])
def test_a_store_whose_metadata_lost_a_key_is_no_store_and_stops_nothing(out, broken):
    root = out.path / NAME / "zarr.json"
    root.write_text(root.read_text().replace(broken, '"btyes"', 1))
    assert read_metadata(out, NAME) is None
    found = "expected a store of photon-data (format 1), found another one"
    assert list(verify_store(out, NAME)) == [
        f"{NAME}/zarr.json: {found}; the other files of this store were not checked"
    ]
    with pytest.raises(UsageError, match="a store of photon-data"):
        open_volume(out.path / NAME)


@pytest.mark.parametrize("broken", ['"multiscales"', '"coordinateTransformations"', '"ome"'])
def test_damaged_ome_metadata_are_named_when_a_volume_is_opened(out, broken):
    root = out.path / NAME / "zarr.json"
    root.write_text(root.read_text().replace(broken, '"x"'))
    with pytest.raises(UsageError, match="damaged"):
        open_volume(out.path / NAME)


def test_a_write_that_fails_leaves_the_old_store_and_nothing_else(out, prepared, monkeypatch):
    before = [path.read_bytes() for path in files(out.path)]

    def no_space(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("photon_data.files.sync_tree", no_space)
    with pytest.raises(OSError, match="No space"):
        write_store(prepared, out, NAME, IDENTITY)
    assert [path.read_bytes() for path in files(out.path)] == before


def test_a_new_store_takes_the_place_of_an_old_one(out, prepared):
    write_store(prepared, out, NAME, {**IDENTITY, "key": "newer"})
    metadata = read_metadata(out, NAME)
    assert metadata is not None
    assert metadata["key"] == "newer"
    assert out.names("volumes") == ["case-7.ome.zarr"]


def test_an_object_store_gets_the_root_metadata_last_and_opens_only_then(prepared):
    out = Location("memory://bucket/out")
    written = []
    original = type(out.fs).pipe_file

    def watch(fs, path, value, **more):
        written.append(path)
        return original(fs, path, value, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(out.fs), "pipe_file", watch)
        write_store(prepared, out, NAME, IDENTITY)
    assert written[-1].endswith(f"{NAME}/zarr.json")
    assert len(written) == 6
    assert list(verify_store(out, NAME)) == []
    url = out.at(NAME)
    assert np.array_equal(open_volume(url).numpy(), prepared.volume.array_zyx)
    out.remove(f"{NAME}/zarr.json")
    with pytest.raises(UsageError, match="a store of photon-data"):
        open_volume(url)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"data_type": "float64"}, "expected a three-dimensional int16 array"),
        ({"shape": [100000, 100000, 100000]}, "expected a three-dimensional int16 array"),
        ({"codecs": [{"name": "numcodecs.pickle"}]}, "numcodecs.pickle"),
    ],
)
def test_an_array_we_would_not_write_is_refused_before_it_is_decoded(out, change, said):
    path = out.path / NAME / "0/zarr.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    rewritten(out.path / NAME, recorded(out.path / NAME, "0/zarr.json"))
    with pytest.raises(UsageError, match=said):
        open_volume(out.path / NAME)


def test_something_else_is_not_opened(tmp_path, out):
    shutil.copytree(out.path / NAME / "0", tmp_path / "array")
    for path in (tmp_path / "array", tmp_path / "nothing", tmp_path):
        with pytest.raises(UsageError, match="a store of photon-data"):
            open_volume(path)


def test_nothing_of_a_header_but_numbers_is_in_the_store(out):
    metadata = read_metadata(out, NAME)
    assert metadata is not None
    ours = json.loads((out.path / NAME / "zarr.json").read_text())["attributes"]["photon"]
    said = {"format", "id", "key", "fingerprint", "recipe", "digest", "facts", "files"}
    said |= {"attributes_sha256", "checksums_sha256"}
    assert set(ours) == said
    texts = {value for value in metadata["facts"].values() if isinstance(value, str)}
    assert texts == {"memory", "int16", "header"}


def emptied(path: Path):
    path.write_bytes(b"")


def cut(path: Path):
    path.write_bytes(path.read_bytes()[:-1])


def replaced_by_a_folder(path: Path):
    path.unlink()
    path.mkdir()


def grown(path: Path):
    path.write_bytes(path.read_bytes() + b"\0")


@pytest.mark.parametrize("harm", [Path.unlink, emptied, cut, grown, replaced_by_a_folder])
@pytest.mark.parametrize(("grid", "folder"), [("volume", ""), ("model", "model/")])
@pytest.mark.parametrize("part", ["0/c.0.0.0", "0/zarr.json"])
def test_a_part_that_is_missing_or_of_another_size_is_named_when_its_grid_is_read(out, harm, grid, folder, part):
    harm(out.path / NAME / f"{folder}{part}")
    said = rf"whole store, found .*{folder}{part} .*were written; prepare it or copy|expected whole metadata.*again"
    with pytest.raises(UsageError, match=said):
        open_volume(out.path / NAME, grid)
    other = {"volume": "model", "model": "volume"}[grid]
    assert open_volume(out.path / NAME, other).numpy().max() > 0


@pytest.mark.parametrize("content", [None, b"", b"\0" * 1000])
def test_a_part_that_an_object_store_lost_is_named_when_it_is_read_and_makes_the_store_not_whole(prepared, content):
    out = Location("memory://bucket/lost")
    metadata = write_store(prepared, out, NAME, IDENTITY)
    assert is_whole(out, NAME, metadata)
    out.remove(f"{NAME}/model/0/c.0.0.0")
    if content is not None:
        out.write(f"{NAME}/model/0/c.0.0.0", content)
    with pytest.raises(UsageError, match=r"whole store, found .*model/0/c\.0\.0\.0 (missing|of [\d,]+ bytes) where"):
        open_volume(out.at(NAME), "model")
    assert np.array_equal(open_volume(out.at(NAME)).numpy(), prepared.volume.array_zyx)
    assert not is_whole(out, NAME, metadata)


def test_a_store_whose_list_lost_the_voxels_is_damaged(out):
    rewritten(
        out.path / NAME, lambda ours: ours["files"].update({"model/0/c.0.0.1": ours["files"].pop("model/0/c.0.0.0")})
    )
    (out.path / NAME / "model/0/c.0.0.0").rename(out.path / NAME / "model/0/c.0.0.1")
    with pytest.raises(UsageError, match="expected whole metadata"):
        open_volume(out.path / NAME, "model")


def test_what_is_not_there_reads_as_no_tissue_and_stores_of_the_time_when_it_was_water_stay_valid(out, prepared):
    array = out.path / NAME / "0/zarr.json"
    metadata = json.loads(array.read_text())
    assert metadata["fill_value"] == -32768
    array.write_text(json.dumps({**metadata, "fill_value": 0}))
    rewritten(out.path / NAME, recorded(out.path / NAME, "0/zarr.json"), earlier=True)
    assert list(verify_store(out, NAME)) == []
    assert np.array_equal(open_volume(out.path / NAME).numpy(), prepared.volume.array_zyx)


def _model_of(store: Path) -> np.ndarray:
    return open_volume(store, "model").numpy()


def test_a_volume_is_read_in_workers_that_were_forked_after_it_was_read(out, prepared):
    _model_of(out.path / NAME)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        found = pool.map_async(_model_of, [out.path / NAME] * 4).get(timeout=60)
    assert all(np.array_equal(voxels, prepared.model.array_zyx) for voxels in found)


def test_a_whole_read_gives_what_zarr_gives_where_chunks_do_not_divide_the_array(tmp_path):
    for number, shape in enumerate([(5, 7, 9), (29, 183, 4), (57, 3, 365), (28, 182, 182), (2, 30, 7, 183)]):
        dtype = "int16" if len(shape) == 3 else "uint8"
        values = np.random.default_rng(number).integers(0, 200, shape, dtype)
        _write_array(values, tmp_path, f"{number}/0", 0)
        metadata = {"files": {f: _size_and_hash((tmp_path / f).read_bytes()) for f in file_names(tmp_path)}}
        array = open_array(Location(str(tmp_path)), metadata | {CHECKSUMS: {}}, f"{number}/", dtype=dtype)
        assert np.array_equal(array[...], values)
        assert np.array_equal(zarr.open_array(tmp_path / f"{number}/0", mode="r")[...], values)
