"""How many of the project's files and functions one datum passes through, and how long the longest import chain is.

    python benchmarks/spines.py                  # this checkout
    python benchmarks/spines.py --root CHECKOUT  # another one, also of an earlier layout
    python benchmarks/spines.py --names          # with the files' names

Four commands run on small data of their own, each under `sys.setprofile` in every process and thread that it starts. A Python file
counts when one of its functions ran; what only ran while a module was imported does not count. A chain of imports counts files,
with the imports under TYPE_CHECKING and inside functions.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import nibabel
import numpy as np

PACKAGES = {
    "photon_data": "photon_data",
    "photon_train": "photon_train",
    "photon_pipelines": "pipelines",
    "photon_cli": "cli",
}
ENTRIES = {"photon-data": "photon_cli.data", "photon": "photon_cli.photon"}
SMALL = ["--set", "spacing_mm=4,4,4", "--set", "shape_zyx=56,56,56", "--set", "model_shape_zyx=28,56,56"]

# Python runs a module of this name at its start. Each process writes a line for every function of the project when it first runs.
TRACER = """
import inspect, os, sys, threading
write = open  # gone while Python shuts down
ROOT, OUT = os.environ["SPINES_ROOT"] + os.sep, os.environ["SPINES_OUT"]
seen, importing = set(), {}

def trace(frame, event, argument):
    code = frame.f_code
    if event not in ("call", "return") or not (code.co_filename.startswith(ROOT) and code.co_filename.endswith(".py")):
        return
    thread = threading.get_ident()
    if code.co_name == "<module>":
        if frame.f_globals["__name__"] == "__main__":
            return
        importing[thread] = importing.get(thread, 0) + (1 if event == "call" else -1)
    elif event == "call" and not importing.get(thread) and code.co_flags & inspect.CO_OPTIMIZED:
        key = os.getpid(), code.co_filename, code.co_qualname
        if key not in seen:
            seen.add(key)
            with write(os.path.join(OUT, str(os.getpid())), "a") as file:
                file.write(f"{code.co_filename[len(ROOT):]}\\t{code.co_qualname}\\n")

threading.setprofile(trace)
sys.setprofile(trace)
"""


def traced(
    root: Path, entry: str, arguments: list[str], folder: Path
) -> tuple[dict[str, set[str]], dict[str, set[str]]]:
    """Run a command and return {file: functions} of its own process and of all that it started."""
    out = folder / "trace"
    out.mkdir()
    code = f"from {ENTRIES[entry]} import main; main()"
    environment = {**environment_of(root, folder), "SPINES_ROOT": str(folder / "project"), "SPINES_OUT": str(out)}
    environment["PYTHONPATH"] = f"{folder / 'tracer'}{os.pathsep}{environment['PYTHONPATH']}"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], env=environment, cwd=folder, stdout=subprocess.DEVNULL
    )
    if process.wait():
        raise SystemExit(f"expected `{entry} {' '.join(arguments)}` to succeed, found exit code {process.returncode}")
    own: dict[str, set[str]] = defaultdict(set)
    others: dict[str, set[str]] = defaultdict(set)
    for file in out.iterdir():
        for line in file.read_text().splitlines():
            name, function = line.split("\t")
            (own if file.name == str(process.pid) else others)[name].add(function)
    subprocess.run(["rm", "-r", str(out)], check=True)
    return own, others


def environment_of(root: Path, folder: Path) -> dict[str, str]:
    """Return an environment in which the checkout `root` is what is imported."""
    project = folder / "project"
    if not project.exists():
        project.mkdir()
        (folder / "tracer").mkdir()
        (folder / "tracer" / "sitecustomize.py").write_text(TRACER)
        for name, place in PACKAGES.items():
            (project / name).symlink_to(root / place)
    return {**os.environ, "PYTHONPATH": str(project), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def capture(root: Path, folder: Path, entry: str, *arguments: str) -> str:
    """Run a command of a checkout in `folder`, not traced; return what it prints."""
    code = f"from {ENTRIES[entry]} import main; main()"
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(
        command, env=environment_of(root, folder), cwd=folder, stdout=subprocess.PIPE, text=True, check=True
    ).stdout


def run(root: Path, folder: Path, entry: str, *arguments: str) -> None:
    """Run a command of a checkout in `folder`, not traced, in silence."""
    capture(root, folder, entry, *arguments)


def spines(root: Path, folder: Path) -> dict[str, tuple[dict[str, set[str]], dict[str, set[str]]]]:
    """Return what ran, of the command's process and of others, by the name of the spine."""
    (folder / "raw").mkdir()
    rng = np.random.default_rng(0)
    hu = np.where(np.hypot(*np.mgrid[-1:1:48j, -1:1:48j])[..., None] < 0.7, 40.0, -1000.0) + rng.normal(
        0, 30, (48, 48, 40)
    )
    nibabel.save(nibabel.Nifti1Image(hu.astype(np.int16), np.diag([4.0, 4.0, 4.0, 1.0])), folder / "raw" / "a.nii.gz")
    (folder / "questions.csv").write_text("id,volume,question,answer,split\nq1,a,Is there a nodule?,yes,train\n")
    found = {}
    prepare = ["prepare", "raw", "out", "--workers", "1", *SMALL]
    found["one .nii.gz -> store"] = traced(root, "photon-data", prepare, folder)
    run(root, folder, "photon-data", *prepare, "--questions", "questions.csv")
    run(root, folder, "photon", "init", "--tiny", "tiny", "--stage", "2", "--model-shape", "28,56,56")
    train = ["train", "tiny-s2", "--model", "tiny", "--data", "out/manifests/train.jsonl", "--output", "run"]
    dry = ["--dry-run", "--set", "groups_per_step=1", "--set", "workers=0"]
    found["one training group -> loss"] = traced(root, "photon", [*train, *dry], folder)
    store = "out/volumes/a.ome.zarr"
    found["one question -> answer, on a store"] = traced(
        root, "photon", ["predict", "--model", "tiny", store, "Any?"], folder
    )
    rows = "out/manifests/train.jsonl"
    answer = {"id": json.loads((folder / rows).read_text())["id"], "response": "yes"}
    (folder / "predictions.jsonl").write_text(json.dumps(answer) + "\n")
    score = ["eval", "vqa", "--predictions", "predictions.jsonl", "--data", rows, "--output", "scores"]
    found["one prediction row -> score"] = traced(root, "photon", score, folder)
    return found


