"""Volume <-> store: one OME-Zarr 0.5 image per volume, whole or absent, every byte of it recorded.

<id>.ome.zarr/zarr.json        image group; written last; has the size and SHA-256 of other files, and its own digest
             /0/               the volume
             /model/zarr.json  image group of the model grid
             /model/0/         the model grid
             /full/...         likewise the whole field of the scan, with --grids full; --grids model has no /0/
"""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, cast

import google_crc32c
import numpy as np
import zarr
from numcodecs import blosc
from zarr.codecs import BloscCodec, Crc32cCodec

from photon_data.errors import UsageError
from photon_data.files import Location, digest_of, is_safe, write_whole
from photon_data.json_text import from_json
from photon_data.stored_array import (
    CHECKSUMS,
    ROOT,
    SEPARATOR,
    SEPARATORS,
    Layout,
    checked_file,
    checksums,
    open_array,
    shard_name,
    what_is_lost,
)
from photon_data.volume import Geometry, Prepared, Volume

# Our metadata stand beside "ome", under this key.
KEY = "photon"
FORMAT = 1
METADATA = ("format", "id", "key", "fingerprint", "recipe", "digest", "facts", "files")
# Of all attributes of the root metadata but this one. Stores of earlier versions do not have it.
OWN_DIGEST = "attributes_sha256"
# Root metadata take some 20 kB. More is none of ours, and is not read to find that out.
MAX_ROOT_BYTES = 1 << 24
GRIDS = {"volume": "", "model": "model/", "full": "full/"}
# What is written by each value of --grids.
WRITTEN = {"volume": ("volume", "model"), "full": ("volume", "model", "full"), "model": ("model",)}
NIFTI = (".nii", ".nii.gz")  # a row may name such a file of the stored grid in place of a store
# Chunks are at most this large: an axial slice of 364^3 costs 4 of them, a whole read 52.
CHUNK_ZYX = (28, 182, 182)
# What a part of a store reads as that is not there: the lowest int16, and no tissue. (It was 0, water, once.)
FILL_HU = -32768
ORIENTATION = {"z": "inferior-to-superior", "y": "anterior-to-posterior", "x": "right-to-left"}


def write_store(
    prepared: Prepared, out: Location, name: str, identity: dict[str, Any], grids: str = "volume"
) -> dict[str, Any]:
    """Write the store `name` of a volume below `out`, replacing one that is there; return its metadata.

    `identity` (id, key, fingerprint, recipe, digest) goes into its metadata with the facts, `grids` says which are
    written (see WRITTEN); see `write_images`.
    """
    volumes: dict[str, Volume] = {grid: getattr(prepared, grid) for grid in WRITTEN[grids]}
    images = {grid: (volume.numpy(), volume.geometry) for grid, volume in volumes.items()}
    return write_images(images, out, name, {**identity, "facts": prepared.facts}, FILL_HU)


def write_images(
    images: Mapping[str, tuple[np.ndarray, Geometry]], out: Location, name: str, ours: dict[str, Any], fill: int
) -> dict[str, Any]:
    """Write the store `name` below `out`, replacing one that is there; return its metadata (see `read_metadata`).

    `images` are arrays by the name of their grid; a first axis may count channels. Locally it is written beside, synced
    and renamed; on an object store the root metadata go last, and without them no reader takes the rest for a store.
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
    images: Mapping[str, tuple[np.ndarray, Geometry]], folder: Path, ours: dict[str, Any], fill: int
) -> dict[str, Any]:
    shards, bound = dict[str, dict[str, Any]](), dict[str, str]()
    for grid, (array, geometry) in images.items():
        shard, facts, sums = _write_array(array, folder, f"{GRIDS[grid]}0", fill)
        shards[shard], bound[shard] = facts, sums
        if grid != "volume":
            _write_group(folder / grid, {"ome": _ome(grid, geometry, array.ndim)})
    files = {name: shards.get(name) or _size_and_hash((folder / name).read_bytes()) for name in file_names(folder)}
    ours = {"format": FORMAT, **ours, "files": files, CHECKSUMS: bound}
    shown, (array, geometry) = next(iter(images.items()))  # the image that viewers open
    attributes = {"ome": _ome(ours["id"], geometry, array.ndim, f"{GRIDS[shown]}0"), KEY: ours}
    ours[OWN_DIGEST] = own_digest(attributes)
    content = _write_group(folder, attributes)
    return _with_size(ours, content)


def _write_array(array: np.ndarray, folder: Path, name: str, fill: int) -> tuple[str, dict[str, Any], str]:
    """Write one array as a single checksummed shard, chunks of padding too; return its name, size and hash, checksums.

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
        chunk_key_encoding={"name": "default", "separator": SEPARATOR},
        fill_value=fill,
        config={"write_empty_chunks": True},
    )
    shard = f"{name}/{shard_name(array.ndim)}"
    facts = _write_shard(array, chunk, folder / shard)
    return shard, facts, checksums(Layout(array.shape, chunk, array.dtype), folder / shard)


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
            for part in (data, google_crc32c.value(data).to_bytes(4, "little")):
                digest.update(part)
                file.write(part)
            return len(data) + 4

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


