"""Compare the bytes, losses, answers and scores of two checkouts.

    git worktree add /tmp/before COMMIT
    python benchmarks/same_results.py /tmp/before      # against this checkout; exit code 1 where something differs

Each checkout makes phantoms, prepares them, trains the tiny model for some steps of both stages, answers the
questions and scores the answers. Compared are every file of every store (of the root metadata: facts and hashes), rows
of volumes and manifests, losses and weights (but for their last digits), answers and kept tokens, scores. Times, memory
and the folder's own name are left out.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file
from spines import capture, run

TIMES = ("seconds", "memory", "per_second", "wait", "cost", "time", "peak", "versions", "mib")
SMALL = ["--set", "model_shape_zyx=28,56,56"]
SHAPE = "28,56,56"
TINY = ["--set", "epochs=2", "--set", "groups_per_step=2", "--set", "save_every=0", "--set", "workers=0"]


def results(root: Path, folder: Path) -> dict[str, Any]:
    """Return {name: value} of all that has to be the same."""
    photon_data = lambda *arguments: run(root, folder, "photon-data", *arguments)  # noqa: E731
    photon = lambda *arguments: run(root, folder, "photon", *arguments)  # noqa: E731
    photon_data("phantom", "phantoms", "--n", "6", "--easy", "--size", "64", "--seed", "3")
    questions = "phantoms/questions.jsonl"
    photon_data("prepare", "phantoms/scans", "out", "--questions", questions, "--split", "train=0.6,test=0.4", *SMALL)
    found = dict(of_files(folder / "phantoms", "phantoms")) | of_stores(folder / "out")
    train, test = (f"out/manifests/{split}.jsonl" for split in ("train", "test"))
    photon("init", "--tiny", "tiny", "--stage", "2", "--model-shape", SHAPE)
    masks = ["--set", "grounding=phantoms/masks"]
    photon("train", "tiny-s1", "--model", "tiny", "--data", train, "--output", "s1", *TINY, *masks)
    photon("train", "tiny-s2", "--model", str(last(folder / "s1")), "--data", train, "--output", "s2", *TINY)
    for stage in ("s1", "s2"):
        found |= of_weights(last(folder / stage), stage)
        found |= of_rows(folder / stage / "log.jsonl", f"{stage}/log")
    rows = "--data" if "--data" in capture(root, folder, "photon", "predict", "--help") else "--manifest"
    limit = ["--max-new-tokens", "6"]
    photon("predict", "--model", str(last(folder / "s2")), rows, test, "--output", "predictions.jsonl", *limit)
    photon("eval", "vqa", "--predictions", "predictions.jsonl", "--data", test, "--train", train, "--output", "scores")
    found |= of_rows(folder / "predictions.jsonl", "predictions")
    return found | {"scores": without_times(json.loads((folder / "scores" / "scores.json").read_text()))}


def of_stores(out: Path) -> dict[str, Any]:
    """Return the hashes of all files of all stores, and what their metadata and the tables say."""
    found: dict[str, Any] = {}
    for file in sorted((out / "volumes").rglob("*")):
        name = file.relative_to(out).as_posix()
        if file.parent.parent == out / "volumes" and file.name == "zarr.json":
            metadata = json.loads(file.read_text())["attributes"]
            found[name] = {
                key: metadata["photon"][key] for key in ("id", "key", "fingerprint", "digest", "facts", "files")
            }
        elif file.is_file():
            found[name] = sha256(file)
    ours = ("id", "source", "state", "fingerprint", "key", "facts")
    found |= {f"volumes/{row['id']}": {key: row[key] for key in ours} for row in read(out / "volumes.jsonl")}
    for file in sorted((out / "manifests").iterdir()):
        rows = file.read_bytes().replace(str(out.parent).encode(), b"")
        found[f"manifests/{file.name}"] = hashlib.sha256(rows).hexdigest()
    return found


def of_files(folder: Path, name: str, pattern: str = "*") -> dict[str, Any]:
    """Return the hash of every file below a folder."""
    files = sorted(file for file in folder.rglob(pattern) if file.is_file())
    return {f"{name}/{file.relative_to(folder).as_posix()}": sha256(file) for file in files}


def of_weights(checkpoint: Path, name: str) -> dict[str, Any]:
    """Return the sum and the norm of every weight and of every part of the optimizer's state."""
    tensors = {
        f"{file.stem}/{key}": tensor
        for file in sorted(checkpoint.glob("*.safetensors"))
        for key, tensor in load_file(file).items()
    }
    return {f"{name}/{key}": [float(tensor.sum()), float(np.linalg.norm(tensor))] for key, tensor in tensors.items()}


def of_rows(file: Path, name: str) -> dict[str, Any]:
    """Return the rows of a JSON-lines file."""
    return {f"{name}/{row.get('id', row.get('step'))}": without_times(row) for row in read(file)}


def without_times(value: Any) -> Any:
    """Return JSON without what depends on the machine."""
    if isinstance(value, dict):
        return {key: without_times(v) for key, v in value.items() if not any(word in key for word in TIMES)}
    return [without_times(v) for v in value] if isinstance(value, list) else value


def same(before: Any, after: Any) -> bool:
    """Tell whether two results are the same; numbers may differ in their last digits, as sums in another order do."""
    if isinstance(before, dict) and isinstance(after, dict):
        return before.keys() == after.keys() and all(same(before[key], after[key]) for key in before)
    if isinstance(before, list) and isinstance(after, list):
        return len(before) == len(after) and all(map(same, before, after))
    if isinstance(before, float) and isinstance(after, float):
        # Biases of keys have no gradient but rounding, which Adam makes as large as the others: hence the tolerance.
        return math.isclose(before, after, rel_tol=1e-4, abs_tol=1e-4)
    return bool(before == after)


def read(file: Path) -> list[dict[str, Any]]:
    """Return the rows of a JSON-lines file."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def sha256(file: Path) -> str:
    """Return the hash of a file."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def last(folder: Path) -> Path:
    """Return the last checkpoint of a run."""
    return max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))


def main() -> None:
    """Print how many results are the same, and which are not."""
    roots = [
        Path(sys.argv[1]).resolve(),
        Path(sys.argv[2] if len(sys.argv) > 2 else Path(__file__).parents[1]).resolve(),
    ]
    both = []
    for root in roots:
        with tempfile.TemporaryDirectory() as folder:
            both.append(results(root, Path(folder)))
    before, after = both
    different = sorted(name for name in before.keys() | after.keys() if not same(before.get(name), after.get(name)))
    kinds: Callable[[str], str] = lambda name: name.partition("/")[0]  # noqa: E731
    for kind in sorted({kinds(name) for name in before}):
        names = [name for name in before if kinds(name) == kind]
        print(f"{kind}: {sum(name not in different for name in names)} of {len(names)} the same")
    for name in different[:20]:
        print(f"differs: {name}\n  before {str(before.get(name))[:300]}\n  after  {str(after.get(name))[:300]}")
    raise SystemExit(bool(different))


if __name__ == "__main__":
    main()
