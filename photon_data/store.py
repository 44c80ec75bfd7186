"""Volume <-> store: one OME-Zarr 0.5 image per volume, whole or absent, every byte of it recorded.

<id>.ome.zarr/zarr.json        image group; written last; lists every other file with size and SHA-256
             /0/               the volume
             /model/zarr.json  image group of the model grid
             /model/0/         the model grid
"""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import google_crc32c
import numpy as np
import zarr
from numcodecs import blosc
from zarr.codecs import BloscCodec, Crc32cCodec

from photon_data.errors import UsageError
from photon_data.files import Location, refuse_unsafe, write_whole
from photon_data.json_text import from_json
from photon_data.volume import Geometry, Prepared, Volume

# Our metadata stand beside "ome", under this key.
KEY = "photon"
FORMAT = 1
METADATA = ("format", "id", "key", "fingerprint", "recipe", "digest", "facts", "files")
ROOT = "zarr.json"
SHARD = "0/c/0/0/0"  # the one file of voxels of an image group
GRIDS = {"volume": "", "model": "model/"}
SUFFIX = ".ome.zarr"
NIFTI = (".nii", ".nii.gz")  # a row may name such a file of the stored grid in place of a store
# Chunks are at most this large: an axial slice of 364^3 costs 4 of them, a whole read 52.
CHUNK_ZYX = (28, 182, 182)
LARGEST_VOXELS = 4_000_000_000
# What a part of a store reads as that is not there: the lowest int16, and no tissue. (It was 0, water, once.)
FILL_HU = -32768
CODECS = {"sharding_indexed", "bytes", "blosc", "crc32c"}
ORIENTATION = {"z": "inferior-to-superior", "y": "anterior-to-posterior", "x": "right-to-left"}


def store_name(volume_id: str) -> str:
    """Return where the store of a volume lies below the output folder; UsageError for an id that cannot name a file."""
    if not volume_id or volume_id.startswith("."):
        raise UsageError(f"expected an id that begins with a letter or a digit, found {volume_id[:80]!r}; rename it")
    return f"volumes/{refuse_unsafe(volume_id + SUFFIX, 'an id')}"


def write_store(prepared: Prepared, out: Location, name: str, identity: dict[str, Any]) -> dict[str, Any]:
    """Write the store `name` of a volume below `out`, replacing one that is there; return its metadata.

    `identity` (id, key, fingerprint, recipe, digest) goes into its metadata with the facts; see `write_images`.
    """
    images = [(image.numpy(), image.geometry) for image in (prepared.volume, prepared.model)]
    return write_images(images, out, name, {**identity, "facts": prepared.facts}, FILL_HU)


def write_images(
    images: Sequence[tuple[np.ndarray, Geometry]], out: Location, name: str, ours: dict[str, Any], fill: int
) -> dict[str, Any]:
    """Write the store `name` below `out`, replacing one that is there; return its metadata (see `read_metadata`).

    `images` are two arrays, on the grid of the volume and on the model grid; a first axis may count channels. Locally
    it is written beside, synced and renamed; on an object store the root metadata go last, and without them no reader
    takes the rest for a store.
    """
    if out.is_local:
        with write_whole(out.place(name)) as folder:
            return _write(images, folder, ours, fill)
    with tempfile.TemporaryDirectory(prefix="photon-") as scratch:
        written = _write(images, Path(scratch), ours, fill)
        out.remove(f"{name}/{ROOT}")
        out.remove(name)
        for file in [*written["files"], ROOT]:
            out.write(f"{name}/{file}", Path(scratch, file).read_bytes())
        return written