def _ome(name: str, geometry: Geometry, ndim: int, path: str = "0") -> dict[str, Any]:
    """Return OME-Zarr 0.5 metadata of one image with one level, at `path`; orientation as in RFC-4.

    A fourth axis counts channels.
    """
    axes: list[dict[str, Any]] = [{"name": axis, "type": "space", "unit": "millimeter"} for axis in "zyx"]
    for axis in axes:
        axis["orientation"] = {"type": "anatomical", "value": ORIENTATION[axis["name"]]}
    axes = [{"name": "c", "type": "channel"}] * (ndim - 3) + axes
    datasets = ome_datasets(geometry, ndim, path)
    return {"version": "0.5", "multiscales": [{"name": name, "axes": axes, "datasets": datasets}]}


def ome_datasets(geometry: Geometry, ndim: int = 3, path: str = "0") -> list[dict[str, Any]]:
    """Return where OME-Zarr 0.4 and 0.5 place the voxels of the one level, at `path`; a fourth axis counts channels."""
    transforms = [
        {"type": "scale", "scale": [*[1.0] * (ndim - 3), *geometry.spacing_zyx_mm]},
        {"type": "translation", "translation": [*[0.0] * (ndim - 3), *geometry.origin_lps[::-1]]},
    ]
    return [{"path": path, "coordinateTransformations": transforms}]


