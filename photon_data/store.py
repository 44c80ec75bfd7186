"""One array as one zarr v3 shard, chunk by chunk: what zarr-python reads as its own, written with fewer copies (0.15 s less).

<chunk 0><crc32c><chunk 1><crc32c> ... <index: offset and length of every chunk, uint64><crc32c>

Volume <-> store: one OME-Zarr 0.5 image per volume, whole or absent, every byte of it recorded.

<id>.ome.zarr/zarr.json        image group; written last; lists every other file with size and SHA-256
             /0/               the volume
             /model/zarr.json  image group of the model grid
             /model/0/         the model grid
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import google_crc32c
import numpy as np
import zarr
from numcodecs import blosc
from zarr.codecs import BloscCodec, Crc32cCodec

from photon_data.errors import UsageError
from photon_data.files import Location, replace_folder, sync_tree
from photon_data.volume import Geometry, Prepared, Volume

CRC_BYTES = 4
Shape = tuple[int, int, int]


def write_shard(array: np.ndarray, chunk: Shape, path: Path) -> dict[str, Any]:
    """Write an int16 array as a shard of blosc lz4 chunks, the last ones padded with 0; return {"bytes", "sha256"} of the file.

    The bytes are those that were meant to be written: what the disk made of them, photon-data verify says.
    """
    counts = _counts(array.shape, chunk)
    index = np.empty((*counts, 2), "<u8")
    whole, digest, position = np.zeros(chunk, "<i2"), hashlib.sha256(), 0
    with path.open("wb") as file:
        for place in np.ndindex(*counts):
            part = array[_box(place, chunk)]
            if part.shape != chunk:
                whole[...] = 0
            whole[tuple(slice(n) for n in part.shape)] = part
            packed = _checked(blosc.compress(whole, b"lz4", 1, blosc.BITSHUFFLE, 0, typesize=2))
            index[place] = position, len(packed)
            position += len(packed)
            digest.update(packed)
            file.write(packed)
        tail = _checked(index.tobytes())
        digest.update(tail)
        file.write(tail)
    return {"bytes": position + len(tail), "sha256": digest.hexdigest()}


def _counts(shape: tuple[int, ...], chunk: Shape) -> Shape:
    nz, ny, nx = (math.ceil(n / c) for n, c in zip(shape, chunk, strict=True))
    return nz, ny, nx


def _box(place: tuple[int, ...], chunk: Shape) -> tuple[slice, ...]:
    return tuple(slice(i * c, (i + 1) * c) for i, c in zip(place, chunk, strict=True))


def _checked(data: bytes) -> bytes:
    return data + google_crc32c.value(data).to_bytes(CRC_BYTES, "little")


# Our metadata stand beside "ome", under this key.
KEY = "photon"
FORMAT = 1
METADATA = ("format", "id", "key", "fingerprint", "recipe", "digest", "facts", "files")
ROOT = "zarr.json"
GRIDS = {"volume": "", "model": "model/"}
SUFFIX = ".ome.zarr"
# Chunks are at most this large: an axial slice of 364^3 costs 4 of them, a whole read 52.
CHUNK_ZYX = (28, 182, 182)
LARGEST_VOXELS = 4_000_000_000
CODECS = {"sharding_indexed", "bytes", "blosc", "crc32c"}
TOWARDS = {"z": "inferior-to-superior", "y": "anterior-to-posterior", "x": "right-to-left"}


def store_name(volume_id: str) -> str:
    """Return where the store of a volume lies below the output folder."""
    return f"volumes/{volume_id}{SUFFIX}"


def write_store(prepared: Prepared, out: Location, name: str, identity: dict[str, Any]) -> dict[str, Any]:
    """Write the store `name` below `out`, replacing one that is there; return {"bytes", "sha256" of its root metadata}.

    `identity` (id, key, fingerprint, recipe) goes into its metadata with the facts. Locally it is written beside, synced and
    renamed; on an object store the root metadata go last, and without them no reader takes the rest for a store.
    """
    scratch = out.path / Path(name).parent if out.is_local else Path(tempfile.mkdtemp(prefix="photon-"))
    scratch.mkdir(parents=True, exist_ok=True)
    folder = scratch / f".{Path(name).name}.{uuid.uuid4().hex[:8]}.partial"
    try:
        written = _build(prepared, folder, identity)
        if out.is_local:
            sync_tree(folder)
            replace_folder(folder, out.path / name)
        else:
            _upload(folder, out, name)
        return written
    finally:
        shutil.rmtree(folder if out.is_local else scratch, ignore_errors=True)


def _build(prepared: Prepared, folder: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """Write both image groups into `folder`, the root metadata last."""
    shards = {
        "0/c/0/0/0": _write_array(prepared.volume, folder / "0"),
        "model/0/c/0/0/0": _write_array(prepared.model, folder / "model" / "0"),
    }
    _write_group(folder / "model", {"ome": _ome("model", prepared.model.geometry)})
    files = {name: shards.get(name) or _file_facts(folder / name) for name in file_names(folder)}
    ours = {"format": FORMAT, **identity, "facts": prepared.facts, "files": files}
    content = _write_group(folder, {"ome": _ome(identity["id"], prepared.volume.geometry), KEY: ours})
    size = len(content) + sum(facts["bytes"] for facts in files.values())
    return {"bytes": size, "sha256": hashlib.sha256(content).hexdigest()}


def _write_array(volume: Volume, folder: Path) -> dict[str, Any]:
    """Write one array as a single checksummed shard, chunks of padding too; return {"bytes", "sha256"} of the shard.

    lz4 costs half the CPU time of zstd for a sixth more bytes (benchmarks/store_codecs.py).
    """
    array = volume.numpy()
    cz, cy, cx = (_even_part(n, most) for n, most in zip(array.shape, CHUNK_ZYX, strict=True))
    chunk = (cz, cy, cx)
    zarr.create_array(
        folder,
        shape=array.shape,
        dtype=array.dtype,
        chunks=chunk,
        shards=tuple(math.ceil(n / c) * c for n, c in zip(array.shape, chunk, strict=True)),
        compressors=[BloscCodec(cname="lz4", clevel=1, shuffle="bitshuffle", typesize=2), Crc32cCodec()],
        dimension_names=("z", "y", "x"),
        fill_value=0,
        config={"write_empty_chunks": True},
    )
    shard = folder / "c/0/0/0"
    shard.parent.mkdir(parents=True)
    return write_shard(array, chunk, shard)


def _even_part(length: int, most: int) -> int:
    """Return the length of a part when `length` is cut into as few parts of at most `most` as can be, all alike: 280 -> 140."""
    return math.ceil(length / math.ceil(length / most))


def _write_group(folder: Path, attributes: dict[str, Any]) -> bytes:
    content = json.dumps({"zarr_format": 3, "node_type": "group", "attributes": attributes}, indent=1).encode()
    (folder / ROOT).write_bytes(content)
    return content


def _ome(name: str, geometry: Geometry) -> dict[str, Any]:
    """Return OME-Zarr 0.5 metadata of one image with one level; orientation as in RFC-4."""
    axes = [
        {"name": a, "type": "space", "unit": "millimeter", "orientation": {"type": "anatomical", "value": TOWARDS[a]}}
        for a in "zyx"
    ]
    return {"version": "0.5", "multiscales": [{"name": name, "axes": axes, "datasets": ome_datasets(geometry)}]}


def ome_datasets(geometry: Geometry) -> list[dict[str, Any]]:
    """Return where OME-Zarr 0.4 and 0.5 place the voxels of the one level, "0"."""
    transforms = [
        {"type": "scale", "scale": list(geometry.spacing_zyx_mm)},
        {"type": "translation", "translation": list(geometry.origin_lps[::-1])},
    ]
    return [{"path": "0", "coordinateTransformations": transforms}]


def file_names(folder: Path) -> list[str]:
    """Return the sorted posix paths of all files of a store but its root metadata."""
    names = (p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    return sorted(name for name in names if name != ROOT)


def _file_facts(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _upload(folder: Path, out: Location, name: str) -> None:
    out.remove(f"{name}/{ROOT}")
    out.remove(name)
    for file in [*file_names(folder), ROOT]:
        out.write(f"{name}/{file}", (folder / file).read_bytes())


def read_metadata(out: Location, name: str) -> dict[str, Any] | None:
    """Return what a store says of itself: METADATA, its size in bytes and its root metadata's sha256.

    None where it is not there, of another format, or so damaged that it does not say all of this.
    """
    content = out.read(f"{name}/{ROOT}" if name else ROOT)
    try:
        ours = json.loads(content or b"")["attributes"][KEY]
        sizes = [facts["bytes"] for facts in ours["files"].values() if facts["sha256"]]
        size = len(content or b"") + sum(sizes)
        own = {"sha256": hashlib.sha256(content or b"").hexdigest(), "bytes": size}
        return {**{name: ours[name] for name in METADATA}, **own} if ours["format"] == FORMAT else None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def open_volume(path: str | Path, grid: Literal["volume", "model"] = "volume") -> Volume:
    """Return the volume of a store, read lazily: slice `.array_zyx` or take `.numpy()`.

    `path` is a store's folder or fsspec URL; `grid` picks the full volume or the model grid. int16 HU, (z, y, x), LPS-aligned.
    UsageError when it is not one of our stores, or one of another version.
    """
    location = Location(str(path))
    metadata = read_metadata(location, "")
    if metadata is None:
        raise UsageError(f"a store of photon-data (format {FORMAT}) wanted, got {path}; photon-data prepare makes them")
    if grid not in GRIDS:
        raise UsageError(f"grid volume or model wanted, got {grid!r}")
    place = GRIDS[grid]
    try:
        group = json.loads(location.read(f"{place}{ROOT}") or b"")
        _check_array(json.loads(location.read(f"{place}0/{ROOT}") or b""), path)
        array = zarr.open_array(location.at(f"{place}0"), mode="r", zarr_format=3)
        return Volume(array, _geometry(group["attributes"]["ome"], array.shape))
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise UsageError(f"whole metadata wanted, got damaged ones in {path} ({error!r}); prepare it again") from None


def _check_array(metadata: dict[str, Any], path: str | Path) -> None:
    """Raise UsageError before anything is decoded, unless this is an int16 volume of sane size in codecs that we write."""
    shape = metadata.get("shape", [])
    if metadata.get("data_type") != "int16" or len(shape) != 3 or math.prod(shape) > LARGEST_VOXELS:
        raise UsageError(f"a three-dimensional int16 array wanted, got {metadata.get('data_type')} {shape} in {path}")
    outer = metadata.get("codecs", [])
    inner = [c for codec in outer for c in codec.get("configuration", {}).get("codecs", [])]
    strange = {codec.get("name") for codec in [*outer, *inner]} - CODECS
    if strange:
        raise UsageError(f"the codecs {sorted(CODECS)} wanted, got {sorted(map(str, strange))} in {path}")


def _geometry(ome: dict[str, Any], shape_zyx: Any) -> Geometry:
    """Return the axis-aligned geometry that OME metadata state."""
    scale, translation = (t[t["type"]] for t in ome["multiscales"][0]["datasets"][0]["coordinateTransformations"])
    sz, sy, sx = scale
    return Geometry.from_arrays(shape_zyx, translation[::-1], ((0, 0, sz), (0, sy, 0), (sx, 0, 0)))


def is_whole(out: Location, name: str, metadata: dict[str, Any]) -> bool:
    """Tell cheaply whether every file of a local store has its recorded size (on an object store: metadata come last)."""
    if not out.is_local:
        return True
    try:
        return all((out.path / name / file).stat().st_size == facts["bytes"] for file, facts in metadata["files"].items())
    except FileNotFoundError:
        return False


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
            yield f"{name}/{file}: {facts['bytes']} bytes wanted, got {len(content)}"
        elif hashlib.sha256(content).hexdigest() != facts["sha256"]:
            yield f"{name}/{file}: its bytes have changed"
    if out.is_local:
        for file in sorted(set(file_names(out.path / name)) - set(metadata["files"])):
            yield f"{name}/{file}: not part of the store"
