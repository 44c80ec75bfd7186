"""Whoever reads a store gets what was written, or an error: flips, swaps, losses, on a disk and in an object store."""

import contextlib
import copy
import itertools
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
from numcodecs import blosc
from scans import as_scan, ct_like, frame

from photon_data import open_volume
from photon_data.errors import UsageError
from photon_data.files import Location
from photon_data.prepare_file import prepare_volume
from photon_data.recipe import Recipe
from photon_data.store import CHECKSUMS, OWN_DIGEST, read_metadata, verify_store, write_store
from photon_data.stored_array import Layout, decoded

RECIPE = Recipe(shape_zyx=(12, 10, 14), model_shape_zyx=(6, 8, 8), spacing_mm=(1.5, 1.0, 0.8))
GRIDS = ("volume", "model")
METADATA = {"zarr.json": GRIDS, "0/zarr.json": GRIDS[:1], "model/zarr.json": GRIDS[1:], "model/0/zarr.json": GRIDS[1:]}
SHARDS = {"volume": "0/c.0.0.0", "model": "model/0/c.0.0.0"}


def identity(id):
    return {"id": id, "key": "k", "fingerprint": f"sha256:{id}", "recipe": RECIPE.to_json(), "digest": "d"}


def prepared_of(seed):
    return prepare_volume(as_scan(ct_like((9, 12, 13), seed), frame((9, 12, 13))), RECIPE)


def written(out, id, seed):
    write_store(prepared_of(seed), out, f"volumes/{id}.ome.zarr", identity(id))
    return out.at(f"volumes/{id}.ome.zarr")


@pytest.fixture
def two(tmp_path):
    return [Path(written(Location(str(tmp_path)), id, seed)) for id, seed in (("s0", 0), ("s1", 1))]


def said(store):
    """What a store says of itself, None where that is no more than damaged."""
    metadata = read_metadata(Location(str(store)), "")
    if metadata is None:
        return None
    return json.dumps({key: metadata[key] for key in sorted(metadata.keys() - {"bytes", "sha256"})}, sort_keys=True)


def read(store, grid):
    volume = open_volume(store, grid)
    return volume.geometry, volume.numpy().tobytes()


def flips(content: bytes, every: int) -> Iterator[bytes]:
    """Yield the content with one bit flipped, each bit in turn, or one of `every` bits."""
    for bit in range(0, 8 * len(content), every):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        yield bytes(flipped)


def silently_wrong(store: Path, every: int) -> tuple[int, list[str]]:
    """Return how many flips of metadata were tried, and those after which something else was read without a word."""
    grids, whole, tried, wrong = {grid: read(store, grid) for grid in GRIDS}, said(store), 0, []
    for name, concerned in METADATA.items():
        path, content = store / name, (store / name).read_bytes()
        for flipped in flips(content, every):
            path.write_bytes(flipped)
            tried += 1
            if name == "zarr.json" and said(store) not in (None, whole):
                wrong.append(f"{name} says {flipped!r}")
            for grid in concerned:
                with contextlib.suppress(UsageError):
                    if read(store, grid) != grids[grid]:
                        wrong.append(f"{name} gives {grid} {flipped!r}")
        path.write_bytes(content)
    assert {grid: read(store, grid) for grid in GRIDS} == grids
    return tried, wrong


def without_own_digest(store: Path):
    root = json.loads((store / "zarr.json").read_text())
    del root["attributes"]["photon"][OWN_DIGEST], root["attributes"]["photon"][CHECKSUMS]
    (store / "zarr.json").write_text(json.dumps(root, indent=1))


def test_a_flipped_bit_of_metadata_is_noticed_or_harmless(two):
    tried, wrong = silently_wrong(two[0], every=61)
    assert tried > 1000
    assert wrong == []


@pytest.mark.long
def test_every_flipped_bit_of_metadata_is_noticed_or_harmless(two):
    tried, wrong = silently_wrong(two[0], every=1)
    assert tried > 60_000
    assert wrong == []


