"""Codecs and chunks for the arrays of a store, one thread: size, CPU seconds to write and to read, latency of partial
reads.

python benchmarks/store_codecs.py [--repeats 3]
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import zarr
from numcodecs import blosc
from scan import test_scan
from tables import print_place, print_table
from with_photon import prepare
from zarr.codecs import BloscCodec, Crc32cCodec

from photon_data import open_volume

CODECS = [("zstd", "bitshuffle"), ("zstd", "shuffle"), ("lz4", "bitshuffle"), ("lz4", "shuffle"), None]
CHUNKS = {
    "volume": [(28, 182, 182), (91, 91, 91)],
    "model": [(28, 182, 182), (28, 140, 140), (14, 280, 280)],
}
HEADER = ("array", "chunk", "codec", "MB", "write CPU s", "read CPU s", "axial slice ms", "96^3 patch ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    blosc.set_nthreads(1)
    with tempfile.TemporaryDirectory() as folder:
        store = prepare(str(test_scan()), folder)
        arrays = {"volume": open_volume(store).numpy(), "model": open_volume(store, "model").numpy()}
        rows = [
            (name, " x ".join(map(str, chunk)), " ".join(("blosc", *codec)) if codec else "none", *measured)
            for name, array in arrays.items()
            for codec, chunk in product(CODECS, CHUNKS[name])
            for measured in [_measure(array, codec, chunk, Path(folder, "array"), options.repeats)]
        ]
    print_place("zarr", "numcodecs")
    print_table(HEADER, [tuple(map(str, row)) for row in rows])


def _measure(
    array: np.ndarray, codec: tuple[str, str] | None, chunk: tuple[int, ...], folder: Path, repeats: int
) -> tuple[str, ...]:
    """Return the cells of one row."""
    write = _cpu_s(lambda: _write(array, codec, chunk, folder), repeats)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    stored: Any = zarr.open_array(folder, mode="r")
    read = _cpu_s(lambda: stored[...], repeats)
    slices, patches = _corners(array.shape, 1), _corners(array.shape, 96)
    by_slice = _cpu_s(lambda: stored[next(slices)[0]], 4 * repeats)
    by_patch = _cpu_s(lambda: stored[next(patches)], 4 * repeats)
    return f"{size / 1e6:.1f}", f"{write:.3f}", f"{read:.3f}", f"{1e3 * by_slice:.0f}", f"{1e3 * by_patch:.0f}"


def _write(array: np.ndarray, codec: tuple[str, str] | None, chunk: tuple[int, ...], folder: Path) -> None:
    """Write as photon_data.store does: one shard, every chunk with its checksum."""
    shuffled = [BloscCodec(cname=codec[0], clevel=1, shuffle=codec[1], typesize=2)] if codec else []  # type: ignore[arg-type]
    stored = zarr.create_array(
        folder,
        shape=array.shape,
        dtype=array.dtype,
        chunks=chunk,
        shards=tuple(math.ceil(n / c) * c for n, c in zip(array.shape, chunk, strict=True)),
        compressors=[*shuffled, Crc32cCodec()],
        fill_value=0,
        config={"write_empty_chunks": True},
        overwrite=True,
    )
    stored[...] = array


def _corners(shape: tuple[int, ...], side: int) -> Iterator[tuple[slice, ...]]:
    """Yield boxes of `side` voxels at places drawn from a fixed seed, without end."""
    rng = np.random.default_rng(0)
    while True:
        yield tuple(slice(low, low + side) for low in rng.integers(0, np.array(shape) - side + 1).tolist())


def _cpu_s(work: Callable[[], Any], repeats: int) -> float:
    """Return the median CPU seconds of a call."""
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    return median(seconds)


if __name__ == "__main__":
    main()
