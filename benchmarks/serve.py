"""Questions per second and latency of `photon serve`, cold and with cached volumes, beside a process per question.

    python benchmarks/serve.py [--model DIR] [--questions 64] [--clients 1,8,64] [--volumes 4] [--new-tokens 16]

Without --model, a random model of 333,073 parameters reads volumes of the published size. Clients ask without a pause,
in turn about the volumes. "cold" serves with --cache-gb 0: a volume is encoded for every batch of questions that wait
for it together. "cached" has asked about every volume once before. "all tokens kept" is cached too, with --scheduler
none: what an engine with a cache of prefixes and without pruning does. vLLM, the one that is known for it, is not run:
its wheels on PyPI are for CUDA. The last row starts `photon predict` for each question, one at a time: it includes the
start of Python and the loading of the model, which a server pays once.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from tables import print_place, print_table

from photon_data.files import Location
from photon_data.recipe import Recipe
from photon_data.records import PREPARED, VolumeRecord, store_name, write_records
from photon_data.store import write_store
from photon_data.volume import Geometry, Prepared, Volume
from photon_train.tiny import tiny

PHOTON = [sys.executable, "-c", "from photon_cli.photon import main; main()"]
PREDICTIONS = 5  # processes that are started for the last row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None)
    parser.add_argument("--questions", type=int, default=64)
    parser.add_argument("--clients", default="1,8,64")
    parser.add_argument("--volumes", type=int, default=4)
    parser.add_argument("--new-tokens", type=int, default=16)
    options = parser.parse_args()
    print_place("torch", "transformers", "uvicorn")
    with tempfile.TemporaryDirectory() as folder:
        model = options.model or str(Path(folder, "tiny"))
        if options.model is None:
            tiny(Path(model), stage=2, initial_threshold=0.45)
        ids = write_volumes(Path(folder, "out"), options.volumes)
        rows = []
        ways = {"cold": ["--cache-gb=0"], "cached": [], "cached, all tokens kept": ["--scheduler=none"]}
        for name, more in ways.items():
            with server(model, Path(folder, "out"), more) as base:
                ask(base, ids, len(ids), 1, options.new_tokens)  # threads and libraries are warm in both
                for clients in map(int, options.clients.split(",")):
                    start_s = time.perf_counter()
                    seconds = ask(base, ids, options.questions, clients, options.new_tokens)
                    rows.append(
                        row(f"photon serve, {name}, clients: {clients}", seconds, time.perf_counter() - start_s)
                    )
        seconds = [predict(model, Path(folder, "out"), ids[0], options.new_tokens) for _ in range(PREDICTIONS + 1)][1:]
        rows.append(row("photon predict, a process per question", seconds, sum(seconds)))
        print_table(["", "questions/s", "p50 s", "p95 s"], rows)


def write_volumes(out: Path, count: int) -> list[str]:
    """Write stores of noise on the model grid, and volumes.jsonl; return their ids."""
    shape, small = Recipe().model_shape_zyx, (14, 28, 28)
    grids = [
        Geometry.axis_aligned(small, (26, 13, 13), (0, 0, 0)),
        Geometry.axis_aligned(shape, (2.6, 1.3, 1.3), (0, 0, 0)),
    ]
    facts, ids = {"geometry": grids[0].to_json(), "grid": grids[0].to_json()}, [f"v{n}" for n in range(count)]
    for seed, id in enumerate(ids):
        voxels = np.random.default_rng(seed).integers(-1000, 1000, shape).astype(np.int16)
        prepared = Prepared(Volume(voxels[:14, :28, :28], grids[0]), Volume(voxels, grids[1]), facts)
        identity = {"id": id, "key": id, "fingerprint": id, "recipe": Recipe().to_json(), "digest": Recipe().digest}
        write_store(prepared, Location(str(out)), store_name(id), identity)
    write_records(Location(str(out)), [VolumeRecord(id, id, PREPARED, 0, 0, store=store_name(id)) for id in ids])
    return ids


@contextmanager
def server(model: str, out: Path, more: Sequence[str]) -> Iterator[str]:
    """Yield the address of a running server."""
    words = ["serve", "--model", model, "--data", str(out), "--port", "0", *more]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [*PHOTON, *words], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    )
    try:
        assert process.stdout is not None
        found = re.match(r"Open (http://\S+)", process.stdout.readline())
        assert found, "the server did not start"
        yield found[1]
    finally:
        process.terminate()
        process.wait()


def ask(base: str, ids: Sequence[str], count: int, clients: int, new_tokens: int) -> list[float]:
    """Return the seconds of `count` questions, which so many clients ask."""
    left, seconds, lock = iter(range(count)), list[float](), threading.Lock()

    def client() -> None:
        while True:
            with lock:
                number = next(left, None)
            if number is None:
                return
            parts = [
                {"type": "volume", "volume": ids[number % len(ids)]},
                {"type": "text", "text": f"Any nodule in slab {number}?"},
            ]
            body = {"model": model_of(base), "max_tokens": new_tokens, "messages": [{"role": "user", "content": parts}]}
            start_s = time.perf_counter()
            with urllib.request.urlopen(f"{base}/v1/chat/completions", json.dumps(body).encode(), timeout=600) as found:
                assert json.load(found)["choices"]
            with lock:
                seconds.append(time.perf_counter() - start_s)

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seconds) == count, "a question was lost"
    return seconds


_models: dict[str, str] = {}


def model_of(base: str) -> str:
    if base not in _models:
        with urllib.request.urlopen(f"{base}/v1/models") as found:
            _models[base] = json.load(found)["data"][0]["id"]
    return _models[base]


def predict(model: str, out: Path, id: str, new_tokens: int) -> float:
    """Return the seconds of a process that answers one question."""
    words = ["predict", "--model", model, str(out / store_name(id)), "Any nodule?", "--max-new-tokens", str(new_tokens)]
    start_s = time.perf_counter()
    subprocess.run([*PHOTON, *words], check=True, capture_output=True)
    return time.perf_counter() - start_s


def row(name: str, seconds: Sequence[float], wall_s: float) -> list[str]:
    ordered = sorted(seconds)
    p95 = ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]
    return [name, f"{len(seconds) / wall_s:.2f}", f"{statistics.median(seconds):.2f}", f"{p95:.2f}"]


if __name__ == "__main__":
    main()