@pytest.mark.parametrize("every", [67, pytest.param(5, marks=pytest.mark.long)])
def test_a_store_without_its_own_digest_is_read_and_its_grids_never_move_silently(two, every):
    store = two[0]
    without_own_digest(store)
    root, whole = (store / "zarr.json").read_bytes(), [read(store, grid) for grid in GRIDS]
    assert read(two[0], "volume")[0] == prepared_of(0).volume.geometry
    for flipped in flips(root, every):
        (store / "zarr.json").write_bytes(flipped)
        for grid, (geometry, voxels) in zip(GRIDS, whole, strict=True):
            try:
                found = read(store, grid)
            except UsageError:
                continue
            assert found[1] == voxels
            assert np.allclose(found[0].corners_lps(), geometry.corners_lps(), atol=2e-3)


def swap(a: Path, b: Path):
    beside = a.with_name("beside")
    a.rename(beside)
    b.rename(a)
    beside.rename(b)


def test_a_store_under_another_ones_name_is_refused_by_name_and_read_without_one(two):
    swap(*two)
    for grid in GRIDS:
        with pytest.raises(UsageError, match=r"the store of s0, found that of s1 at .*s0\.ome\.zarr"):
            open_volume(two[0], grid, id="s0")
        assert open_volume(two[0], grid, id="s1").numpy().any()
    assert np.array_equal(open_volume(two[0]).numpy(), prepared_of(1).volume.array_zyx)


@pytest.mark.parametrize("part", ["0/c.0.0.0", "0", "model", "model/0/c.0.0.0"])
def test_parts_of_two_stores_do_not_mix(two, part):
    swap(*(store / part for store in two))
    for store in two:
        with pytest.raises(UsageError, match="expected a whole store"):
            open_volume(store, "model" if part.startswith("model") else "volume")


@pytest.mark.parametrize("grid", GRIDS)
def test_a_shard_of_the_same_size_with_sound_chunks_is_found_by_its_hash_where_that_is_asked_for(two, grid):
    before = open_volume(two[0], grid).numpy()
    shards = [store / SHARDS[grid] for store in two]
    other = shards[1].read_bytes()
    shards[0].write_bytes(other)

    def sized(store):
        root = json.loads((store / "zarr.json").read_text())
        root["attributes"]["photon"]["files"][SHARDS[grid]]["bytes"] = len(other)
        (store / "zarr.json").write_text(json.dumps(root))

    without_own_digest(two[0])
    sized(two[0])
    assert not np.array_equal(open_volume(two[0], grid).numpy(), before)
    with pytest.raises(UsageError, match=f"{SHARDS[grid]}, whose bytes have changed"):
        open_volume(two[0], grid, verify="full")
    assert list(verify_store(Location(str(two[0].parent)), two[0].name)) == [
        f"s0.ome.zarr/{SHARDS[grid]}: its bytes have changed"
    ]


def test_a_sound_store_passes_with_full_hashes_and_another_word_is_refused(two):
    for grid in GRIDS:
        full = open_volume(two[0], grid, id="s0", verify="full")
        assert np.array_equal(full.numpy(), getattr(prepared_of(0), grid).array_zyx)
    with pytest.raises(UsageError, match="verify: expected quick or full, found 'fully'"):
        open_volume(two[0], verify="fully")


@pytest.mark.parametrize("grid", GRIDS)
def test_voxels_that_are_lost_or_replaced_after_opening_are_an_error_and_no_fill(two, grid):
    volumes = [open_volume(store, grid) for store in two]
    shards = [store / SHARDS[grid] for store in two]
    (shards[0]).unlink()
    for index in (..., 3, (slice(None), 2), (1, 2, 3)):
        with pytest.raises(UsageError, match=r"expected .* as it was when opened, found it lost"):
            volumes[0].array_zyx[index]
    with pytest.raises(UsageError, match="lost"):
        np.asarray(volumes[0].array_zyx)
    content = shards[1].read_bytes()
    shards[1].unlink()
    shards[1].write_bytes(content)
    os.utime(shards[1], ns=(1, 1))
    with pytest.raises(UsageError, match="replaced"):
        volumes[1].numpy()
    shutil.rmtree(two[1])
    with pytest.raises(UsageError, match="lost"):
        volumes[1].numpy()