def _write(
    images: Sequence[tuple[np.ndarray, Geometry]], folder: Path, ours: dict[str, Any], fill: int
) -> dict[str, Any]:
    (array, geometry), (model, model_geometry) = images
    shards = dict([_write_array(array, folder, "0", fill), _write_array(model, folder, "model/0", fill)])
    _write_group(folder / "model", {"ome": _ome("model", model_geometry, model.ndim)})
    files = {name: shards.get(name) or _size_and_hash((folder / name).read_bytes()) for name in file_names(folder)}
    ours = {"format": FORMAT, **ours, "files": files}
    content = _write_group(folder, {"ome": _ome(ours["id"], geometry, array.ndim), KEY: ours})
    return _with_size(ours, content)


def _write_array(array: np.ndarray, folder: Path, name: str, fill: int) -> tuple[str, dict[str, Any]]:
    """Write one array as a single checksummed shard, chunks of padding too; return its name, {"bytes", "sha256"}.

    lz4 costs half the CPU time of zstd for a fifth more bytes (benchmarks/store_codecs.py).
    """
    # An axis is cut into as few chunks as can be, of equal length: 280 voxels into 2 of 140. Channels are apart.
    most_zyx = zip(array.shape[-3:], CHUNK_ZYX, strict=True)
    chunk = (1,) * (array.ndim - 3) + tuple(math.ceil(n / math.ceil(n / most)) for n, most in most_zyx)
    zarr.create_array(
        folder / name,
        shape=array.shape,
        dtype=array.dtype,
        chunks=chunk,
        shards=tuple(math.ceil(n / c) * c for n, c in zip(array.shape, chunk, strict=True)),
        compressors=[
            BloscCodec(cname="lz4", clevel=1, shuffle="bitshuffle", typesize=array.itemsize),
            Crc32cCodec(),
        ],
        dimension_names=("c", "z", "y", "x")[-array.ndim :],
        fill_value=fill,
        config={"write_empty_chunks": True},
    )
    shard = "/".join([name, "c", *("0" * array.ndim)])
    (folder / shard).parent.mkdir(parents=True)
    return shard, _write_shard(array, chunk, folder / shard)


def _write_shard(array: np.ndarray, chunk: tuple[int, ...], path: Path) -> dict[str, Any]:
    """Write an array of integers as a zarr v3 shard, the last chunks padded with 0; return {"bytes", "sha256"} of it.

    <chunk 0><crc32c><chunk 1><crc32c> ... <index: offset and length of every chunk, uint64><crc32c>

    It is what zarr-python writes, with fewer copies (0.15 s less); it pads with the fill value, which nobody reads.
    The hash is of the bytes that were meant to be written; photon-data verify tells what the disk made of them.
    """
    counts = tuple(math.ceil(n / c) for n, c in zip(array.shape, chunk, strict=True))
    index = np.empty((*counts, 2), "<u8")
    padded, digest, position = np.zeros(chunk, array.dtype.newbyteorder("<")), hashlib.sha256(), 0
    with path.open("wb") as file:

        def write(data: bytes) -> int:
            data += google_crc32c.value(data).to_bytes(4, "little")
            digest.update(data)
            return file.write(data)

        for place in np.ndindex(*counts):
            part = array[tuple(slice(i * c, (i + 1) * c) for i, c in zip(place, chunk, strict=True))]
            if part.shape != chunk:
                padded[...] = 0
            padded[tuple(slice(n) for n in part.shape)] = part
            length = write(blosc.compress(padded, b"lz4", 1, blosc.BITSHUFFLE, 0, typesize=padded.itemsize))
            index[place] = position, length
            position += length
        position += write(index.tobytes())
    return {"bytes": position, "sha256": digest.hexdigest()}


def _write_group(folder: Path, attributes: dict[str, Any]) -> bytes:
    content = json.dumps({"zarr_format": 3, "node_type": "group", "attributes": attributes}, indent=1).encode()
    (folder / ROOT).write_bytes(content)
    return content