def file_names(folder: Path) -> list[str]:
    """Return the sorted posix paths of all files of a store but its root metadata."""
    names = (p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    return sorted(name for name in names if name != ROOT)


def _size_and_hash(content: bytes) -> dict[str, Any]:
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def own_digest(attributes: dict[str, Any]) -> str:
    """Return the SHA-256 of root attributes without their own digest, as JSON with sorted keys and no spaces."""
    ours = {key: value for key, value in attributes[KEY].items() if key != OWN_DIGEST}
    return digest_of({**attributes, KEY: ours}, OWN_DIGEST)


def is_store(place: str) -> bool:
    """Return whether a path or URL is that of a store; raw scans are local."""
    return "://" in place or (Path(place) / ROOT).exists()


def read_metadata(out: Location, name: str, root_sha256: str | None = None) -> dict[str, Any] | None:
    """Return what a store says of itself: METADATA, its size in "bytes" and the "sha256" of its root metadata.

    None where it is not there, of another format, or so damaged that it does not say all of this, or differs from its
    own digest, which is not looked at where they have the hash `root_sha256`. OSError where it cannot be read.
    """
    try:
        return _metadata(out.read(f"{name}/{ROOT}" if name else ROOT, MAX_ROOT_BYTES), root_sha256)
    except UsageError:
        return None


def _metadata(content: bytes | None, root_sha256: str | None = None) -> dict[str, Any]:
    """Return what `read_metadata` does, of the content of a root zarr.json; UsageError says what is wrong with it."""
    other = "none" if content is None else "another one"
    not_ours = UsageError(f"expected a store of photon-data (format {FORMAT}), found {other}")
    content = content or b""
    try:
        attributes = from_json(content)["attributes"]
        ours = attributes[KEY]
        found = _with_size({key: ours[key] for key in METADATA} | {CHECKSUMS: ours.get(CHECKSUMS, {})}, content)
        if not (ours["format"] == FORMAT and isinstance(ours["recipe"], dict) and isinstance(ours["facts"], dict)):
            raise not_ours
        # Stores of earlier versions have neither of them.
        has_digest = OWN_DIGEST in ours or CHECKSUMS in ours
        is_known = found["sha256"] == root_sha256
        is_changed = has_digest and not is_known and ours.get(OWN_DIGEST) != own_digest(attributes)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise not_ours from None
    if is_changed:
        raise UsageError(f"expected whole metadata, found damaged ones ({ROOT} differs from its own digest)")
    return found


_sorted_json = json.JSONEncoder(sort_keys=True, check_circular=False).encode  # json.dumps makes one per store


def arrays_digest(metadata: dict[str, Any]) -> str:
    """Return a hash of all files of a store but its root metadata: of its voxels and where they lie, not of its id."""
    return hashlib.sha256(_sorted_json(metadata["files"]).encode()).hexdigest()


def model_digest(metadata: dict[str, Any]) -> str:
    """Return a hash of the model grid, which every store has: it does not depend on which other grids there are."""
    files = {name: facts for name, facts in metadata["files"].items() if name.startswith(GRIDS["model"])}
    return arrays_digest({"files": files})


def voxels_sha256(metadata: dict[str, Any], grid: str) -> str | None:
    """Return the SHA-256 of the one file that holds the voxels of a grid; None where the store has no such grid."""
    names = [f"{GRIDS[grid]}0/{shard_name(3, separator)}" for separator in SEPARATORS]
    return next((metadata["files"][name]["sha256"] for name in names if name in metadata["files"]), None)


def grids_of(metadata: dict[str, Any]) -> list[str]:
    """Return the grids that a store has, of those in GRIDS."""
    return [grid for grid, place in GRIDS.items() if f"{place}0/{ROOT}" in metadata["files"]]


def _with_size(ours: dict[str, Any], content: bytes) -> dict[str, Any]:
    """Return our metadata with the store's size and the hash of `content`, the root metadata."""
    root = _size_and_hash(content)
    size = sum(facts["bytes"] for facts in [root, *ours["files"].values()] if facts["sha256"])
    return {**ours, **root, "bytes": size}


def open_volume(
    path: str | Path,
    grid: Literal["volume", "model", "full"] | None = "volume",
    *,
    id: str | None = None,
    verify: Literal["quick", "full"] = "quick",
) -> Volume:
    """Return the volume of a store, read lazily: slice `.array_zyx` or take `.numpy()`.

    `path` is a store's folder or fsspec URL; `grid` picks the volume, the model grid, or the whole field of the
    scan; None the volume, or the model grid of a store without it, which covers the same box. int16 HU, (z, y, x),
    LPS-aligned. With an `id`, the store must be the one of that volume.

    UsageError when it is not one of our stores, one of another version, another volume's, one without that grid, or one
    that is not as it was written: its metadata changed, or a file of that grid is missing or of another size; with
    verify="full", one whose hash is another. What is read later is compared with the checksums of its chunks:
    UsageError for voxels that differ from them, or whose file is gone or was replaced meanwhile.

    >>> volume = photon_data.open_volume("a.ome.zarr", id="a")
    >>> volume.array_zyx.shape, volume.array_zyx[20].shape, volume.geometry.orientation
    ((40, 32, 32), (32, 32), 'SPL')
    >>> photon_data.open_volume("a.ome.zarr", "model").geometry.shape_zyx
    (14, 28, 28)
    """
    if grid is not None and grid not in GRIDS:
        raise UsageError(f"grid: expected volume, model or full, found {grid!r}")
    if verify not in ("quick", "full"):
        raise UsageError(f"verify: expected quick or full, found {verify!r}")
    location = Location(str(path))
    root = location.read(ROOT, MAX_ROOT_BYTES)
    try:
        metadata = _metadata(root)
    except UsageError as error:
        raise UsageError(f"{error} at {path}; make it with photon-data prepare, or copy it again") from None
    if id is not None and metadata["id"] != id:
        remedy = "bring back the one of that id, or prepare it again"
        raise UsageError(f"expected the store of {id}, found that of {metadata['id']} at {path}; {remedy}")
    grids = grids_of(metadata)
    grid = grid or cast(Literal["volume", "model"], next(iter(grids), "volume"))
    if grids and grid not in grids:
        remedy = f"prepare with --grids {grid}"
        raise UsageError(f"expected the grid {grid}, found {' and '.join(grids)} in {path}; {remedy}")
    place = GRIDS[grid]
    try:
        of_image = root if grid == "volume" else checked_file(location, metadata, f"{place}{ROOT}")
        ome = from_json(of_image or b"")["attributes"]["ome"]
        array = open_array(location, metadata, place, verify)
        transforms = ome["multiscales"][0]["datasets"][0]["coordinateTransformations"]
        (sz, sy, sx), translation = (transform[transform["type"]] for transform in transforms)
        geometry = Geometry.from_arrays(array.shape, translation[::-1], ((0, 0, sz), (0, sy, 0), (sx, 0, 0)))
        if grid == "volume" and "grid" in metadata["facts"]:
            _compare(geometry, Geometry.from_json(metadata["facts"]["grid"]))
    except UsageError:
        raise
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, ArithmeticError) as error:
        found = f"damaged ones in {path} ({error!r})"
        raise UsageError(f"expected whole metadata, found {found}; prepare it again") from None
    return Volume(array, geometry)