def test_a_store_that_is_removed_while_it_is_read_gives_no_fill(two, monkeypatch):
    volumes = [open_volume(store) for store in two]
    read_by_zarr, read = type(volumes[0].array_zyx.array).__getitem__, Location.read

    def losing(array, index):
        shutil.rmtree(two[0])
        return read_by_zarr(array, index)

    def losing_after(location, name):
        content = read(location, name)
        shutil.rmtree(two[1])
        return content

    monkeypatch.setattr(type(volumes[0].array_zyx.array), "__getitem__", losing)
    with pytest.raises(UsageError, match="lost"):
        volumes[0].array_zyx[3]
    monkeypatch.setattr(Location, "read", losing_after)
    with pytest.raises(UsageError, match="lost"):
        volumes[1].numpy()


def test_a_damaged_chunk_is_named_when_it_is_read_and_others_are_read(two):
    shard = two[0] / SHARDS["volume"]
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    state = shard.stat()
    shard.write_bytes(content)
    os.utime(shard, ns=(state.st_atime_ns, state.st_mtime_ns))
    with pytest.raises(UsageError, match=r"found .*0/c\.0\.0\.0 damaged \(.*checksum"):
        open_volume(two[0]).numpy()
    assert open_volume(two[0], "model").numpy().any()


@pytest.mark.parametrize("place", [4, 12])
def test_a_chunk_that_says_another_length_than_it_has_is_never_given_to_the_decompressor(place):
    voxels = np.arange(64, dtype="<i2").reshape(4, 4, 4)
    layout = Layout((4, 4, 4), (4, 4, 4), voxels.dtype)

    def shard(chunk):
        chunk = summed(bytes(chunk))
        return chunk + summed(np.array([0, len(chunk)], "<u8").tobytes())

    chunk = bytearray(blosc.compress(voxels, b"zstd", 5, 1))
    assert np.array_equal(decoded(layout, shard(chunk)), voxels)
    chunk[place : place + 4] = (int.from_bytes(chunk[place : place + 4], "little") + 5000).to_bytes(4, "little")
    with pytest.raises(ValueError, match="another size"):
        decoded(layout, shard(chunk))


def summed(content):
    return content + google_crc32c.value(content).to_bytes(4, "little")


def test_an_opened_volume_can_be_copied(two):
    volume = copy.deepcopy(open_volume(two[0]))
    assert np.array_equal(volume.numpy(), prepared_of(0).volume.array_zyx)
    assert (len(volume.array_zyx), volume.array_zyx.dtype) == (12, np.int16)


def test_an_object_store_is_held_to_the_same(monkeypatch):
    out = Location("memory://bucket/held")
    urls = [written(out, id, seed) for id, seed in (("s0", 0), ("s1", 1))]
    for url, grid in itertools.product(urls, GRIDS):
        assert open_volume(url, grid, id=url[-11:-9], verify="full").numpy().any()
    with pytest.raises(UsageError, match="the store of s1, found that of s0"):
        open_volume(urls[0], id="s1")
    volume, name = open_volume(urls[0]), "volumes/s0.ome.zarr"
    content = out.read(f"{name}/model/0/zarr.json")
    assert content is not None
    out.write(f"{name}/model/0/zarr.json", content.replace(b'"little"', b'"litt1e"'))
    with pytest.raises(UsageError, match=r"model/0/zarr\.json, whose bytes have changed"):
        open_volume(urls[0], "model")
    out.remove(f"{name}/0/c.0.0.0")
    with pytest.raises(UsageError, match="found it lost"):
        volume.numpy()
    root = out.read("volumes/s1.ome.zarr/zarr.json")
    assert root is not None
    out.write("volumes/s1.ome.zarr/zarr.json", root.replace(b'"id": "s1"', b'"id": "s0"'))
    with pytest.raises(UsageError, match="differs from its own digest"):
        open_volume(urls[1], id="s0")