def _ome(name: str, geometry: Geometry, ndim: int) -> dict[str, Any]:
    """Return OME-Zarr 0.5 metadata of one image with one level; orientation as in RFC-4. A fourth axis is channels."""
    axes: list[dict[str, Any]] = [{"name": axis, "type": "space", "unit": "millimeter"} for axis in "zyx"]
    for axis in axes:
        axis["orientation"] = {"type": "anatomical", "value": ORIENTATION[axis["name"]]}
    axes = [{"name": "c", "type": "channel"}] * (ndim - 3) + axes
    return {"version": "0.5", "multiscales": [{"name": name, "axes": axes, "datasets": ome_datasets(geometry, ndim)}]}


def ome_datasets(geometry: Geometry, ndim: int = 3) -> list[dict[str, Any]]:
    """Return where OME-Zarr 0.4 and 0.5 place the voxels of the one level, "0"; axes before z, y, x count channels."""
    transforms = [
        {"type": "scale", "scale": [*[1.0] * (ndim - 3), *geometry.spacing_zyx_mm]},
        {"type": "translation", "translation": [*[0.0] * (ndim - 3), *geometry.origin_lps[::-1]]},
    ]
    return [{"path": "0", "coordinateTransformations": transforms}]


def file_names(folder: Path) -> list[str]:
    """Return the sorted posix paths of all files of a store but its root metadata."""
    names = (p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    return sorted(name for name in names if name != ROOT)


def _size_and_hash(content: bytes) -> dict[str, Any]:
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def read_metadata(out: Location, name: str) -> dict[str, Any] | None:
    """Return what a store says of itself: METADATA, its size in "bytes" and the "sha256" of its root metadata.

    None where it is not there, of another format, or so damaged that it does not say all of this.
    """
    content = out.read(f"{name}/{ROOT}" if name else ROOT) or b""
    try:
        ours = from_json(content)["attributes"][KEY]
        found = _with_size({key: ours[key] for key in METADATA}, content)
        is_ours = ours["format"] == FORMAT and isinstance(ours["recipe"], dict) and isinstance(ours["facts"], dict)
        return found if is_ours else None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def arrays_digest(metadata: dict[str, Any]) -> str:
    """Return a hash of all files of a store but its root metadata: of its voxels and where they lie, not of its id."""
    return hashlib.sha256(json.dumps(metadata["files"], sort_keys=True).encode()).hexdigest()


def _with_size(ours: dict[str, Any], content: bytes) -> dict[str, Any]:
    """Return our metadata with the store's size and the hash of `content`, the root metadata."""
    root = _size_and_hash(content)
    size = sum(facts["bytes"] for facts in [root, *ours["files"].values()] if facts["sha256"])
    return {**ours, **root, "bytes": size}


def open_volume(path: str | Path, grid: Literal["volume", "model"] = "volume") -> Volume:
    """Return the volume of a store, read lazily: slice `.array_zyx` or take `.numpy()`.

    `path` is a store's folder or fsspec URL; `grid` picks the full volume or the model grid. int16 HU, (z, y, x),
    LPS-aligned. UsageError when it is not one of our stores, one of another version, or one that lost a part of that
    grid: a file of it is missing or has not the size that was written.

    >>> volume = photon_data.open_volume("a.ome.zarr")
    >>> volume.array_zyx.shape, volume.array_zyx[20].shape, volume.geometry.orientation
    ((40, 32, 32), (32, 32), 'SPL')
    >>> photon_data.open_volume("a.ome.zarr", "model").geometry.shape_zyx
    (14, 28, 28)
    """
    location = Location(str(path))
    metadata = read_metadata(location, "")
    if metadata is None:
        expected = f"a store of photon-data (format {FORMAT})"
        raise UsageError(f"expected {expected}, found none at {path}; make it with photon-data prepare")
    if grid not in GRIDS:
        raise UsageError(f"grid: expected volume or model, found {grid!r}")
    place = GRIDS[grid]
    try:
        metadata["files"][f"{place}{SHARD}"]  # a part that is not listed could not be missed
        ome = from_json(location.read(f"{place}{ROOT}") or b"")["attributes"]["ome"]
        check_array(from_json(location.read(f"{place}0/{ROOT}") or b""), path)
        for lost in _lost(location, "", metadata, f"{place}0/"):
            raise UsageError(f"expected a whole store, found {path} with {lost}; prepare it or copy it again")
        array = zarr.open_array(location.at(f"{place}0"), mode="r", zarr_format=3)
        transforms = ome["multiscales"][0]["datasets"][0]["coordinateTransformations"]
        (sz, sy, sx), translation = (transform[transform["type"]] for transform in transforms)
        steps_lps = ((0, 0, sz), (0, sy, 0), (sx, 0, 0))
        return Volume(array, Geometry.from_arrays(array.shape, translation[::-1], steps_lps))
    except UsageError:
        raise
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        found = f"damaged ones in {path} ({error!r})"
        raise UsageError(f"expected whole metadata, found {found}; prepare it again") from None


def check_array(metadata: dict[str, Any], path: str | Path, ndim: int = 3, dtype: str = "int16") -> None:
    """Raise UsageError, before anything is decoded, unless this is a sane array in our codecs: a volume, or masks."""
    shape = metadata.get("shape", [])
    found = metadata.get("data_type")
    if found != dtype or len(shape) != ndim or math.prod(shape[-3:]) > LARGEST_VOXELS:
        dimensions = {3: "three", 4: "four"}[ndim]
        raise UsageError(f"expected a {dimensions}-dimensional {dtype} array, found {found} {shape} in {path}")
    outer = metadata.get("codecs", [])
    inner = [c for codec in outer for c in codec.get("configuration", {}).get("codecs", [])]
    unknown = {codec.get("name") for codec in [*outer, *inner]} - CODECS
    if unknown:
        raise UsageError(f"expected the codecs {sorted(CODECS)}, found {sorted(map(str, unknown))} in {path}")


def is_whole(out: Location, name: str, metadata: dict[str, Any]) -> bool:
    """Tell cheaply whether every file of a store has its recorded size."""
    return not any(_lost(out, name, metadata))


def _lost(out: Location, name: str, metadata: dict[str, Any], under: str = "") -> Iterator[str]:
    """Yield the files of a store below its folder `under` that are not as large as recorded, with what is there.

    zarr itself takes a chunk that is missing for one of fill values.
    """
    for file, facts in metadata["files"].items():
        if not file.startswith(under):
            continue
        size = out.size(f"{name}/{file}" if name else file)
        if size != facts["bytes"]:
            found = "missing" if size is None else f"of {size:,} bytes"
            yield f"{file} {found} where {facts['bytes']:,} bytes were written"


def verify_store(out: Location, name: str, root_sha256: str | None = None) -> Iterator[str]:
    """Yield what is wrong with a store, one sentence each: nothing for a store whose every byte is as it was written.

    `root_sha256`, from volumes.jsonl, covers the root metadata, which cover all other files.
    """
    metadata = read_metadata(out, name)
    if metadata is None:
        yield f"{name}: no readable {ROOT}"
        return
    if root_sha256 is not None and metadata["sha256"] != root_sha256:
        yield f"{name}/{ROOT}: differs from what volumes.jsonl records"
    for file, facts in metadata["files"].items():
        if ".." in PurePosixPath(file).parts or PurePosixPath(file).is_absolute():
            yield f"{name}/{ROOT}: names a file outside of the store"
            continue
        content = out.read(f"{name}/{file}")
        if content is None:
            yield f"{name}/{file}: missing"
        elif len(content) != facts["bytes"]:
            yield f"{name}/{file}: expected {facts['bytes']} bytes, found {len(content)}"
        elif hashlib.sha256(content).hexdigest() != facts["sha256"]:
            yield f"{name}/{file}: its bytes have changed"
    if out.is_local:
        for file in sorted(set(file_names(out.path / name)) - set(metadata["files"])):
            yield f"{name}/{file}: not part of the store"
