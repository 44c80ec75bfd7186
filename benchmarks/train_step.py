"""Seconds, memory and questions per second of an optimizer step: K questions of a volume, shared or not, none or ITS.

    python benchmarks/train_step.py                                   the tiny model on a CPU
    python benchmarks/train_step.py --size 3b --device cuda           random weights of the published size

Stores of random voxels are written to a temporary folder and read as in training; `wait` is the share of the time in
which the device had nothing to do for want of data. Modes are interleaved; the median of --repeats steps after one
warm-up.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from model_speed import build

from photon_data.files import Location
from photon_data.records import store_name
from photon_data.store import write_store
from photon_data.volume import Geometry, Prepared, Volume
from photon_train.training.config import TrainConfig
from photon_train.training.log import read_log
from photon_train.training.loop import run_steps
from photon_train.training.setup import start

SHAPES = ((364, 364, 364), (140, 280, 280))


def write_data(folder: Path, volumes: int, questions: int, model_shape: tuple[int, ...] = SHAPES[1]) -> Path:
    """Write stores and a manifest in which every volume has so many questions; return the manifest."""
    rows = []
    for number in range(volumes):
        draw = np.random.default_rng(number)
        grids = [
            Volume(draw.integers(-1000, 1000, shape, np.int16), Geometry.axis_aligned(shape, (1, 1, 1), (0, 0, 0)))
            for shape in (SHAPES[0], model_shape)
        ]
        name = store_name(f"v{number}")
        identity = {"id": f"v{number}", "key": "k", "fingerprint": "f", "recipe": {}, "digest": "d"}
        write_store(Prepared(*grids, {}), Location(str(folder)), name, identity)
        for k in range(questions):
            ask = {"role": "user", "content": f"<video>Is there a pulmonary nodule of more than {k} mm, and where?"}
            answer = {"role": "assistant", "content": "yes, in the left upper lobe"}
            rows.append({"id": f"{number}-{k}", "videos": [str(folder / name)], "messages": [ask, answer]})
    manifest = folder / "train.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return manifest


def measure(
    args: argparse.Namespace, folder: Path, manifest: Path, questions: int, scheduler: str, shared: bool
) -> dict[str, Any]:
    """Return the medians of a run of a few steps."""
    output = folder / f"{questions}-{scheduler}-{shared}"
    config = TrainConfig(
        stage="s2" if scheduler == "its" else "s1c",
        model=str(folder / "model"),
        data=(str(manifest),),
        output=str(output),
        lr_threshold=1e-5 if scheduler == "its" else 0.0,
        groups_per_step=args.volumes_per_step * (1 if shared else questions),
        questions_per_volume=questions if shared else 1,
        max_steps=args.repeats + 1,
        epochs=args.repeats + 1,
        precision="bf16" if args.device == "cuda" else "fp32",
        workers=args.workers,
        save_every=0,
        track=(),
        photon={"soft_start": 0, "hard_start": 0, "initial_threshold": 0.45} if scheduler == "its" else {},
    )
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    run_steps(start(config, resume=False))
    rows = read_log(output)[1:]
    names = ("seconds", "questions_per_second", "data_wait_share", "peak_memory_mib")
    found = {name: statistics.median(row[name] for row in rows) for name in names}
    return (
        found if args.device == "cuda" else found | {"peak_memory_mib": float("nan")}
    )  # the CPU's peak is of the whole process


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("tiny", "3b"), default="tiny")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--attention", default="sdpa")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--volumes-per-step", type=int, default=1)
    parser.add_argument("--workers", type=int, default=-1)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="photon-") as name:
        folder = Path(name)
        model, processor = build(args)
        model.save_pretrained(folder / "model")
        processor.save_pretrained(folder / "model")
        del model
        print(f"{'K':>2} {'scheduler':9} {'encoding':9} {'s/step':>8} {'questions/s':>12} {'wait':>6} {'MiB':>8}")
        for questions in (1, 4, 8):
            manifest = write_data(folder / str(questions), 4, questions)
            for scheduler in ("none", "its"):
                for shared in (True, False) if questions > 1 else (False,):
                    row = measure(args, folder, manifest, questions, scheduler, shared)
                    print(
                        f"{questions:2} {scheduler:9} {'shared' if shared else 'each':9} {row['seconds']:8.2f} "
                        f"{row['questions_per_second']:12.2f} {row['data_wait_share']:6.1%} "
                        f"{row['peak_memory_mib']:8.0f}",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