def _compare(geometry: Geometry, recorded: Geometry) -> None:
    """Raise ValueError where a grid is not the one that the facts record: they are written twice."""
    if geometry.shape_zyx != recorded.shape_zyx or not np.allclose(
        geometry.corners_lps(), recorded.corners_lps(), rtol=0, atol=1e-3
    ):
        raise ValueError(f"the grid is {geometry.to_json()}, in the facts {recorded.to_json()}")


def is_whole(out: Location, name: str, metadata: dict[str, Any]) -> bool:
    """Tell cheaply whether every file of a store has its recorded size."""
    folder = f"{name}/" if name else ""
    return not any(what_is_lost(metadata, file, out.size(folder + file)) for file in metadata["files"])


def verify_store(out: Location, name: str, root_sha256: str | None = None) -> Iterator[str]:
    """Yield what is wrong with a store, one sentence each: nothing for a store whose every byte is as it was written.

    `root_sha256`, from volumes.jsonl, covers the root metadata, which cover all other files. A file that cannot be read
    does not stop the others.
    """
    try:
        metadata = _metadata(out.read(f"{name}/{ROOT}", MAX_ROOT_BYTES))
    except (UsageError, OSError) as error:
        yield f"{name}/{ROOT}: {_reason(error)}; the other files of this store were not checked"
        return
    if root_sha256 is not None and metadata["sha256"] != root_sha256:
        yield f"{name}/{ROOT}: differs from what volumes.jsonl records"
    for file, facts in metadata["files"].items():
        if not is_safe(file):
            yield f"{name}/{ROOT}: names a file outside of the store"
            continue
        try:
            if lost := what_is_lost(metadata, file, out.size(f"{name}/{file}")):
                yield f"{name}/{file}: {lost}"
            elif out.sha256(f"{name}/{file}") != facts["sha256"]:
                yield f"{name}/{file}: its bytes have changed"
        except OSError as error:
            yield f"{name}/{file}: {_reason(error)}"
    if out.is_local:
        for file in sorted(set(file_names(out.path / name)) - set(metadata["files"])):
            yield f"{name}/{file}: not part of the store"


def _reason(error: Exception) -> str:
    return f"cannot be read ({error.strerror or error})" if isinstance(error, OSError) else str(error)