def imports_of(root: Path) -> dict[str, set[str]]:
    """Return {module: modules of the project that it names in an import, wherever the import stands}."""
    files = {}
    for package, place in PACKAGES.items():
        for file in (root / place).rglob("*.py"):
            parts = file.relative_to(root / place).with_suffix("").parts
            files[".".join([package, *(part for part in parts if part != "__init__")])] = file
    found: dict[str, set[str]] = {}
    for module, file in files.items():
        named: set[str] = set()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                named |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                both = [(f"{node.module}.{alias.name}", node.module) for alias in node.names]
                named |= {inner if inner in files else outer for inner, outer in both}
        found[module] = (named & files.keys()) - {module}
    return found


def cycles(imports: dict[str, set[str]]) -> list[set[str]]:
    """Return the groups of modules that import one another, directly or not."""
    reach = {module: set(targets) for module, targets in imports.items()}
    changed = True
    while changed:
        changed = False
        for targets in reach.values():
            more = set().union(*(reach[target] for target in targets)) - targets
            targets |= more
            changed |= bool(more)
    groups = {
        frozenset(other for other in reach[module] if module in reach[other])
        for module in reach
        if module in reach[module]
    }
    return [set(group) for group in groups]


def longest_chain(imports: dict[str, set[str]], start: str, known: dict[str, list[str]]) -> list[str]:
    """Return the longest chain of imports that begins at a module; where there is a cycle it is followed once."""
    if start not in known:
        known[start] = [start]
        known[start] = [
            start,
            *max((longest_chain(imports, target, known) for target in sorted(imports[start])), key=len, default=[]),
        ]
    return known[start]


def main() -> None:
    """Print both measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path(__file__).parents[1])
    parser.add_argument("--names", action="store_true")
    options = parser.parse_args()
    root = options.root.resolve()
    with tempfile.TemporaryDirectory() as folder:
        for name, (own, others) in spines(root, Path(folder)).items():
            beside = f" + {len(others)} in other processes" if others else ""
            functions = sum(map(len, own.values())), sum(map(len, others.values()))
            print(f"{name}: {len(own)} files{beside}, {functions[0]}{f' + {functions[1]}' if others else ''} functions")
            for which in (own, others) if options.names else ():
                print("".join(f"    {file} ({len(which[file])})\n" for file in sorted(which)))
    imports = imports_of(root)
    known: dict[str, list[str]] = {}
    for entry in ENTRIES.values():
        chain = longest_chain(imports, entry, known)
        print(f"longest import chain from {entry}: {len(chain)} files: {' -> '.join(chain)}")
    print(f"{len(imports)} modules; import cycles: {cycles(imports) or 'none'}")


if __name__ == "__main__":
    main()
